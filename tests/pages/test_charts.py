"""Charts and colours of pages: short numbers, bounded size, and a contrast that can be read."""

import math
import re

import pytest

from qwenvl_jax.pages.charts import line_chart, number_text
from qwenvl_jax.pages.ranges import Row, histogram, ranges
from qwenvl_jax.pages.style import STYLE


def test_a_chart_draws_what_there_is():
    assert line_chart("nothing", {"a": []}) == ""
    assert line_chart("one", {"a": [(5, 2.0)]}).count("<circle") >= 1
    assert "polyline" in line_chart("flat", {"a": [(1, 3.0), (2, 3.0)]}, log=True)
    assert line_chart("below", {"a": [(1, -1.0)]}, log=True) == ""
    long = line_chart("long", {"a": [(i, float(i)) for i in range(5000)]})
    assert len(long) < 20_000
    assert "step 4,999" in long


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_told_from_the_ground_in_light_and_dark():
    """WCAG's contrast for text (4.5) and for lines (3)."""
    found = re.findall(r"--([\w]+): (#\w{6})", STYLE)
    half = len(found) // 2
    for colours in (dict(found[:half]), dict(found[half:])):
        assert len(colours) == half
        for name in colours.keys() - {"paper", "card", "rule"}:
            for ground in ("paper", "card"):
                low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (high + 0.05) / (low + 0.05) > (3 if name.startswith("c") else 4.5), (name, ground)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e-5, "1e-5"), (0.25, "0.25"), (1234, "1,234"), (54321, "54.3k"), (2.5e9, "2.5G")]
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_values_stand_where_they_should():
    drawn = ranges(("", "n"), [Row("a", ("3",), 25.0, 0.0, 50.0), Row("b", ("4",), math.nan)], 0.0, 100.0, mark=75.0)
    assert '<line class="plain spread" x1="0.00%" x2="50.00%"' in drawn
    assert 'cx="25.00%"' in drawn
    assert drawn.count("<circle") == 1
    assert drawn.count('x1="75.00%"') == 2
    assert ranges((), [], 0.0, 1.0) == ""
    assert 'cx="100.00%"' in ranges(("",), [Row("off", (), 3.0)], 0.0, 1.0)


def test_a_histogram_has_a_bar_for_each_length():
    drawn = histogram("lengths", [0, 1, 1, 3], "tokens")
    assert drawn.count("<rect") == 4
    assert re.findall(r' height="([\d.]+)%"', drawn) == ["50.00", "100.00", "0.00", "50.00"]
    assert histogram("lengths", list(range(1000)), "tokens").count("<rect") <= 24
    assert histogram("none", [], "tokens") == ""
