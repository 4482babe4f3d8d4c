"""The report's pictures: line charts, share charts and range strips, drawn as SVG.

Plain numbers go in, `Chart` values and SVG come out. Colours come from the page's style sheet
through classes (`s-msa`, ...), so that one picture serves the light and the dark page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 10, 34
MAX_POINTS = 240
TABLE_POINTS = 8  # of a curve, in the table below it


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line or band; `color` is the class suffix of the style sheet."""

    name: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart with legend, its values as a table, and its data for the page's pointer read-out."""

    title: str
    x_label: str
    y_label: str
    svg: Markup
    series: Sequence[Series]
    percent: bool
    data: dict[str, Any]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One system on a range strip: value, half-width of its error bar, class suffix, name."""

    name: str
    value: float
    error: float
    color: str


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover low..high (steps of 1, 2, 2.5 or 5 times 10^n)."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * f for f in (1, 2, 2.5, 5, 10) if base * f >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin_out(series: Series) -> Series:
    """At most MAX_POINTS points, each the mean of a run of neighbours; first and last x stay."""
    n = len(series.xs)
    if n <= MAX_POINTS:
        return series
    edges = [n * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    runs = list(itertools.pairwise(edges))
    xs = [series.xs[b - 1] for _, b in runs]
    ys = [sum(series.ys[a:b]) / (b - a) for a, b in runs]
    return Series(name=series.name, color=series.color, xs=xs, ys=ys)


def tidy(value: float) -> str:
    """A number for people: up to four significant digits, no trailing zeros."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """The plotting area: maps data ranges to SVG units."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y0) / ((self.y1 - self.y0) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        return "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    head: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> Chart | None:
    """A line chart; None when there is no finite value.

    head, rows: the table below the chart; by default some points of every line.
    """
    shown = [thin_out(line) for line in series if len(line.xs)]
    ys = [y for line in shown for y in line.ys if math.isfinite(y)]
    if not ys:
        return None
    y_ticks = nice_ticks(min(0.0, *ys, 0.0), max(ys))
    xs = [x for line in shown for x in line.xs]
    frame = _Frame(x0=min(xs), x1=max(xs), y0=y_ticks[0], y1=y_ticks[-1])
    paths = [
        f'<path class="line s-{line.color}" d="M{frame.path(line.xs, line.ys)}"/>' for line in shown
    ]
    drawing = _grid(frame, y_ticks, x_label, percent=False) + "".join(paths)
    if not head:
        head, rows = _values(shown, x_label, percent=False)
    return _chart(
        title, x_label, y_label, frame, drawing, shown, percent=False, head=head, rows=rows
    )


def share_chart(
    title: str,
    series: Sequence[Series],
    configured: Sequence[float],
    *,
    x_label: str,
    y_label: str,
) -> Chart | None:
    """Shares that sum to 1 as stacked bands; dashed lines where the configured shares end.

    All series have the same xs; `configured` has one share per series. None without series.
    """
    shown = [thin_out(band) for band in series if len(band.xs)]
    if not shown:
        return None
    xs = shown[0].xs
    frame = _Frame(x0=min(xs), x1=max(xs), y0=0.0, y1=1.0)
    lower = [0.0] * len(xs)
    bands, borders, border = [], [], 0.0
    for band, rate in zip(shown, configured, strict=True):
        upper = [low + y for low, y in zip(lower, band.ys, strict=True)]
        there, back = frame.path(xs, upper), frame.path(xs[::-1], lower[::-1])
        bands.append(f'<path class="band f-{band.color}" d="M{there}L{back}Z"/>')
        border += rate
        if border < 1 - 1e-9:
            y = frame.y(border)
            borders.append(
                f'<line class="dashed" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        lower = upper
    grid = _grid(frame, [0, 0.25, 0.5, 0.75, 1], x_label, percent=True)
    head, rows = _values(shown, x_label, percent=True)
    drawing = grid + "".join(bands + borders)
    return _chart(
        title, x_label, y_label, frame, drawing, shown, percent=True, head=head, rows=rows
    )


def _grid(frame: _Frame, y_ticks: Sequence[float], x_label: str, *, percent: bool) -> str:
    elements = []
    for tick in y_ticks:
        label, y = f"{tick:.0%}" if percent else tidy(tick), frame.y(tick)
        elements.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in nice_ticks(frame.x0, frame.x1, 5):
        if frame.x0 <= tick <= frame.x1:
            elements.append(
                f'<text x="{frame.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{tidy(tick)}</text>"
            )
    elements.append(
        f'<text x="{LEFT}" y="{HEIGHT - 3}" text-anchor="start">{escape(x_label)}</text>'
    )
    return "".join(elements)


def _chart(
    title: str,
    x_label: str,
    y_label: str,
    frame: _Frame,
    drawing: str,
    series: Sequence[Series],
    *,
    percent: bool,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> Chart:
    svg = Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{drawing}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden=""/></svg>'
    )
    data = {
        "x0": frame.x0,
        "x1": frame.x1,
        "left": LEFT / WIDTH,
        "right": 1 - RIGHT / WIDTH,
        "width": WIDTH,
        "xLabel": x_label,
        "percent": percent,
        "series": [
            {
                "name": line.name,
                "color": line.color,
                "xs": [round(x, 3) for x in line.xs],
                "ys": [round(y, 5) if math.isfinite(y) else None for y in line.ys],
            }
            for line in series
        ],
    }
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        svg=svg,
        series=series,
        percent=percent,
        data=data,
        head=head,
        rows=rows,
    )


def _values(
    series: Sequence[Series], x_label: str, *, percent: bool
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with some points of every line, for those who cannot see them."""
    longest = max(series, key=lambda line: len(line.xs)).xs
    last = len(longest) - 1
    points = sorted({round(i * last / (TABLE_POINTS - 1)) for i in range(TABLE_POINTS)})
    rows = []
    for x in (longest[point] for point in points):
        row = [tidy(x)]
        for line in series:
            nearest = min(range(len(line.xs)), key=lambda i: abs(line.xs[i] - x))
            y = line.ys[nearest]
            row.append("-" if not math.isfinite(y) else f"{y:.1%}" if percent else tidy(y))
        rows.append(row)
    return [x_label, *(line.name for line in series)], rows


def range_strip(label: str, marks: Sequence[Mark]) -> Markup:
    """Systems on one 0..1 axis, each in its own lane, with bars of two standard errors."""
    width, left, right, lane = 300, 8, 292, 8
    bottom = 10 + lane * len(marks)

    def px(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * (right - left)

    summary = ", ".join(f"{mark.name} {mark.value:.3f}" for mark in marks)
    elements = [
        f'<svg class="strip" viewBox="0 0 {width} {bottom + 14}" role="img" '
        f'aria-label="{escape(f"{label}: {summary}")}">'
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        elements.append(
            f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="2" y2="{bottom}"/>'
            f'<text class="tick" x="{px(tick):.1f}" y="{bottom + 12}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for row, mark in enumerate(marks):
        x, y = px(mark.value), 10 + lane * row
        if math.isfinite(mark.error):
            low, high = px(mark.value - 2 * mark.error), px(mark.value + 2 * mark.error)
            elements.append(
                f'<line class="error s-{mark.color}" x1="{low:.1f}" x2="{high:.1f}" '
                f'y1="{y}" y2="{y}"/>'
            )
        elements.append(
            f'<circle class="mark f-{mark.color}" cx="{x:.1f}" cy="{y}" r="5">'
            f"<title>{escape(mark.name)} {mark.value:.3f}</title></circle>"
        )
    return Markup("".join(elements) + "</svg>")
