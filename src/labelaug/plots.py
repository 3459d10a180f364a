"""All figures: one look, one colour a method, a light and a dark version of each, caption and data beside it."""

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.figure import Figure

from labelaug.results import Section

# Okabe and Ito's colours, told apart with the common colour deficiencies; markers and dashes carry them in greyscale.
LIGHT = {"erm": "#3d3d3d", "weight decay": "#0072b2", "label smoothing": "#c04f00", "mixup": "#007a5a"}
DARK = {"erm": "#cfcfcf", "weight decay": "#5ab4e5", "label smoothing": "#f2995a", "mixup": "#3fd0a4"}
SERIES = ["#0072b2", "#c04f00", "#009e73", "#cc79a7", "#b8860b", "#7a5195"]  # where lines are not methods; both themes
MARKERS = {"erm": "D", "weight decay": "o", "label smoothing": "s", "mixup": "^"}
STRENGTH = {"weight decay": "weight decay λ", "label smoothing": "smoothing ε", "mixup": "mixup α of Beta(α, α)"}
THEMES = {
    "light": {"background": "#ffffff", "ink": "#222222", "grid": "#dddddd", "palette": LIGHT},
    "dark": {"background": "#121212", "ink": "#e6e6e6", "grid": "#3a3a3a", "palette": DARK},
}
MARKS = r"([\\`*_{}\[\]()<>#+|$~&^=@!-])"  # what MyST, inside a line, may take for more than itself


@contextmanager
def theme(name: str):
    """Within the block figures are drawn in theme "light" or "dark"."""
    colours = THEMES[name]
    rc = {
        "figure.facecolor": colours["background"],
        "axes.facecolor": colours["background"],
        "savefig.facecolor": colours["background"],
        "axes.edgecolor": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "text.color": colours["ink"],
        "xtick.color": colours["ink"],
        "ytick.color": colours["ink"],
        "grid.color": colours["grid"],
        "legend.frameon": False,
        "lines.linewidth": 2,
        "font.size": 11,
        "axes.labelsize": 11,
        "axes.titlesize": 11,
        "svg.hashsalt": "labelaug",
    }
    with sns.axes_style("whitegrid"), plt.rc_context(rc):
        yield


def _mode() -> str:
    return "dark" if plt.rcParams["figure.facecolor"] == THEMES["dark"]["background"] else "light"


def colour(method: str) -> str:
    """The colour of a method in the theme in force; "ink" is the colour of text."""
    colours = THEMES[_mode()]
    return colours["ink"] if method == "ink" else colours["palette"][method]


def figure_text(name: str) -> str:
    """A name that comes from data, as matplotlib is to draw it: letter by letter, its dollars no mathematics.

    For labels, ticks and titles; from a legend matplotlib leaves out what begins with an underscore.
    """
    return name.replace("$", r"\$")


def page_text(name: str) -> str:
    """A name that comes from data, as MyST is to show it, in a caption or a cell: letter by letter, no markup."""
    return re.sub(MARKS, r"\\\1", name)


def publish(
    draw: Callable[[], Figure], section: Section, *, name: str, caption: str, alt: str, data: str | Sequence[str]
) -> None:
    """Draw a figure in both themes, file it with its section, and show it once.

    Shown are two forms of one output: HTML for a live notebook, a ``study-figure`` directive for the book.

    Args: draw: makes the figure anew at each call; name: label, "fig-..."; caption: the finding, with n and the kind of
        interval (MyST); alt: what the picture shows, one line; data: tables of the section that hold the numbers.
    Raises: ValueError if caption or alt text is empty, or a table was not written.
    """
    tables = [data] if isinstance(data, str) else list(data)
    if not caption.strip() or not alt.strip():
        raise ValueError(f"{name} needs a caption and an alt text")
    for table in tables:
        if not (section.folder / "tables" / f"{table}.csv").exists():
            raise ValueError(f"{name} names the table {table!r}, which section {section.name} has not written")
    images = {}
    for mode in THEMES:
        with theme(mode):
            figure = draw()
            images[mode] = _svg(figure)
            plt.close(figure)
    folder = section.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for mode, image in images.items():
        (folder / f"{name}-{mode}.svg").write_bytes(image)
    alt, caption = " ".join(alt.split()), " ".join(caption.split())
    csv = [f"tables/{section.name}/{table}.csv" for table in tables]
    directive = "\n".join(
        [
            f":::{{study-figure}} figures/{section.name}/{name}-light.svg",
            f":name: {name}",
            f":dark: figures/{section.name}/{name}-dark.svg",
            f":data: {' '.join(csv)}",
            f":alt: {json.dumps(alt, ensure_ascii=False)}",
            "",
            caption,
            ":::",
        ]
    )
    source = "data:image/svg+xml;base64," + base64.b64encode(images["light"]).decode()
    read = re.sub(rf"\\{MARKS}", r"\1", caption)  # as page_text found it: here no markup is read
    links = ", ".join(html.escape(str(Path("tables") / f"{table}.csv")) for table in tables)
    page = (
        f'<figure><img alt="{html.escape(alt)}" src="{source}" style="max-width:100%">'
        f"<figcaption>{html.escape(read)} <em>Data: {links}</em></figcaption></figure>"
    )
    display({"text/html": page, "text/markdown": directive, "text/plain": f"{name}: {alt}"}, raw=True)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None}, dpi=150)
    return buffer.getvalue()


def seed_lines(axis, frame: pd.DataFrame, *, x: str, method: str, label: str | None = None, **line) -> None:
    """One method's ``value`` against ``x``: a thin line a seed, their mean thick, a band of ± 1 std (n - 1)."""
    ink = line.pop("color", None) or colour(method)
    for _, one in frame.groupby("seed"):
        axis.plot(one[x], one["value"], color=ink, lw=0.6, alpha=0.35)
    mean, std = (frame.groupby(x)["value"].agg(kind) for kind in ("mean", "std"))
    axis.fill_between(mean.index, mean - std, mean + std, color=ink, alpha=0.18, lw=0)
    style = {"marker": MARKERS[method], "ms": 4, "label": label} | line
    axis.plot(mean.index, mean, color=ink, **style)


def strength_panels(
    frame: pd.DataFrame,
    *,
    ylabel: str,
    rows: str | None = None,
    log: bool = False,
    baselines: float | Mapping[str, float] | None = None,
    exact: pd.DataFrame | None = None,
) -> Figure:
    """``value`` against strength, one panel a method and one row of panels a value of ``rows``.

    Args: frame: columns method, strength, seed, value (and ``rows``); baselines: a dashed line (a bound, chance),
        the same everywhere or one a row; exact: method, strength, value of the exact minimisers, drawn as a dashed
        curve. The dotted line is ERM, strength 0.
    """
    figure, panels = _strength_grid(frame, ylabel=ylabel, rows=rows, log=log)
    for axis, group, method, one in panels:
        seed_lines(axis, one, x="strength", method=method)
        erm = one.loc[one["strength"] == 0, "value"].mean()
        axis.axhline(erm, color=colour("erm"), ls=":", lw=1.2)
        axis.annotate("ERM", (1, erm), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=9)
        if baselines is not None:
            level = baselines[group] if isinstance(baselines, Mapping) else baselines
            axis.axhline(level, color=colour("ink"), ls="--", lw=1.2)
        if exact is not None:
            curve = exact[exact["method"] == method].sort_values("strength")
            axis.plot(curve["strength"], curve["value"], color=colour("ink"), ls="--", lw=1.6, zorder=5)
    figure.tight_layout()
    return figure


def strength_family(
    frame: pd.DataFrame,
    *,
    by: str,
    bylabel: str,
    ylabel: str,
    log: bool = False,
    rows: str | None = None,
    exact: pd.DataFrame | None = None,
) -> Figure:
    """Mean ``value`` against strength, panels as in strength_panels, one line a value of ``by``; band ± 1 std.

    Args: exact: method, strength, value, ``by`` (and ``rows``) of the exact minimisers, drawn as dashed curves.
    """
    values = list(dict.fromkeys(frame[by]))
    shades = sns.color_palette("viridis" if _mode() == "light" else "plasma_r", len(values) + 1)[: len(values)]
    figure, panels = _strength_grid(frame, ylabel=ylabel, rows=rows, log=log)
    for axis, group, method, one in panels:
        for shade, value, marker in zip(shades, values, "osD^vP*X", strict=False):
            if exact is not None:
                chosen = (exact["method"] == method) & (exact[by] == value)
                chosen = chosen if rows is None else chosen & (exact[rows] == group)
                curve = exact[chosen].sort_values("strength")
                axis.plot(curve["strength"], curve["value"], color=colour("ink"), ls="--", lw=1, zorder=5)
            line = one[one[by] == value].groupby("strength")["value"]
            mean, std = line.mean(), line.std()
            axis.fill_between(mean.index, mean - std, mean + std, color=shade, alpha=0.15, lw=0)
            label = value if isinstance(value, str) else f"{value:g}"
            axis.plot(mean.index, mean, color=shade, marker=marker, ms=3.5, lw=1.6, label=label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(
        handles, labels, title=bylabel, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(values), fontsize=10
    )
    return figure


def _strength_grid(frame, *, ylabel, rows, log):
    """The empty grid of panels, and for each panel its axis, row, method and rows of the frame."""
    methods = [m for m in STRENGTH if m in set(frame["method"])]
    groups = [None] if rows is None else list(dict.fromkeys(frame[rows]))
    figure, axes = plt.subplots(
        len(groups), len(methods), figsize=(3.0 * len(methods), 2.7 * len(groups)), sharey="row", squeeze=False
    )
    panels = []
    for i, group in enumerate(groups):
        part = frame if group is None else frame[frame[rows] == group]
        for axis, method in zip(axes[i], methods, strict=True):
            axis.set_yscale("log" if log else "linear")
            axis.set_xlabel(STRENGTH[method] if i == len(groups) - 1 else "")
            panels.append((axis, group, method, part[part["method"] == method]))
        row = None if group is None else figure_text(group)
        axes[i][0].set_ylabel("\n".join(filter(None, (row, ylabel))))
    figure.align_ylabels()
    return figure, panels


def rate_epoch_maps(frame: pd.DataFrame, *, label: str, panels: Sequence[str], fmt: str = ".2g", log=True) -> Figure:
    """Mean ``value`` over learning rate (rows) and epochs (columns), one map a value of column ``panel``, one scale."""
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(7.8, 2.7 * lines), sharex=True, sharey=True, squeeze=False)
    tables = {p: frame[frame["panel"] == p].pivot_table("value", "learning_rate", "epoch").iloc[::-1] for p in panels}
    numbers = np.concatenate([t.to_numpy().ravel() for t in tables.values()])
    floor = max(float(numbers.max()) * 1e-3, 1e-12)
    scale = plt.matplotlib.colors.LogNorm(floor, numbers.max()) if log else plt.Normalize(numbers.min(), numbers.max())
    for i, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        sns.heatmap(
            tables[panel].clip(lower=floor) if log else tables[panel],
            ax=axis,
            annot=tables[panel],
            fmt=fmt,
            annot_kws={"fontsize": 9},
            cmap="cividis",
            norm=scale,
            cbar=False,
        )
        axis.set_title(panel)
        axis.set_xlabel("epochs" if i >= len(panels) - 2 else "")
        axis.set_ylabel("learning rate" if i % 2 == 0 else "")
        axis.set_yticks(np.arange(len(tables[panel])) + 0.5, [f"{v:g}" for v in tables[panel].index], rotation=0)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.colorbar(plt.cm.ScalarMappable(scale, "cividis"), ax=axes, label=label, fraction=0.04, pad=0.02)
    return figure
