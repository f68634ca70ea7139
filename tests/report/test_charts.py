"""Charts: the drawn lines, and the SVG that a page embeds."""

import math
import re

import numpy as np
import pytest

from mobilevit.report.charts import Band, Chart, Line, line_chart

NAN = math.nan


def draw(*lines: Line, **options: object) -> Chart:
    chart = line_chart("Loss", lines, x_name="epoch", **options)  # pyright: ignore[reportArgumentType]
    assert chart is not None
    return chart


def labels(chart: Chart) -> list[float]:
    """Numbers of the y axis, from the bottom to the top."""
    return [float(text.replace(",", "")) for text in re.findall(r"text-anchor: end[^>]*>([-\d.,]+)<", chart.svg)]


def points(chart: Chart, index: int = 0) -> list[tuple[float, float]]:
    pattern = r'<path d="([^"]*)"[^>]*stroke: var\(--(?:blue|orange|soft)\)[^>]*stroke-width: 2'
    path = re.findall(pattern, chart.svg)[index]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


@pytest.mark.parametrize(
    "y", [[4.0, 2.5, 1.25, 0.8, 0.75, 0.9], [-3.0, 0, 12, 11, 10, 7], [61234.0, 59000, 60100, 60300, 60200, 60000.5]]
)
def test_points_are_on_the_scale_of_the_labels(y: list[float]) -> None:
    chart = draw(Line("loss", [1, 2, 4, 7, 11, 30], y))
    ticks = labels(chart)
    assert ticks[0] <= min(y) <= max(y) <= ticks[-1]
    places = [
        float(y)
        for y in re.findall(r"var\(--faint\)", chart.svg)
        and re.findall(r'<path d="M [\d.]+ ([\d.]+)\s*L [\d.]+ [\d.]+\s*"[^>]*var\(--faint\)', chart.svg)
    ]
    assert len(places) == len(ticks)
    measured = np.interp([-place for _, place in points(chart)], [-place for place in places], ticks)
    np.testing.assert_allclose(measured, y, atol=0.002 * (ticks[-1] - ticks[0]))


def test_logarithmic_axis() -> None:
    assert "1,000" in draw(Line("loss", [1, 2, 3], [500.0, 7.0, 0.02])).svg
    assert labels(draw(Line("speed", [1, 2], [500.0, 1.0]), from_zero=True))[0] == 0


def test_nan_leaves_a_gap_and_isolated_points_are_marked() -> None:
    chart = draw(Line("a", [1, 2, 3, 4, 5, 6], [3, 2, NAN, 5, math.inf, 1]))
    assert len(re.findall(r"<use [^>]*fill: var\(--blue\)", chart.svg)) == 2
    assert "nan" not in chart.svg.lower()
    assert "inf" not in chart.svg.lower()


def test_lines_without_points() -> None:
    assert line_chart("Loss", [Line("a", [1, 2], [NAN, NAN])], x_name="epoch") is None
    assert line_chart("Loss", [], x_name="epoch") is None
    chart = draw(Line("one", [1, 2], [1, 2]), Line("other", [1, 2], [NAN] * 2), Line("two", [1, 2], [2, 3], "second"))
    assert chart.legend == [("main", "one"), ("second", "two")]


def test_an_outlier_of_the_band_does_not_flatten_the_line() -> None:
    x = [float(i) for i in range(100)]
    mean = [2 + math.sin(i / 9) for i in x]
    high = [y + 0.5 for y in mean]
    high[50] = 1e6
    chart = draw(Line("mean", x, mean), band=Band("range", x, [y - 0.5 for y in mean], high))
    assert labels(chart)[-1] <= 6
    assert chart.legend == [("main", "mean"), ("band", "range")]


@pytest.mark.parametrize("value", [0.0, 92.5, 100.0])
def test_percentages_stay_between_0_and_100(value: float) -> None:
    ticks = labels(draw(Line("a", [1], [value]), unit="%"))
    assert len(ticks) >= 2
    assert 0 <= ticks[0] <= value <= ticks[-1] <= 100


def test_tooltips_and_accessible_name() -> None:
    chart = draw(Line("a", [1, 2], [0.5, 0.25]), Line("b", [1, 2], [NAN, 0.125], "second"), unit="s")
    titles = re.findall(r"<title>(.*?)</title>", chart.svg)
    assert titles == ["epoch 1: a 0.5 s", "epoch 2: a 0.25 s; b 0.125 s"]
    assert re.search(r'role="img" aria-label="Loss by epoch[^"]*0.25 s', chart.svg)
