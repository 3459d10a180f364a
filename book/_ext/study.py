"""What the pages need beyond Sphinx: figures in two themes with their data, alt text as a rule, local assets.

```{study-figure} figures/03_binary_images/margin-light.svg
:name: fig-margin
:dark: figures/03_binary_images/margin-dark.svg
:data: tables/03_binary_images/margin.csv
:alt: "What a reader who cannot see the picture has to know, on one line, as a JSON string."
The caption, a paragraph in the markup of the page.
```
"""

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.utils import get_source_line
from sphinx import addnodes
from sphinx.directives.patches import Figure
from sphinx.util import logging

LOG = logging.getLogger(__name__)
# Folder of the assembled sources with what pages load. Not _static, whose every script Jupyter Book puts on each page.
ASSETS = "_assets"


class StudyFigure(Figure):
    """One numbered figure: the image for the light theme, that for the dark one, a caption and links to the data.

    Options: ``name`` (label), ``dark`` (image), ``alt`` (of both images), ``data`` (paths of CSV files, separated by
    spaces; optional). Paths are relative to the page; Sphinx warns of missing files.
    """

    option_spec = {  # noqa: RUF012
        "name": directives.unchanged_required,
        "dark": directives.uri,
        "alt": directives.unchanged_required,
        "data": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        missing = [option for option in ("name", "dark", "alt") if not self.options.get(option)]
        if missing or not self.content:
            raise self.error(f"study-figure {self.arguments[0]} has no {', '.join(missing) or 'caption'}")
        dark, data = self.options.pop("dark"), self.options.pop("data", "")
        figure, *messages = super().run()
        light = figure[0]
        other = light.deepcopy()
        other["uri"] = dark
        light["classes"].append("only-light")
        other["classes"].append("only-dark")
        # The theme hides a caption that is a sibling of the hidden image: hence the box, which also scrolls on phones.
        figure[0] = nodes.container("", light, other, classes=["study-figure"])
        if data:
            legend = figure[-1] if isinstance(figure[-1], nodes.legend) else nodes.legend()
            legend += self.links(data.split())
            if legend.parent is None:
                figure += legend
        return [figure, *messages]

    def links(self, paths: list[str]) -> nodes.paragraph:
        """The line "data of this figure (CSV): a, b" with a download for each path."""
        line = nodes.paragraph("", "Data of this figure (CSV): ", classes=["study-data"])
        for i, path in enumerate(paths):
            line += [nodes.Text(", ")] * (i > 0)
            text = nodes.literal("", path.rsplit("/", 1)[-1], classes=["xref", "download"])
            line += addnodes.download_reference("", "", text, reftarget=path)
        return line


def require_alt(app, doctree, docname) -> None:
    """Warn of each image without alt text; what a notebook offers and the page does not show has gone by now."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip():
            LOG.warning("the image %s has no alt text", image["uri"], location=(docname, get_source_line(image)[1]))


def setup(app) -> dict:
    app.set_html_assets_policy("always")  # titles in the sidebar hold mathematics, so each page needs MathJax
    app.connect("config-inited", lambda app, config: config.html_static_path.append(ASSETS))
    app.connect("doctree-resolved", require_alt)
    app.add_directive("study-figure", StudyFigure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
