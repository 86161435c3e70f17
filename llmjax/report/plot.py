"""Plots as inline SVG: curves over steps, and bars. Colours are CSS classes of the report's theme."""

from collections.abc import Callable, Sequence
import dataclasses
import math

from llmjax.report.markup import escape, format_axis, format_number

LOG_FROM = 3  # ratio of the highest to the lowest value from which the axis is logarithmic
MAX_POINTS = 500  # of a curve: the lowest and the highest point of each of half as many intervals
BAR_WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 34  # margins of a plot of curves


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points (x, y) in order of x; a y that is not finite interrupts the line.

    style   "line", "faint", "dots", or "line run0" to "line run7" for the curves of several runs
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "line"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A vertical line at x; `kind` ("restart", "skipped") determines its colour."""

    x: float
    label: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of a bar chart, in the accent colour if `highlight`; `total`: what the value is a part of."""

    label: str
    value: float
    highlight: bool = False
    total: float | None = None


def draw_curves(
    lines: Sequence[Curve],
    *,
    label: str,
    marks: Sequence[Mark] = (),
    width: int = 480,
    height: int = 220,
    from_zero: bool = False,
    over: str = "steps",
) -> str:
    """An SVG of curves over steps. `from_zero`: y starts at 0; otherwise it is logarithmic if its range is wide.

    over   the name of x
    """
    finite = [(x, y) for curve in lines for x, y in curve.points if math.isfinite(y)]
    if not finite:
        return f'<p class="missing">No finite value of {escape(label)} was logged.</p>'
    frame = _Frame.around(finite, width, height, from_zero, over)
    parts = [frame.grid()]
    for mark in marks:
        if frame.x0 <= mark.x <= frame.x1:
            parts.append(_draw_mark(frame, mark))
    for curve in lines:
        parts.append(_draw_dots(frame, curve) if curve.style == "dots" else _draw_line(frame, curve))
        parts += [_draw_nonfinite_mark(frame, x, y) for x, y in curve.points if not math.isfinite(y)]
    return _wrap_svg(parts, width, height, f"{label} over {over}")


def draw_bars(
    rows: Sequence[Bar],
    *,
    label: str,
    unit: str,
    label_width: int = 170,
    format_value: Callable[[float], str] = "{:.3f}".format,
) -> str:
    """An SVG of horizontal bars from 0, in the given order, each with its value."""
    row_height, max_characters = 30, label_width // 7
    largest = max(max(row.value, row.total or 0) for row in rows) or 1.0
    parts = []
    for index, row in enumerate(rows):
        y = index * row_height
        scale = (BAR_WIDTH - label_width - (64 if all(row.total is None for row in rows) else 110)) / largest
        length = max(scale * row.value, 1.0) if row.value else 0.0
        accent = " accent" if row.highlight else ""
        background, end, value = "", length, format_value(row.value)
        if row.total is not None:
            end, value = max(scale * row.total, length), f"{value} of {format_value(row.total)}"
            background = f'<rect class="total" x="{label_width}" y="{y + 6}" width="{end:.1f}" height="18" rx="3"/>'
        name = row.label if len(row.label) <= max_characters else f"{row.label[: max_characters - 1]}…"
        parts.append(
            f'<text class="name{accent}" x="{label_width - 12}" y="{y + 19}" text-anchor="end">{escape(name)}</text>'
            f"{background}"
            f'<rect class="bar{accent}" x="{label_width}" y="{y + 6}" width="{length:.1f}" height="18" rx="3"/>'
            f'<text class="value{accent}" x="{label_width + end + 8:.1f}" y="{y + 19}">{escape(value)}</text>'
        )
    return _wrap_svg(parts, BAR_WIDTH, len(rows) * row_height + 4, f"{label}, {unit}")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Maps data to coordinates of the SVG."""

    x0: float
    x1: float
    y0: float
    y1: float
    is_log: bool
    width: int
    height: int
    over: str

    @classmethod
    def around(
        cls, points: Sequence[tuple[float, float]], width: int, height: int, from_zero: bool, over: str
    ) -> "_Frame":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        is_log = not from_zero and low > 0 and high / low > LOG_FROM
        if from_zero:
            low, high = min(low, 0.0), high * 1.05
        elif is_log:
            low, high = low / 1.15, high * 1.15
        else:
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        if low == high:
            low, high = low - (abs(low) * 0.5 or 0.5), high + (abs(high) * 0.5 or 0.5)
        left, right = min(xs), max(xs)
        if left == right:
            left, right = left - 1, right + 1
        return cls(left, right, low, high, is_log, width, height, over)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def describe_x(self, value: float) -> str:
        return f"step {value:,.0f}" if self.over == "steps" else f"{value:,.0f} {self.over}"

    def y(self, value: float) -> float:
        transform = math.log if self.is_log else float
        low, high = transform(self.y0), transform(self.y1)
        fraction = (transform(value) - low) / (high - low)
        return self.height - BOTTOM - fraction * (self.height - TOP - BOTTOM)

    def grid(self) -> str:
        parts = []
        values = choose_log_ticks(self.y0, self.y1) if self.is_log else choose_ticks(self.y0, self.y1, 5)
        for value, text in zip(values, format_axis(values), strict=True):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        if self.is_log:
            parts.append(f'<text class="tick" x="{LEFT + 6}" y="{TOP}">log scale</text>')
        bottom = self.height - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        values = [value for value in choose_ticks(self.x0, self.x1, self.width // 95) if value == int(value)]
        for value, text in zip(values, format_axis(values), strict=True):
            x, y = f"{self.x(value):.1f}", bottom + 18
            parts.append(f'<text class="tick" x="{x}" y="{y}" text-anchor="middle">{text}</text>')
        return "".join(parts)


def choose_ticks(low: float, high: float, target_count: int) -> list[float]:
    """About `target_count` round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    rough = (high - low) / max(target_count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [round(i * gap, 12) for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def choose_log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, with their multiples by 2 and 5, or other round numbers, if those are few."""
    if high / low < 10:
        return [value for value in choose_ticks(low, high, 5) if value > 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    return [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of the points, in order: the lowest and highest of each interval, so spikes remain."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS / 2))
    extremes = []
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        extremes += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return extremes


def smooth(points: Sequence[tuple[float, float]], window: float) -> list[tuple[float, float]]:
    """Exponential mean over about `window` points, unbiased at the start; values that are not finite are skipped."""
    means, total, weight, decay = [], 0.0, 0.0, 1 - 1 / max(window, 1)
    for x, y in points:
        if math.isfinite(y):
            total, weight = decay * total + y, decay * weight + 1
            means.append((x, total / weight))
    return means


def _draw_line(frame: _Frame, curve: Curve) -> str:
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in curve.points:
        if math.isfinite(y):
            segments[-1].append((x, y))
        elif segments[-1]:
            segments.append([])
    if sum(map(len, segments)) == 1:
        return _draw_dots(frame, curve)
    paths = []
    for segment in filter(None, segments):
        coordinates = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in thin(segment))
        paths.append(f'<polyline class="{curve.style}" points="{coordinates}"/>')
    return "".join(paths)


def _draw_dots(frame: _Frame, curve: Curve) -> str:
    return "".join(
        f'<circle class="dot {curve.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5">'
        f"<title>{escape(curve.name)} {format_number(y)} at {frame.describe_x(x)}</title></circle>"
        for x, y in curve.points
        if math.isfinite(y)
    )


def _draw_nonfinite_mark(frame: _Frame, x: float, y: float) -> str:
    center = frame.x(min(max(x, frame.x0), frame.x1))
    title = f"<title>{y} at {frame.describe_x(x)}</title>"
    return f'<path class="nonfinite" d="M{center - 4:.1f},{TOP} h8 l-4,7 z">{title}</path>'


def _draw_mark(frame: _Frame, mark: Mark) -> str:
    x = frame.x(mark.x)
    return (
        f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}">'
        f"<title>{escape(mark.label)}</title></line>"
    )


def _wrap_svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
