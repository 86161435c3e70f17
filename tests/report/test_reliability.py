"""The reliability plot: a bar for each bin, at the height of its accuracy."""

import xml.etree.ElementTree as ElementTree

from llmjax.report.reliability import draw_reliability


def test_the_reliability_plot_has_a_bar_for_each_bin_with_examples():
    counts, confidence, accuracy = [0, 5, 10, 0], [0, 0.3, 0.6, 0], [0, 0.2, 1.0, 0]
    plot = draw_reliability(counts, confidence, accuracy, title="a < b")
    root = ElementTree.fromstring(plot)
    bars = [element for element in root.iter() if element.get("class") == "bar"]
    heights = [float(bar.get("height", "")) for bar in bars]
    assert len(bars) == 2 and heights[0] / heights[1] == 0.2
    assert float(bars[1].get("y", "")) + heights[1] == float(bars[0].get("y", "")) + heights[0]  # on the axis
    assert [float(bar.get("opacity", "")) for bar in bars] == [0.62, 1.0]
    assert "10 examples: confidence 0.600, accuracy 1.000" in plot and "a &lt; b" in plot
