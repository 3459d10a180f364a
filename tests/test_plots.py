"""Figures: both themes filed, one output of two kinds, caption and alt text demanded, colours legible."""

import html
import json
import math
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from markdown_it.renderer import RendererHTML
from matplotlib import pyplot as plt
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

from labelaug import paths, plots, results

FRAME = pd.DataFrame(
    [
        {"method": method, "strength": strength, "seed": seed, "value": strength + 0.1 * seed + 0.1, "case": case}
        for method in plots.STRENGTH
        for strength in (0.0, 0.5, 1.0)
        for seed in range(3)
        for case in (0.0, 1.0)
    ]
)


@pytest.fixture
def section(tmp_path, monkeypatch):
    monkeypatch.setenv("LABELAUG_RUN_DIR", str(tmp_path))
    opened = results.section("02_synthetic_sweep")
    opened.write("points", FRAME, description={}, seconds=0.0)
    return opened


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: outputs.append(bundle))
    return outputs


def one_line():
    figure, axis = plt.subplots()
    axis.plot([0, 1], [0, 1], color=plots.colour("mixup"))
    axis.set_xlabel("x", color=plots.colour("ink"))
    return figure


def test_publish_files_both_themes_and_shows_one_output(section, shown):
    alt = 'A line: it rises, "quoted".'
    plots.publish(one_line, section, name="fig-line", caption="It rises, n = 2.", alt=alt, data="points")
    light, dark = ((section.folder / "figures" / f"fig-line-{mode}.svg").read_text() for mode in ("light", "dark"))
    assert plots.LIGHT["mixup"] in light and plots.DARK["mixup"] not in light
    assert plots.DARK["mixup"] in dark and plots.THEMES["dark"]["background"] in dark
    (bundle,) = shown
    lines = bundle["text/markdown"].splitlines()
    assert lines[0] == ":::{study-figure} figures/02_synthetic_sweep/fig-line-light.svg"
    assert ":data: tables/02_synthetic_sweep/points.csv" in lines
    assert json.loads(next(line for line in lines if line.startswith(":alt:")).removeprefix(":alt: ")) == alt
    assert lines[-2:] == ["It rises, n = 2.", ":::"]
    assert "It rises" in bundle["text/html"] and "tables/points.csv" in bundle["text/html"]
    assert not plt.get_fignums()  # nothing left open


def test_the_same_figure_is_the_same_file(section, shown):
    for name in ("fig-a", "fig-b"):
        plots.publish(one_line, section, name=name, caption="c", alt="a", data="points")
    first, second = ((section.folder / "figures" / f"{name}-light.svg").read_bytes() for name in ("fig-a", "fig-b"))
    assert first == second


@pytest.mark.parametrize(
    "missing, message",
    [({"caption": " "}, "needs a caption"), ({"alt": ""}, "needs a caption"), ({"data": "no"}, "has not written")],
)
def test_publish_refuses(section, shown, missing, message):
    given = {"caption": "c", "alt": "a", "data": "points"} | missing
    with pytest.raises(ValueError, match=message):
        plots.publish(one_line, section, name="fig-line", **given)
    assert not shown and not (section.folder / "figures").exists()


def test_bands_are_one_standard_deviation_of_the_seeds():
    figure, axis = plt.subplots()
    one = FRAME[(FRAME["method"] == "mixup") & (FRAME["case"] == 0)]
    plots.seed_lines(axis, one, x="strength", method="mixup")
    band = axis.collections[0].get_paths()[0].vertices
    at_zero = one[one["strength"] == 0]["value"]
    low, high = band[band[:, 0] == 0][:, 1].min(), band[band[:, 0] == 0][:, 1].max()
    assert math.isclose(high - low, 2 * np.std(at_zero, ddof=1), rel_tol=1e-9)
    assert not math.isclose(high - low, 2 * np.std(at_zero), rel_tol=1e-3)  # n - 1, not n
    assert len(axis.lines) == 3 + 1
    plt.close(figure)


def test_panels_by_method_and_row():
    frame = FRAME.assign(row="row " + FRAME["case"].astype(str))
    figure = plots.strength_panels(frame, ylabel="v", rows="row", baselines={"row 0.0": 0.2, "row 1.0": 0.3})
    assert len(figure.axes) == 6
    dashed = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] for axis in figure.axes]
    assert dashed == [[0.2]] * 3 + [[0.3]] * 3
    plt.close(figure)
    family = plots.strength_family(FRAME, by="case", bylabel="case", ylabel="v")
    assert [text.get_text() for text in family.legends[0].get_texts()] == ["0", "1"]
    plt.close(family)


def test_maps_put_means_into_their_cells():
    frame = pd.DataFrame(
        [
            {"panel": panel, "learning_rate": rate, "epoch": epoch, "seed": seed, "value": rate * epoch + seed}
            for panel in ("ERM", "mixup")
            for rate in (0.1, 1.0)
            for epoch in (10, 30)
            for seed in (0, 2)
        ]
    )
    figure = plots.rate_epoch_maps(frame, label="v", panels=["ERM", "mixup"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["11", "31", "2", "4"]  # the largest learning rate on top
    plt.close(figure)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("mode", plots.THEMES)
def test_colours_stand_out_from_their_background(mode):
    """WCAG asks for a contrast of 3 for graphical objects and 4.5 for text."""
    ground = luminance(plots.THEMES[mode]["background"])
    for name, colour in (*plots.THEMES[mode]["palette"].items(), ("ink", plots.THEMES[mode]["ink"])):
        bright, dim = sorted((luminance(colour), ground), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) > (4.5 if name == "ink" else 3), name


def test_exact_curves_stand_in_the_panel_of_their_method():
    exact = pd.DataFrame(
        [
            {"method": method, "strength": strength, "value": 10.0 * i + strength + case, "case": case}
            for i, method in enumerate(plots.STRENGTH)
            for strength in (1.0, 0.5)
            for case in (0.0, 1.0)
        ]
    )
    single = exact[exact["case"] == 0.0]
    for i, axis in enumerate(plots.strength_panels(FRAME, ylabel="v", exact=single).axes):
        (curve,) = [line for line in axis.lines if line.get_zorder() == 5]
        assert list(curve.get_xdata()) == [0.5, 1.0] and list(curve.get_ydata()) == [10 * i + 0.5, 10 * i + 1.0]
    family = plots.strength_family(FRAME, by="case", bylabel="case", ylabel="v", exact=exact)
    for i, axis in enumerate(family.axes[: len(plots.STRENGTH)]):
        ends = sorted(line.get_ydata()[0] for line in axis.lines if line.get_zorder() == 5)
        assert ends == [10 * i + 0.5, 10 * i + 1.5]
    plt.close("all")


NAMES = [
    r"$\frac$",
    "a $ and a $",
    r"a\$b",
    "<script>alert(1)</script>",
    "a|b",
    "{{x}}",
    "_one_ **two** `three`",
    "[link](https://example.org){.class}",
    "&lt; &amp; 1 < 2",
    "{doc}`index` @cite ^up^ ~down~ =marked=",
    "![image](x.svg) <!-- note -->",
    "aquarium_fish",
    "שלום, עולם",
    "- 1. # plain + words",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_from_data_is_text_in_a_figure(name, tmp_path):
    """As an axis label, a tick and a panel's row; the SVG's own text is the name, letter by letter."""
    frame = FRAME.assign(pair=name)

    def words(figure):
        with plt.rc_context({"svg.fonttype": "none"}):
            figure.savefig(tmp_path / "figure.svg")
        plt.close(figure)
        return [
            "".join(node.itertext()) for node in ElementTree.parse(tmp_path / "figure.svg").iter() if "text" in node.tag
        ]

    figure, axis = plt.subplots()
    axis.plot([0, 1])
    axis.set(xlabel=plots.figure_text(name), title=f"{plots.figure_text(name)}, $x^2$")  # drawn in pieces
    axis.set_xticks([0.5], [plots.figure_text(name)])
    found = words(figure)
    assert found.count(name) == 2
    assert name in words(plots.strength_panels(frame, ylabel="", rows="pair"))
    assert name in words(plots.strength_family(frame, by="case", bylabel="", ylabel="", rows="pair"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_from_data_is_text_on_a_page(name, section, shown):
    """In a caption between mathematics and emphasis of our own, which stay what they are; in the live form too."""
    caption = f"{plots.page_text(name)}: *gap* at $x^2$, {plots.page_text(name)}."
    plots.publish(one_line, section, name="fig-line", caption=caption, alt="A line.", data="points")
    (bundle,) = shown
    extensions = {"amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"}  # those of _config.yml
    parser = create_md_parser(MdParserConfig(enable_extensions=extensions), RendererHTML)
    (inline,) = [t for t in parser.parse(bundle["text/markdown"].splitlines()[-2]) if t.type == "inline"]
    kinds = [token.type for token in inline.children]
    assert set(kinds) <= {"text", "text_special", "em_open", "em_close", "math_inline"}, kinds
    assert kinds.count("math_inline") == 1 and kinds.count("em_open") == 1
    assert "".join(token.content for token in inline.children) == f"{name}: gap at x^2, {name}."
    assert html.unescape(bundle["text/html"].split("<figcaption>")[1]).startswith(f"{name}: *gap* at $x^2$, {name}.")


def test_marks_are_what_the_page_reads():
    """The control: without it some of these names are mathematics, HTML, emphasis or a role."""
    extensions = {"amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"}
    parser = create_md_parser(MdParserConfig(enable_extensions=extensions), RendererHTML)
    kinds = {token.type for name in NAMES for token in parser.parse(f"A {name}.")[1].children}
    assert kinds >= {
        "math_inline",
        "html_inline",
        "em_open",
        "strong_open",
        "code_inline",
        "link_open",
        "myst_role",
        "image",
    }


def test_the_section_on_pairs_shows_class_names_as_text():
    """The one section whose classes a reader names writes no title of a pair but through these functions."""
    cells = json.loads((paths.NOTEBOOKS / "03_binary_images.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert code.count("plots.page_text(title)") == 5 and code.count("plots.figure_text(pair[") == 2
    assert "{title}" not in code and 'label(pair["title"]' not in code and "{pair['title']" not in code
    assert code.count('escape="html"') == 2  # pandas' styled tables escape nothing by themselves
