"""Charts of trainings and measurements, drawn by matplotlib, which is imported when one is drawn."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import missing_extra

Line = Literal["solid", "dashed", "dotted"]


@dataclass(frozen=True)
class Series:
    """One curve: a label, and values at steps."""

    label: str
    steps: tuple[int | float, ...]
    values: tuple[int | float, ...]
    line: Line = "solid"
    colour: int | None = None
    """Which of the plain colours; None: that of its place among the curves."""


@dataclass(frozen=True)
class Panel:
    """One chart of a few curves; `ordered` curves are shades from first to last."""

    title: str
    unit: str
    series: tuple[Series, ...]
    ordered: bool = False
    over: str = "optimizer steps"
    """What the curves run over."""
    log: Literal["", "x", "xy"] = ""
    """Axes on which equal steps multiply; x by two, as context lengths do."""


@dataclass(frozen=True)
class Theme:
    """Colours of a chart."""

    ink: str
    grid: str
    colours: tuple[str, ...]
    shades: tuple[float, float]
    """Part of the viridis scale for ordered curves, first to last."""


THEMES = {
    "light": Theme("#52514e", "#e4e3df", ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#4a3aa7"), (0.0, 0.82)),
    "dark": Theme("#c3c2b7", "#3a3937", ("#3987e5", "#e0703f", "#25a97b", "#d9960f", "#9085e9"), (0.3, 1.0)),
}


def _new_figure(width: float, height: float, **options: Any) -> Any:
    """An empty matplotlib figure, drawn by Agg, with no window. Raises MissingExtraError when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "train", "A report") from error
    figure = Figure(figsize=(width, height), layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def colours(panel: Panel, theme: str) -> list[str]:
    """One for each curve: a few plain ones, or shades."""
    count = len(panel.series)
    plain = THEMES[theme].colours
    if not panel.ordered and max((own.colour or 0 for own in panel.series), default=0) < len(plain) >= sum(own.colour is None for own in panel.series):
        return [plain[place if own.colour is None else own.colour] for place, own in enumerate(panel.series)]
    import matplotlib
    from matplotlib.colors import to_hex

    low, high = THEMES[theme].shades
    return [to_hex(matplotlib.colormaps["viridis"](low + (high - low) * place / max(count - 1, 1))) for place in range(count)]


def _draw(axes: Any, panel: Panel, theme: str) -> None:
    look = THEMES[theme]
    for series, colour in zip(panel.series, colours(panel, theme), strict=True):
        marker = "o" if len(series.steps) <= 25 and series.line == "solid" else None
        style = {"solid": "-", "dashed": "--", "dotted": ":"}[series.line]
        axes.plot(series.steps, series.values, style, color=colour, linewidth=1.8, marker=marker, markersize=4 if len(series.steps) > 1 else 8, label=series.label)
    axes.set_facecolor("none")
    axes.grid(axis="y", color=look.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=look.ink, labelsize=9, length=0)
    axes.margins(x=0.06 if any(len(series.steps) == 1 for series in panel.series) else 0.02, y=0.12)
    if not panel.log and all(float(step).is_integer() for series in panel.series for step in series.steps):
        axes.xaxis.set_major_locator(_whole_numbers())
    if panel.over != Panel.over:
        axes.set_xlabel(panel.over, fontsize=9, color=look.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(look.grid)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short_number(value))
    if panel.log:
        _multiply(axes, panel)
    elif panel.unit == "share":
        axes.set_ylim(0, 1.02)
    elif all(value >= 0 for series in panel.series for value in series.values):
        axes.set_ylim(bottom=0)


def _multiply(axes: Any, panel: Panel) -> None:
    """Logarithmic axes: over context lengths a tick at each power of two, 1024 as 1k; up the values, if asked for, 1, 2, 5, 10 …"""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    steps = sorted({step for series in panel.series for step in series.steps})
    axes.set_xticks(steps[:: 1 + len(steps) // 9], [f"{step / 1024:g}k" if step >= 1024 else f"{step:g}" for step in steps[:: 1 + len(steps) // 9]])
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.log == "xy":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    else:
        axes.set_ylim(bottom=0)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True)


def short_number(value: int | float) -> str:
    """1500 as 1.5k, 0.00002 as 2e-5."""
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _drawn(figure: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()


def draw_curves(rows: Sequence[tuple[str, Sequence[Panel]]]) -> bytes:
    """One PNG of rows of charts, each row with words before its charts' titles. Raises MissingExtraError without matplotlib."""
    columns = max((len(panels) for _, panels in rows), default=1)
    figure = _new_figure(4.4 * columns, 3.1 * max(len(rows), 1), dpi=110, facecolor="white")
    grid = figure.add_gridspec(max(len(rows), 1), columns)
    for row, (words, panels) in enumerate(rows):
        for column, panel in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            _draw(axes, panel, "light")
            title = f"{words}: {panel.title.lower()}" if words else panel.title
            axes.set_title(f"{title}, {panel.unit}".removesuffix(", "), fontsize=10, loc="left", color="#0b0b0b")
            if len(panel.series) > 1:
                axes.legend(fontsize=7, frameon=False, ncols=1 + len(panel.series) // 5)
    return _drawn(figure, format="png")


def draw_inline(panel: Panel, theme: str) -> str:
    """The chart alone, for a light or dark ground, as the address of a vector drawing. Raises MissingExtraError without matplotlib."""
    figure = _new_figure(4.7, 2.7)
    figure.patch.set_alpha(0)
    _draw(figure.add_subplot(), panel, theme)
    drawn = _drawn(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()
