"""Plots as inline SVG: curves over steps, and bars. Colours are CSS classes of the report's theme."""

from collections.abc import Callable, Sequence
import dataclasses
import math

from llmjax.report.markup import clean, figure, figures

LOG_FROM = 3  # quotient of highest and lowest value from which a linear axis would flatten most of a curve
POINTS_SHOWN = 500  # a curve keeps the lowest and the highest point of each of half as many intervals
BAR_WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 34


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points (x, y) in order of x. `look` is "line", "faint" or "dots"; y that is not finite breaks the line."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str = "line"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A vertical line at x; `kind` ("restart", "skipped") gives it its colour."""

    x: float
    label: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of a bar chart; `highlight` gives it the accent colour. `of`: the total that the value is a part of."""

    label: str
    value: float
    highlight: bool = False
    of: float | None = None


def curves(
    lines: Sequence[Curve],
    *,
    label: str,
    marks: Sequence[Mark] = (),
    width: int = 480,
    height: int = 220,
    zero: bool = False,
) -> str:
    """An SVG of curves over steps. `zero`: y starts at 0; otherwise it is logarithmic if its range is wide."""
    finite = [(x, y) for curve in lines for x, y in curve.points if math.isfinite(y)]
    if not finite:
        return f'<p class="missing">No finite value of {clean(label)} was logged.</p>'
    frame = _Frame.around(finite, width, height, zero)
    parts = [frame.grid()]
    for mark in marks:
        if frame.x0 <= mark.x <= frame.x1:
            parts.append(_mark(frame, mark))
    for curve in lines:
        parts.append(_dots(frame, curve) if curve.look == "dots" else _line(frame, curve))
        parts += [_broken(frame, x, y) for x, y in curve.points if not math.isfinite(y)]
    return _svg(parts, width, height, f"{label} over steps")


def bars(
    rows: Sequence[Bar],
    *,
    label: str,
    unit: str,
    names: int = 170,
    show: Callable[[float], str] = "{:.3f}".format,
) -> str:
    """An SVG of horizontal bars from 0, in the given order, each with its value; `names` is the labels' width."""
    row_height, max_characters = 30, names // 7
    largest = max(max(row.value, row.of or 0) for row in rows) or 1.0
    parts = []
    for index, row in enumerate(rows):
        y = index * row_height
        scale = (BAR_WIDTH - names - (64 if all(row.of is None for row in rows) else 110)) / largest
        length = max(scale * row.value, 1.0) if row.value else 0.0
        ours = " ours" if row.highlight else ""
        whole, end, value = "", length, show(row.value)
        if row.of is not None:
            end, value = max(scale * row.of, length), f"{value} of {show(row.of)}"
            whole = f'<rect class="whole" x="{names}" y="{y + 6}" width="{end:.1f}" height="18" rx="3"/>'
        label = row.label if len(row.label) <= max_characters else f"{row.label[: max_characters - 1]}…"
        parts.append(
            f'<text class="name{ours}" x="{names - 12}" y="{y + 19}" text-anchor="end">{clean(label)}</text>{whole}'
            f'<rect class="bar{ours}" x="{names}" y="{y + 6}" width="{length:.1f}" height="18" rx="3"/>'
            f'<text class="value{ours}" x="{names + end + 8:.1f}" y="{y + 19}">{clean(value)}</text>'
        )
    return _svg(parts, BAR_WIDTH, len(rows) * row_height + 4, f"{label}, {unit}")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Maps data to coordinates of the SVG."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool
    width: int
    height: int

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], width: int, height: int, zero: bool) -> "_Frame":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        log = not zero and low > 0 and high / low > LOG_FROM
        if zero:
            low, high = min(low, 0.0), high * 1.05
        elif log:
            low, high = low / 1.15, high * 1.15
        else:
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        if low == high:
            low, high = low - (abs(low) * 0.5 or 0.5), high + (abs(high) * 0.5 or 0.5)
        left, right = min(xs), max(xs)
        if left == right:
            left, right = left - 1, right + 1
        return cls(left, right, low, high, log, width, height)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        to = math.log if self.log else float
        share = (to(value) - to(self.y0)) / (to(self.y1) - to(self.y0))
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def grid(self) -> str:
        parts = []
        values = log_ticks(self.y0, self.y1) if self.log else ticks(self.y0, self.y1, 5)
        for value, text in zip(values, figures(values), strict=True):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        if self.log:
            parts.append(f'<text class="tick" x="{LEFT + 6}" y="{TOP}">log scale</text>')
        bottom = self.height - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        values = [value for value in ticks(self.x0, self.x1, self.width // 95) if value == int(value)]
        for value, text in zip(values, figures(values), strict=True):
            x, y = f"{self.x(value):.1f}", bottom + 18
            parts.append(f'<text class="tick" x="{x}" y="{y}" text-anchor="middle">{text}</text>')
        return "".join(parts)


def ticks(low: float, high: float, target_count: int) -> list[float]:
    """About `target_count` round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    rough = (high - low) / max(target_count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [round(i * gap, 12) for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, and their 2 and 5 fold or round numbers if those are few."""
    if high / low < 10:
        return [value for value in ticks(low, high, 5) if value > 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    return [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about POINTS_SHOWN points that keep every spike: the lowest and highest of each interval, in order."""
    if len(points) <= POINTS_SHOWN:
        return list(points)
    size = math.ceil(len(points) / (POINTS_SHOWN / 2))
    extremes = []
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        extremes += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return extremes


def smooth(points: Sequence[tuple[float, float]], window: float) -> list[tuple[float, float]]:
    """Exponential mean over about `window` points, unbiased at the start; values that are not finite are left out."""
    means, total, weight, decay = [], 0.0, 0.0, 1 - 1 / max(window, 1)
    for x, y in points:
        if math.isfinite(y):
            total, weight = decay * total + y, decay * weight + 1
            means.append((x, total / weight))
    return means


def _line(frame: _Frame, curve: Curve) -> str:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in curve.points:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    if sum(map(len, pieces)) == 1:
        return _dots(frame, curve)
    paths = []
    for piece in filter(None, pieces):
        where = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in thin(piece))
        paths.append(f'<polyline class="{curve.look}" points="{where}"/>')
    return "".join(paths)


def _dots(frame: _Frame, curve: Curve) -> str:
    return "".join(
        f'<circle class="dot {curve.look}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5">'
        f"<title>{clean(curve.name)} {figure(y)} at step {x:,.0f}</title></circle>"
        for x, y in curve.points
        if math.isfinite(y)
    )


def _broken(frame: _Frame, x: float, y: float) -> str:
    where = frame.x(min(max(x, frame.x0), frame.x1))
    return f'<path class="broken" d="M{where - 4:.1f},{TOP} h8 l-4,7 z"><title>{y} at step {x:,.0f}</title></path>'


def _mark(frame: _Frame, mark: Mark) -> str:
    x = frame.x(mark.x)
    return (
        f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}">'
        f"<title>{clean(mark.label)}</title></line>"
    )


def _svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{clean(label)}">{"".join(parts)}</svg>'
