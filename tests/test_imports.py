"""What some code imports of the package, found without importing it."""

import pytest

from labelaug.imports import imported_modules

FILES = {
    "__init__.py": "",
    "alone.py": "",
    "base.py": "",
    "top.py": "import math\nfrom labelaug import base\n",
    "late.py": "def f():\n    from labelaug import base\n    class C:\n        import labelaug.alone\n",
    "maybe.py": "try:\n    import numpy\nexcept ImportError:\n    import labelaug.base as base\n",
    "circle.py": "import labelaug.circle_back\n",
    "circle_back.py": "import labelaug.circle\n",
    "broken.py": "from labelaug import (\n",
    "deep/__init__.py": "from labelaug.deep import shown\n",
    "deep/shown.py": "",
    "deep/hidden.py": "from ..base import x\nfrom . import sibling\n",
    "deep/sibling.py": "from .shown import x\n",
    "wide/__init__.py": "from .inner import x\nfrom . import other\n",
    "wide/inner.py": "",
    "wide/other.py": "from .. import alone\n",
}
SELF, DEEP = {"labelaug"}, {"labelaug", "labelaug.deep", "labelaug.deep.shown"}

HIDDEN = {"labelaug.deep.hidden", "labelaug.base", "labelaug.deep.sibling"}
WIDE = {f"labelaug.{name}" for name in ("wide", "wide.inner", "wide.other", "alone")}


@pytest.fixture
def package(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import numpy\nimport labelaugment\nfrom labelled import base", set()),
        ("import labelaug", SELF),
        ("from labelaug import base", SELF | {"labelaug.base"}),
        ("import labelaug.base as b, os", SELF | {"labelaug.base"}),
        ("from labelaug.base import x", SELF | {"labelaug.base"}),
        ("from labelaug import (\n    alone, late as t)", SELF | {"labelaug.alone", "labelaug.late", "labelaug.base"}),
        ("def f():\n    if True:\n        from labelaug import alone", SELF | {"labelaug.alone"}),
        ("f = lambda: 0\nwith open('x') as y:\n    import labelaug.alone", SELF | {"labelaug.alone"}),
        ("import labelaug.late", SELF | {"labelaug.late", "labelaug.base", "labelaug.alone"}),
        ("import labelaug.maybe", SELF | {"labelaug.maybe", "labelaug.base"}),
        ("import labelaug.circle", SELF | {"labelaug.circle", "labelaug.circle_back"}),
        ("import labelaug.broken", SELF | {"labelaug.broken"}),
        ("import labelaug.deep", DEEP),
        ("import labelaug.wide", SELF | WIDE),
        ("from labelaug.deep.hidden import x", DEEP | HIDDEN),
        ("%matplotlib inline\n!ls\nimport labelaug.base", SELF | {"labelaug.base"}),
        ("import labelaug.base\nthis is no Python", set()),
        ("'import labelaug.base'  # import labelaug.alone", set()),
    ],
)  # fmt: skip
def test_every_import_statement_counts(package, source, found):
    modules = imported_modules([source], package)
    assert modules.keys() == found
    assert list(modules) == sorted(modules)
    for name, path in modules.items():
        assert path.is_file() and package.joinpath(*name.split(".")[1:]) in (path.parent, path.with_suffix(""))


def test_sources_add_up_and_edits_are_seen(package):
    assert imported_modules([], package) == {}
    both = imported_modules(["import labelaug.alone", "import labelaug.base"], package)
    assert both.keys() == {"labelaug", "labelaug.alone", "labelaug.base"}
    (package / "base.py").write_text("import labelaug.circle")
    assert "labelaug.circle_back" in imported_modules(["import labelaug.base"], package)
