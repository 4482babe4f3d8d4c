"""The report's pictures as text: line charts, share charts and range strips in SVG, heat maps.

Plain numbers in, SVG out; colours come from the page's style sheet through classes (`c-msa`, ...),
so that one picture serves the light and the dark page.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 10, 34
MAX_POINTS = 240
TABLE_POINTS = 8  # of a curve, in the table beneath it


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line or band; `color` is the class suffix of the style sheet."""

    name: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]


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


def tidy(number: float) -> str:
    """A number for people: up to four significant digits, no trailing zeros."""
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:.0f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """The plotting area: data ranges to SVG units."""

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
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, table: str = ""
) -> str:
    """A line chart with grid, axis labels, and its data as JSON for the page's pointer read-out.

    table: the values in words, instead of some points of every line.
    """
    shown = [thin_out(one) for one in series if len(one.xs)]
    ys = [y for one in shown for y in one.ys if math.isfinite(y)]
    if not ys:
        return _EMPTY
    y_ticks = nice_ticks(min(0.0, *ys, 0.0), max(ys))
    xs = [x for one in shown for x in one.xs]
    frame = _Frame(x0=min(xs), x1=max(xs), y0=y_ticks[0], y1=y_ticks[-1])
    lines = [
        f'<path class="line s-{one.color}" d="M{frame.path(one.xs, one.ys)}"/>' for one in shown
    ]
    grid = _grid(frame, y_ticks, x_label, percent=False)
    inner = grid + "".join(lines)
    return _figure(title, y_label, inner, shown, frame, x_label, percent=False, table=table)


def share_chart(
    title: str,
    series: Sequence[Series],
    asked: Sequence[float],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Shares that sum to 1 as stacked bands; dashed lines where the asked shares would end.

    All series have the same xs; `asked` has one share per series.
    """
    shown = [thin_out(one) for one in series if len(one.xs)]
    if not shown:
        return _EMPTY
    xs = shown[0].xs
    frame = _Frame(x0=min(xs), x1=max(xs), y0=0.0, y1=1.0)
    lower = [0.0] * len(xs)
    bands, borders, border = [], [], 0.0
    for one, rate in zip(shown, asked, strict=True):
        upper = [low + y for low, y in zip(lower, one.ys, strict=True)]
        there, back = frame.path(xs, upper), frame.path(xs[::-1], lower[::-1])
        bands.append(f'<path class="band f-{one.color}" d="M{there}L{back}Z"/>')
        border += rate
        if border < 1 - 1e-9:
            y = frame.y(border)
            borders.append(
                f'<line class="dashed" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        lower = upper
    grid = _grid(frame, [0, 0.25, 0.5, 0.75, 1], x_label, percent=True)
    inner = grid + "".join(bands + borders)
    return _figure(title, y_label, inner, shown, frame, x_label, percent=True)


_EMPTY = '<p class="empty">Nothing was logged.</p>'


def _grid(frame: _Frame, y_ticks: Sequence[float], x_label: str, *, percent: bool) -> str:
    parts = []
    for tick in y_ticks:
        label, y = f"{tick:.0%}" if percent else tidy(tick), frame.y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in nice_ticks(frame.x0, frame.x1, 5):
        if frame.x0 <= tick <= frame.x1:
            parts.append(
                f'<text x="{frame.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{tidy(tick)}</text>"
            )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 3}" text-anchor="start">{escape(x_label)}</text>')
    return "".join(parts)


def _figure(
    title: str,
    y_label: str,
    inner: str,
    series: Sequence[Series],
    frame: _Frame,
    x_label: str,
    *,
    percent: bool,
    table: str = "",
) -> str:
    data = _chart_data(series, frame.x0, frame.x1, x_label, percent)
    dashed = '<li><i class="swatch dash"></i>asked for</li>' if percent else ""
    names = "".join(
        f'<li><i class="swatch b-{one.color}"></i>{escape(one.name)}</li>' for one in series
    )
    legend = f'<ul class="legend">{names}{dashed}</ul>' if len(series) > 1 or percent else ""
    table = table or _values(series, x_label, percent)
    return (
        f'<figure class="plot" data-chart="{data}">'
        f"<figcaption>{escape(title)}<span>{escape(y_label)}</span></figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{inner}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden=""/></svg>'
        f'{legend}<details class="values"><summary>Values</summary>{table}</details></figure>'
    )


def _values(series: Sequence[Series], x_label: str, percent: bool) -> str:
    """Some points of every line as a table, for who cannot see or point at the picture."""
    head = "".join(f'<th scope="col" class="num">{escape(one.name)}</th>' for one in series)
    longest = max(series, key=lambda one: len(one.xs))
    n = len(longest.xs)
    places = sorted({round(i * (n - 1) / (TABLE_POINTS - 1)) for i in range(TABLE_POINTS)})
    body = ""
    for x in (longest.xs[place] for place in places):
        cells = ""
        for one in series:
            near = min(range(len(one.xs)), key=lambda i: abs(one.xs[i] - x))
            y = one.ys[near]
            text = "-" if not math.isfinite(y) else f"{y:.1%}" if percent else tidy(y)
            cells += f'<td class="num">{text}</td>'
        body += f'<tr><th scope="row">{tidy(x)}</th>{cells}</tr>'
    return (
        f'<table><thead><tr><th scope="col">{escape(x_label)}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _chart_data(series: Sequence[Series], x0: float, x1: float, x_label: str, percent: bool) -> str:
    data = {
        "x0": x0,
        "x1": x1,
        "left": LEFT / WIDTH,
        "right": 1 - RIGHT / WIDTH,
        "width": WIDTH,
        "xLabel": x_label,
        "percent": percent,
        "series": [
            {
                "name": one.name,
                "color": one.color,
                "xs": [round(x, 3) for x in one.xs],
                "ys": [round(y, 5) if math.isfinite(y) else None for y in one.ys],
            }
            for one in series
        ],
    }
    return escape(json.dumps(data, separators=(",", ":")))


def range_strip(label: str, marks: Sequence[Mark]) -> str:
    """Systems on one 0..1 axis, each in its own lane, with bars of two standard errors."""
    width, left, right, lane = 300, 8, 292, 8
    bottom = 10 + lane * len(marks)

    def px(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * (right - left)

    spoken = ", ".join(f"{mark.name} {mark.value:.3f}" for mark in marks)
    parts = [
        f'<svg class="strip" viewBox="0 0 {width} {bottom + 14}" role="img" '
        f'aria-label="{escape(f"{label}: {spoken}")}">'
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="2" y2="{bottom}"/>'
            f'<text class="tick" x="{px(tick):.1f}" y="{bottom + 12}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for number, mark in enumerate(marks):
        x, y = px(mark.value), 10 + lane * number
        if math.isfinite(mark.error):
            low, high = px(mark.value - 2 * mark.error), px(mark.value + 2 * mark.error)
            parts.append(
                f'<line class="error s-{mark.color}" x1="{low:.1f}" x2="{high:.1f}" '
                f'y1="{y}" y2="{y}"/>'
            )
        parts.append(
            f'<circle class="mark f-{mark.color}" cx="{x:.1f}" cy="{y}" r="5">'
            f"<title>{escape(mark.name)} {mark.value:.3f}</title></circle>"
        )
    return "".join(parts) + "</svg>"


def heat_table(
    caption: str, classes: Sequence[str], answers: Sequence[str], counts: Sequence[Sequence[int]]
) -> str:
    """A confusion matrix as a real table: rows are true classes, shades the share of the row."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in answers)
    body = []
    for name, row in zip(classes, counts, strict=True):
        total = sum(row)
        cells = []
        for answer, count in zip(answers, row, strict=True):
            share = count / total if total else 0.0
            kind = "hit" if answer == name else "miss"
            cells.append(
                f'<td class="{kind}" style="--share:{share:.3f}" '
                f'title="true {escape(name)}, answered {escape(answer)}: {count} of {total}">'
                f"{count if count else '<span>0</span>'}</td>"
            )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><caption>{escape(caption)}</caption><thead><tr>'
        f'<td class="corner">true \\ answer</td>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
