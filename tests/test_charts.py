"""The pictures' numbers: no peak is lost between the points, and the categories add up to what is allocated."""

from memory.charts import MAX_POINTS, category_series, highest_points
from memory.config import ProbeConfig
from memory.predict import trace_step


def test_no_peak_is_lost():
    """Of 10,000 points with one spike 2,000 remain, in order, the spike among them."""
    timeline = [1] * 10_000
    timeline[7_777] = 50
    points = highest_points(timeline)
    assert len(points) == MAX_POINTS and points == sorted(points) and 7_777 in points
    assert highest_points([3, 1, 2]) == [0, 1, 2]


def test_categories_add_up():
    """At every event of a traced step, and at its peak."""
    config = ProbeConfig(model="tiny", max_seq_len=48, mode="predict")
    record = trace_step(config).device
    series = category_series(record)
    assert [sum(values) for values in zip(*series.values(), strict=True)] == record.timeline()
    assert {category: values[record.peak_index] for category, values in series.items()} == record.breakdown()
