"""A reliability plot: how often predictions are right, by their confidence. One SVG file that needs no style sheet."""

from collections.abc import Sequence

from llmjax.report.markup import escape

_SIZE, _LEFT, _TOP, _BOTTOM, _RIGHT = 300, 52, 34, 44, 16  # of the square of the plot, and its margins
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.axis{stroke:#888;fill:none}.ideal{stroke:#888;stroke-dasharray:4 4}"
    ".bar{fill:#3b6fb6}.gap{fill:none;stroke:#c0392b;stroke-width:1.5}"
)


def draw_reliability(
    counts: Sequence[float], confidence: Sequence[float], accuracy: Sequence[float], *, title: str
) -> str:
    """The SVG of bins of equal width: a bar is the accuracy of a bin, the more opaque the more examples it has, and a
    red line its mean confidence. Bars below the dashed diagonal are overconfident.

    counts, confidence, accuracy   of each bin, from low to high confidence
    """
    most, width = max(counts) or 1, _SIZE / len(counts)
    x = lambda value: _LEFT + value * _SIZE
    y = lambda value: _TOP + (1 - value) * _SIZE
    parts = [f'<rect width="100%" height="100%" fill="#fff"/><text x="{_LEFT}" y="20">{escape(title)}</text>']
    for index, (count, mean, right) in enumerate(zip(counts, confidence, accuracy, strict=True)):
        if not count:
            continue
        left = x(index / len(counts))
        parts.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{y(right):.1f}" width="{width - 2:.1f}" '
            f'height="{right * _SIZE:.1f}" opacity="{0.25 + 0.75 * count / most:.2f}">'
            f"<title>{count:,.0f} examples: confidence {mean:.3f}, accuracy {right:.3f}</title></rect>"
            f'<path class="gap" d="M{left + 1:.1f},{y(mean):.1f} h{width - 2:.1f}"/>'
        )
    parts.append(f'<path class="ideal" d="M{x(0)},{y(0)} L{x(1)},{y(1)}"/>')
    parts.append(f'<path class="axis" d="M{x(0)},{y(1)} V{y(0)} H{x(1)}"/>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{x(tick):.0f}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.0f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{x(0.5):.0f}" y="{y(0) + 36}" text-anchor="middle">confidence</text>')
    parts.append(f'<text transform="translate(14 {y(0.5):.0f}) rotate(-90)" text-anchor="middle">accuracy</text>')
    box = f'viewBox="0 0 {_LEFT + _SIZE + _RIGHT} {_TOP + _SIZE + _BOTTOM}" width="{_LEFT + _SIZE + _RIGHT}"'
    label = f'role="img" aria-label="{escape(title)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {label}><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
