"""The book: its gates on a sample with planted faults, and what a browser sees of the sample and of the real book."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import url2pathname

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from jupyter_book.config import validate_yaml
from playwright.sync_api import Browser, sync_playwright

from labelaug import book
from labelaug.book import BookError

# ---------------------------------------------------------------------------------------------------------------------
# A sample book with one of everything

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" width="640" height="360">'
    '<path d="M40 320 Q 320 -120 600 300" fill="none" stroke="{colour}" stroke-width="4"/></svg>'
)

FIGURE = """\
:::{{study-figure}} figures/01_sample/{name}-light.svg
:name: {name}
:dark: figures/01_sample/{name}-dark.svg
:data: tables/01_sample/{name}.csv tables/01_sample/runs.csv
:alt: "Risk against strength: a curve, \\"convex\\" up to 0.5 # then {{flat}}."

**The risk falls**, then rises at $\\lambda = 0.5$; median of 5 seeds (see {{eq}}`eq-wide`).
:::
"""

INDEX = """\
# Label smoothing

The least margin is in {numref}`fig-margin`, the statement is {prf:ref}`thm-sample`, after {cite:t}`szegedy2016`.

:::{include} _generated/ledger.md
:::

```{code-block} python
from labelaug.targets import smooth_targets; targets = smooth_targets(labels, num_classes=10, smoothing=0.1, dtype=None)
```
"""

LEDGER = """\
| id | claim | verdict | where |
|----|-------|---------|-------|
| P1-F1 | the low-variance feature is learned | [holds]{.verdict-holds} | [theory](theory.md) |
| P1-F2 | it is learned for each strength | [holds under a small step]{.verdict-conditional} | [here](01_sample.ipynb) |
| P1-F3 | weight decay does the same | [does not hold]{.verdict-fails} | [here](01_sample.ipynb) |
| P1-F4 | for each architecture | [not tested]{.verdict-untested} | — |
"""

THEORY = f"""\
# A theorem at $\\varepsilon$

:::{{prf:theorem}} Minimiser
:label: thm-sample
If $q$ is the smoothed target, the loss is least where

$$
z_y - z_k = \\log\\Bigl(1 + \\frac{{K (1 - \\varepsilon)}}{{\\varepsilon}}\\Bigr).
$$ (eq-gap)
:::

::::{{dropdown}} Proof

:::{{prf:proof}}
Set the gradient of {{eq}}`eq-gap` to zero.
:::
::::

Inline, $\\min_w \\frac{{1}}{{n}} \\sum_{{i=1}}^{{n}} \\ell(w, x_i, y_i) + \\lambda_1 \\|w\\|_1
+ \\lambda_2 \\|w\\|_2^2 + \\lambda_3 \\|w\\|_3^3$ breaks; displayed,

```{{math}}
:label: eq-wide
{" + ".join(f"a_{{{i}}}" for i in range(30))} + \\underbrace{{\\lambda \\log \\sigma(y w^\\top x)}}_{{\\text{{loss}}}}
```

scrolls.

:::{{admonition}} Read this first
:class: warning
A warning with `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`, $x^2$ and a [link](index.md).
:::

{"| interpolation " * 9}|
{"|---" * 9}|
{"| interpolation " * 9}|

term
: its definition

{FIGURE.format(name="fig-theory")}
"""

REFERENCES = """\
# References

```{bibliography}
```
"""

BIB = """\
@inproceedings{szegedy2016,
  author = {Szegedy, Christian and Vanhoucke, Vincent},
  title = {Rethinking the Inception Architecture for Computer Vision},
  booktitle = {CVPR},
  year = {2016},
}
"""

FRAME = (
    '<table border="1" class="dataframe"><thead><tr><th></th>'
    + "".join(f"<th>metric_{i}</th>" for i in range(12))
    + "</tr></thead><tbody><tr><th>0</th>"
    + "".join(f"<td>{i / 7:.5f}</td>" for i in range(12))
    + "</tr></tbody></table>"
)


def cell(source: str, *outputs: dict, count: int | None = 1) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": source, "execution_count": count, "outputs": list(outputs)}


def shown(data: dict[str, str]) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def stream(name: str, text: str) -> dict:
    return {"output_type": "stream", "name": name, "text": text}


CELLS = (
    cell("n_seeds: int = 2  # seeds"),
    cell("print()", stream("stdout", "one line " * 30)),
    cell("frame", shown({"text/html": FRAME, "text/plain": "a frame"})),
    cell("frame.style", shown({"text/html": FRAME.replace('border="1" class="dataframe"', 'id="T_1"')})),
    cell("publish()", shown({"text/html": "for JupyterLab", "text/markdown": FIGURE.format(name="fig-margin")})),
    cell("Markdown()", shown({"text/markdown": "The gap of {eq}`eq-gap` is **4.51** ({numref}`fig-margin`)."})),
)


def write_sample(folder: Path, *cells: dict, pages: dict[str, str] | None = None) -> tuple[dict[str, Path], Path]:
    """Write a small book: the finished run of its section, and its pages. Returns both as ``assemble`` takes them."""
    texts = {"index": INDEX, "theory": THEORY, "references": REFERENCES} | (pages or {})
    chapters = [name for name in texts if name != "index"] + ["01_sample"]
    sources, run = folder / "pages", folder / "runs" / "0123456789ab"
    notebook = {
        "cells": [{"cell_type": "markdown", "metadata": {}, "source": "# A sweep"}, *(cells or CELLS)],
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "papermill": {"parameters": {"n_seeds": 2}, "exception": None},
            "labelaug": {"data": True},
        },
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    files = {sources / f"{name}.md": text for name, text in texts.items()}
    files[sources / "_toc.yml"] = yaml.dump(
        {"format": "jb-book", "root": "index", "chapters": [{"file": name} for name in chapters]}
    )
    files[sources / "references.bib"] = BIB
    files[run / "notebook.ipynb"] = json.dumps(notebook)
    files[run / "tables" / "runs.csv"] = "seed\n0\n"
    for name in ("fig-margin", "fig-theory"):
        files[run / "figures" / f"{name}-light.svg"] = SVG.format(colour="#222")
        files[run / "figures" / f"{name}-dark.svg"] = SVG.format(colour="#ddd")
        files[run / "tables" / f"{name}.csv"] = "strength,risk\n0.5,0.1\n"
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copytree(book.PAGES / "_static", sources / "_static", dirs_exist_ok=True)
    return {"01_sample": run}, sources


def build_sample(folder: Path, *cells: dict, pages: dict[str, str] | None = None) -> Path:
    runs, sources = write_sample(folder, *cells, pages=pages)
    source = book.assemble(runs, {"ledger.md": LEDGER}, pages=sources, source=folder / "source")
    return book.build(source, html=folder / "html")


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """Folder of the sample's pages, below a folder with a space and a letter beyond ASCII.

    Built from within a folder whose files have the names of modules that Sphinx imports, and with what macOS leaves
    beside each file on a foreign disk.
    """
    folder, here = tmp_path_factory.mktemp("sample") / "a böok", tmp_path_factory.mktemp("here")
    for name in ("yaml", "json", "jupyter_book", "sphinx", "study"):
        (here / f"{name}.py").write_text("raise SystemExit('from the working folder')")
    for place in ("pages", "pages/_static", "runs/0123456789ab/figures", "runs/0123456789ab/tables"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for name in ("._theory.md", "._study.css", "._fig-margin-light.svg", "._runs.csv", "theory 2.md"):
            (folder / place / name).write_bytes(b"\x00\x05\x16\x07\xff")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(here)
        return build_sample(folder).parent


# ---------------------------------------------------------------------------------------------------------------------
# Assembling and building


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_sample_builds_and_a_second_time_does_nothing(sample, monkeypatch):
    before = stamps(sample)
    assert {"index.html", "theory.html", "01_sample.html", "_sources/01_sample.ipynb"} <= before.keys()
    assert sorted(p.name for p in sample.parent.iterdir()) == ["html", "pages", "runs", "source"]  # no leftovers
    source = sample.parent / "source"
    assert not list(source.rglob("._*")) and not (source / "theory 2.md").exists()
    monkeypatch.setattr(subprocess, "run", None)  # what a build would call
    assert build_sample(sample.parent) == sample / "index.html" and stamps(sample) == before
    changed = {"theory": THEORY + "\nOne more line.\n"}
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        build_sample(sample.parent, pages=changed)
    assert stamps(sample) == before
    write_sample(sample.parent)  # as it was


def test_assemble_mirrors(tmp_path):
    runs, pages = write_sample(tmp_path)
    source = book.assemble(runs, {"ledger.md": "old"}, pages=pages, source=tmp_path / "source")
    first = stamps(source)
    assert {
        "01_sample.ipynb", "_assets/mathjax/tex-chtml.js", "_generated/ledger.md", "_static/study.css", "_toc.yml",
        "figures/01_sample/fig-margin-dark.svg", "index.md", "references.bib", "tables/01_sample/runs.csv",
    } <= first.keys()  # fmt: skip
    (pages / "theory.md").write_text("# Changed")
    (runs["01_sample"] / "tables" / "fig-theory.csv").unlink()
    (source / "no" / "more").mkdir(parents=True)
    (source / "no" / "more" / "page.md").write_text("# Stale")
    book.assemble(runs, {"ledger.md": "new"}, pages=pages, source=source)
    second = stamps(source)
    assert first.keys() - second.keys() == {"tables/01_sample/fig-theory.csv"} and not (source / "no").exists()
    assert {name for name in second if second[name] != first[name]} == {"theory.md", "_generated/ledger.md"}


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "bad λ", "traceback": []}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((cell("1"), cell("raise", ERROR)), "^cell 3 of section 01_sample failed: ValueError: bad λ$"),
        ((cell("1", count=None),), "^cell 2 of section 01_sample was not run; run the section again$"),
    ],
)
def test_assemble_refuses_a_notebook_that_did_not_run_through(tmp_path, cells, message):
    runs, pages = write_sample(tmp_path, *cells)
    with pytest.raises(BookError, match=message):
        book.assemble(runs, {}, pages=pages, source=tmp_path / "source")
    assert not (tmp_path / "source").exists()


def test_assemble_refuses_a_section_without_notebook_or_place(tmp_path):
    runs, pages = write_sample(tmp_path)
    with pytest.raises(BookError, match=r"section 02_more is not in .*_toc.yml; add it there"):
        book.assemble(runs | {"02_more": runs["01_sample"]}, {}, pages=pages, source=tmp_path / "source")
    (runs["01_sample"] / "notebook.ipynb").unlink()
    with pytest.raises(BookError, match=r"section 01_sample has no executed notebook at .*; run it first"):
        book.assemble(runs, {}, pages=pages, source=tmp_path / "source")
    (pages / "_toc.yml").write_text("chapters: 3")
    with pytest.raises(BookError, match=r"_toc\.yml is no table of contents: "):
        book.assemble(runs, {}, pages=pages, source=tmp_path / "source")


# A page with one fault -> what the log says of it. All are built at once, and each alone would fail the build: -W.
FAULTS = {
    "reference": ("{ref}`nowhere`", "undefined label: 'nowhere'"),
    "number": ("{numref}`fig-nowhere`", "undefined label: 'fig-nowhere'"),
    "equation": ("{eq}`eq-nowhere`", "equation not found: eq-nowhere"),
    "statement": ("{prf:ref}`thm-nowhere`", "label 'thm-nowhere' not found"),
    "citation": ("{cite}`nobody`", 'could not find bibtex key "nobody"'),
    "link": ("[there](nowhere.md)", "cross-reference target not found: 'nowhere.md'"),
    "directive": ("```{nonsense}\n```", "Unknown directive type: 'nonsense'"),
    "alt": ("![](figures/01_sample/fig-margin-light.svg)", "the image figures/01_sample/.*-light.svg has no alt text"),
    "figure": (FIGURE.format(name="fig-gone"), "image file not readable: figures/01_sample/fig-gone-dark.svg"),
    "table": (FIGURE.format(name="fig-lost"), "download file not readable: tables/01_sample/fig-lost.csv"),
    "caption": (FIGURE.format(name="fig-margin").replace("\n**", "\n:::\n**", 1), "has no caption"),
    "silent": (FIGURE.format(name="fig-margin").replace(":alt:", ":x:"), "study-figure .* has no alt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def fault_log(tmp_path_factory) -> str:
    """What the build says of a book with all the faults; an earlier success stays as it was."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "html").mkdir()
    (folder / "html" / "index.html").write_text("an earlier success")
    cells = (
        cell("1", shown({"text/markdown": "one line\n\nsee {numref}`fig-missing`"})),
        cell("2", stream("stderr", "RuntimeWarning: overflow")),
        cell("3", shown({"text/markdown": FIGURE.format(name="fig-margin")})),
    )
    pages = {name: f"# Page {name}\n\n{text}\n" for name, (text, _) in FAULTS.items()}
    with pytest.raises(BookError) as caught:
        build_sample(folder, *cells, pages=pages)
    assert [p.name for p in (folder / "html").iterdir()] == ["index.html"]
    assert (folder / "html" / "index.html").read_text() == "an earlier success"
    assert not (folder / "html-unfinished").exists() and "\x1b" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("page", FAULTS)
def test_each_fault_of_a_page_is_a_warning_that_names_it(fault_log, page):
    assert re.search(rf"^{page}\.(md|rst)(:\d+)?: (WARNING|ERROR): .*{FAULTS[page][1]}", fault_log, re.M), fault_log


def test_a_fault_in_a_notebook_is_told_by_cell(fault_log):
    assert "01_sample.ipynb, cell 2, line 2: WARNING: undefined label: 'fig-missing'" in fault_log
    assert "01_sample.ipynb, cell 3, line 2: ERROR: stderr was found in the cell outputs" in fault_log
    assert "index.md" not in fault_log and "theory.md" not in fault_log  # pages without fault


def test_configuration_is_valid():
    settings = yaml.safe_load(book.CONFIG.read_text(encoding="utf-8"))
    validate_yaml(settings, raise_on_errors=True)
    with pytest.raises(Exception, match="is not of type 'string'"):
        validate_yaml(settings | {"title": 3}, raise_on_errors=True)


def test_assets_are_pinned_without_addresses_and_small():
    lock = (book.PAGES / "package-lock.json").read_text()
    packages = json.loads(lock)["packages"]
    wanted = json.loads((book.PAGES / "package.json").read_text())["dependencies"]
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert "http" not in lock and "resolved" not in lock
    files = book.fetch_assets()
    assert {"mathjax/tex-chtml.js", "mathjax/fonts/mathjax-newcm-font/chtml/dynamic/math.js"} <= files.keys()
    assert sum(file.stat().st_size for file in files.values()) < 5e6


def test_assets_that_npm_cannot_install_are_an_error(tmp_path):
    (tmp_path / "package.json").write_text('{"dependencies": {"mathjax": "4.1.3"}}')
    (tmp_path / "package-lock.json").write_text('{"lockfileVersion": 3, "packages": {"": {}}}')  # out of step
    with pytest.raises(BookError, match=r"npm could not install what .*package-lock\.json pins .*network"):
        book.fetch_assets(tmp_path)
    assert not (tmp_path / "node_modules" / ".labelaug-lock.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
# What axe finds in the theme's own markup: (rule, end of the selector). docutils gives its list of references no items.
THEMES_OWN = {("aria-required-children", ".citation-list")}
# Before axe, which takes a second per thousand elements: formulas are MathJax's, three pieces of code stand for all.
THIN = """() => {
  for (const formula of document.querySelectorAll("mjx-container")) formula.replaceChildren();
  for (const code of [...document.querySelectorAll("div.highlight pre")].slice(3)) code.textContent = code.textContent;
}"""
AXE = {"resultTypes": ["violations"], "preload": False}  # it would request the style sheets again
# Lists of what is wrong with a page: requests that leave the machine, errors in the console, mathematics that was not
# rendered or is in error, images without alt text or file, those of this theme hidden or of the other shown, captions
# hidden, boxes that scroll but cannot be reached from the keyboard.
FAULTY = ["outgoing", "errors", "raw", "wrong", "noAlt", "broken", "hidden", "shown", "captions", "unreachable"]
LOOK = """async () => {
  await window.MathJax?.startup?.promise;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const visible = (element) => getComputedStyle(element).display !== "none";
  const theme = document.documentElement.dataset.theme;
  return {
    theme,
    rendered: all("mjx-container").length,
    raw: all(".math").filter((e) => !e.querySelector("mjx-container")).map((e) => e.textContent),
    wrong: all("mjx-merror, [data-mjx-error], mjx-container [style*='color: red']").map((e) => e.outerHTML),
    images: all("img").map((e) => e.src),
    noAlt: all("img:not(.logo__image)").filter((e) => !e.alt.trim()).map((e) => e.src),
    broken: all("img").filter((e) => visible(e) && e.complete && !e.naturalWidth).map((e) => e.src),
    hidden: all(`img.only-${theme}`).filter((e) => !visible(e)).map((e) => e.src),
    shown: all(theme == "dark" ? "img.only-light" : "img.only-dark").filter(visible).map((e) => e.src),
    captions: all("figcaption").filter((e) => !visible(e)).map((e) => e.textContent),
    unreachable: all("article *").filter((e) => /auto|scroll/.test(getComputedStyle(e).overflowX)
      && e.scrollWidth > e.clientWidth && e.tabIndex < 0 && !e.querySelector("a, [tabindex='0']"))
      .map((e) => e.outerHTML),
    excess: document.documentElement.scrollWidth - window.innerWidth,
    links: all("a[href]").map((e) => e.href),
    ids: all("[id]").map((e) => e.id),
    hints: all("link[rel~=preconnect], link[rel~=dns-prefetch], link[rel~=prefetch]").map((e) => e.href),
  };
}"""


@pytest.fixture(scope="module")
def browser(chromium) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield browser
        browser.close()


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob") or parts.hostname == "127.0.0.1"


def open_pages(browser: Browser, urls: list[str], *, width: int, scheme: str) -> dict[str, dict]:
    """Open each page; requests that would leave the machine are noted and stopped. Returns: url -> what was seen."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen: dict[str, dict] = {}
    outgoing, errors = [], []

    def gate(route):
        if is_local(route.request.url):
            route.continue_()
        else:
            outgoing.append(route.request.url)
            route.abort()

    context.route("**/*", gate)
    page = context.new_page()
    page.on("websocket", lambda socket: outgoing.append(socket.url))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    page.on("response", lambda response: errors.append(f"{response.status}: {response.url}") if not response.ok else 0)
    for url in urls:
        outgoing.clear()
        errors.clear()
        page.goto(url)
        facts = page.evaluate(LOOK)
        page.evaluate(THIN)
        violations = Axe().run(page, options=AXE).response["violations"]
        axe = [
            f"{violation['id']}: {node['target'][-1]}"
            for violation in violations
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
            if not any(violation["id"] == rule and node["target"][-1].endswith(end) for rule, end in THEMES_OWN)
        ]
        seen[url] = facts | {"outgoing": outgoing + facts["hints"], "errors": list(errors), "axe": axe}
    context.close()
    return seen


def pages(html: Path) -> list[Path]:
    """The pages of a book without the one that only leads to the first."""
    return [page for page in sorted(html.glob("*.html")) if 'http-equiv="Refresh"' not in page.read_text("utf-8")]


def dead_links(seen: dict[str, dict]) -> list[str]:
    """Links to files that do not exist, or to places that a page among those seen does not have."""
    dead = []
    for url, facts in seen.items():
        for link in facts["links"]:
            target, place = urldefrag(link)
            if urlsplit(target).scheme == "file" and not Path(url2pathname(urlsplit(target).path)).is_file():
                dead.append(f"{url}: {link}")
            elif place and target in seen and unquote(place) not in seen[target]["ids"]:
                dead.append(f"{url}: {link}")
    return dead


@pytest.fixture(scope="module")
def serve() -> Iterator:
    """A function that serves a folder over http on this machine and returns its address."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Keep the test's output clean."""

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Pages:
    """What holds for each page of a book, seen wide, light and as a file, then narrow, dark and over http."""

    @pytest.fixture(scope="class")
    def wide(self, html, browser) -> dict[str, dict]:
        return open_pages(browser, [page.as_uri() for page in pages(html)], width=1280, scheme="light")

    @pytest.fixture(scope="class")
    def narrow(self, html, browser, serve) -> dict[str, dict]:
        address = serve(html)
        urls = [f"{address}/{page.name}" for page in pages(html)]
        return open_pages(browser, urls, width=390, scheme="dark")

    @pytest.fixture(scope="class", params=["wide, light, file", "narrow, dark, http"])
    def seen(self, request, wide, narrow) -> dict[str, dict]:
        return wide if request.param.startswith("wide") else narrow

    @pytest.mark.parametrize("kind", [*FAULTY, "axe"])
    def test_nothing_is_wrong(self, seen, kind):
        assert {url: facts[kind] for url, facts in seen.items() if facts[kind]} == {}

    def test_theme_follows_the_reader(self, wide, narrow):
        assert {facts["theme"] for facts in wide.values()} == {"light"}
        assert {facts["theme"] for facts in narrow.values()} == {"dark"}

    def test_no_page_scrolls_sideways(self, seen):
        assert {url: facts["excess"] for url, facts in seen.items() if facts["excess"] > 0} == {}

    def test_mathematics_and_figures_are_there(self, seen):
        assert sum(facts["rendered"] for facts in seen.values()) > 5
        assert sum(len(facts["images"]) for facts in seen.values()) > 2 * len(seen)  # two logos a page, and figures

    def test_links_and_downloads_lead_somewhere(self, wide):
        assert dead_links(wide) == []
        kinds = {Path(link).suffix for facts in wide.values() for link in facts["links"]}
        assert {".csv", ".ipynb"} <= kinds

    def test_index_opens_the_book(self, html, browser):
        page = browser.new_page()
        page.goto((html / "index.html").as_uri())
        page.locator("article h1").wait_for()
        page.close()

    @pytest.mark.parametrize("over", ["http", "file"])
    def test_search_finds(self, html, browser, serve, over):
        page, search = browser.new_page(), f"{serve(html) if over == 'http' else html.as_uri()}/search.html?q="
        page.goto(f"{search}smoothing")
        page.wait_for_selector("#search-results li a")
        page.locator("#search-results li a").first.click()
        page.wait_for_url(lambda address: "search.html" not in address)
        page.goto(f"{search}xyzzy")
        page.get_by_text("did not match any documents").wait_for()
        page.close()


@pytest.mark.browser
class TestSample(Pages):
    @pytest.fixture(scope="class")
    def html(self, sample) -> Path:
        return sample


@pytest.mark.browser
class TestRealBook(Pages):
    @pytest.fixture(scope="class")
    def html(self, built_book) -> Path:
        return built_book

    def test_each_section_can_be_downloaded_as_it_was_run(self, html):
        sections = sorted(html.glob("_sources/*.ipynb"))
        assert [path.stem for path in sections] == sorted(path.stem for path in book.PROJECT.glob("notebooks/*.ipynb"))
        for path in sections:
            assert any(cell.get("outputs") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.mark.browser
def test_the_browser_tests_see_each_fault(browser, tmp_path):
    """Each check of ``Pages`` on a page that has its fault; requests to .invalid are stopped and could go nowhere."""
    (tmp_path / "bad.html").write_text(
        """<!doctype html><html lang="en" data-theme="light"><title>Bad</title>
        <link rel="preconnect" href="https://early.invalid/"><script src="https://cdn.invalid/x.js"></script>
        <style>@import url(https://style.invalid/x.css); .only-light, figcaption { display: none }</style>
        <img src="gone.svg" alt="gone"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
        <img class="only-dark" alt="b" src="b.svg"><img class="only-light" alt="a" src="a.svg">
        <figure><figcaption>A caption</figcaption></figure>
        <article><div style="overflow-x: auto; width: 9em"><p style="width: 20em">far</p></div></article>
        <p style="color: #ccc; width: 3000px">faint</p><span class="math">\\(x\\)</span>
        <mjx-container><span style="color: red">\\foo</span></mjx-container>
        <a href="nowhere.html">dead</a><a href="bad.html#nowhere">lost</a><a href="bad.html#here" id="here">alive</a>"""
    )
    url = (tmp_path / "bad.html").as_uri()
    seen = open_pages(browser, [url], width=390, scheme="light")
    assert set(seen[url]["outgoing"]) == {
        "https://early.invalid/", "https://cdn.invalid/x.js", "https://style.invalid/x.css",
    }  # fmt: skip
    assert [kind for kind in FAULTY if not seen[url][kind]] == []
    assert seen[url]["excess"] > 0 and any("color-contrast" in fault for fault in seen[url]["axe"])
    assert [fault.rsplit("/", 1)[1] for fault in dead_links(seen)] == ["nowhere.html", "bad.html#nowhere"]
