"""Which modules of the package some code imports, read from the sources: nothing is imported to find out."""

import ast
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent


def imported_modules(sources: Iterable[str], package: Path = PACKAGE) -> dict[str, Path]:
    """Modules of ``package`` that the sources import, themselves or through others: name -> file, sorted by name.

    Every import statement counts, wherever it stands: in a function, under a condition, in a ``try``. What is imported
    by a call (``importlib.import_module``) is not seen.
    """
    found = {}
    waiting = {name for source in sources for name in _imports(source, "")}
    while waiting:
        name = waiting.pop()
        path = _file(name, package)
        if path is not None and name not in found:
            found[name] = path
            parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting |= _imports(path.read_text(encoding="utf-8"), parent)
    return dict(sorted(found.items()))


@lru_cache(maxsize=1024)
def _imports(source: str, parent: str) -> frozenset[str]:
    """Names that may be modules: of a dotted name each beginning, since importing it imports its packages.

    Args: parent: the package that relative imports start from.
    """
    return frozenset(
        ".".join(parts[: i + 1])
        for name in _statements(_tree(source), parent)
        for parts in [name.split(".")]
        for i in range(len(parts))
    )


def _statements(tree: ast.AST, parent: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parent.split(".")[: len(parent.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)  # a name in it, or a module of it


def _tree(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except SyntaxError:  # a cell with magics or commands of IPython, which it translates; else code that cannot run
        from IPython.core.inputtransformer2 import TransformerManager

        try:
            return ast.parse(TransformerManager().transform_cell(source))
        except SyntaxError:
            return ast.Module([], [])


def _file(name: str, package: Path) -> Path | None:
    first, *rest = name.split(".")
    if first != __package__:
        return None
    path = package.joinpath(*rest)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)
