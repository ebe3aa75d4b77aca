"""The page to look inside a step: its numbers against the record, and what a reader sees, in a browser."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from tiny_records import tiny_config, traced

from memory.categories import CATEGORIES, TITLES
from memory.charts import category_series
from memory.config import ProbeConfig
from memory.page import Choices, record_data, step_page
from memory.predict import PEFT_NAMES
from memory.probe import probe_with_record
from memory.record import Allocation, Record
from utils import GIB, MIB, size


KIB = 2**10
Probed = tuple[dict[str, Any], Record]


@pytest.fixture(scope="module")
def probed() -> Probed:
    result, record = probe_with_record(tiny_config(max_seq_len=256, gradient_checkpointing=False))
    return result, record.device


@pytest.fixture(scope="module")
def page(probed: Probed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "step.html"
    path.write_text(step_page(*probed))
    return path


def series_of(data: dict[str, Any]) -> dict[str, list[int]]:
    """Each category's bytes at the page's points, from its tensors and its rest."""
    series = {}
    for category, drawn in zip(CATEGORIES, data["categories"], strict=True):
        changes = [0] * (len(data["points"]) + 1)
        for first, length, nbytes, *_ in drawn["tensors"]:
            changes[first] += nbytes
            changes[first + length] -= nbytes
        for point, nbytes in drawn["rest"]:
            changes[point] += nbytes
        series[category.name] = list(accumulate(changes))[:-1]
    return series


@pytest.mark.parametrize("strategy", ["single", "ddp", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("points", "tensors"), [(20_000, 20_000), (300, 40)])
def test_the_bytes_of_every_place(strategy, points, tensors, monkeypatch):
    """Category by category as the record has them, also where places and tensors are left out; the peak is a place."""
    monkeypatch.setattr("memory.page.MAX_POINTS", points)
    monkeypatch.setattr("memory.page.MAX_TENSORS", tensors)
    record = traced(strategy, world_size=1 if strategy == "single" else 2).device
    data = record_data(record)
    indices = [number - 1 for number in accumulate(data["points"])]
    expected = category_series(record)
    assert series_of(data) == {name: [values[i] for i in indices] for name, values in expected.items()}
    assert indices[data["peak"]] == record.peak_index
    num_tensors = sum(len(category["tensors"]) for category in data["categories"])
    if points == 300:
        assert len(indices) <= 300 and num_tensors == 40
        assert "places are shown" in data["scale"] and "40 largest have a name" in data["scale"]
    else:
        assert indices == list(range(len(record.events)))
        assert "places are shown" not in data["scale"] and "largest" not in data["scale"]


def test_phases_begin_where_they_do(probed):
    data = record_data(probed[1])
    assert data["phases"] == [list(start) for start in probed[1].phase_starts]


def test_hovering_over_the_peak_shows_its_tensors(browser, page, probed):
    """From the bottom up: each large tensor with its size, module and operator; the categories in their order."""
    record = probed[1]
    browser.show(page)
    browser.box("#plot")
    guide, plot = browser.box(".guide"), browser.box("#plot")
    assert size(record.peak_bytes) in browser.text("#place-title")
    seen = list(hovered(browser, guide["left"], range(int(plot["bottom"]) - 27, int(plot["top"]) + 22, -4)))
    assert browser.text("#place-title").startswith(f"After event {record.peak_index + 1:,} of {len(record.events):,}")
    large = [tensor for tensor in record.largest_at_peak(50) if tensor.nbytes > record.peak_bytes / 50]
    assert len(large) >= 3 and any(tensor.module for tensor in large)
    for tensor in large:
        shape, module = " x ".join(map(str, tensor.shape)), PEFT_NAMES.sub("", tensor.module) or "the step"
        words = f" {shape} {tensor.dtype}\n{module}\n{tensor.op}, {TITLES[tensor.category]}\n"
        (shown, *_) = [tip.partition(words)[0] for tip in seen if words in tip]
        number, unit = shown.split()
        assert float(number) * {"KiB": KIB, "MiB": MIB}[unit] == pytest.approx(tensor.nbytes, rel=0.01)
    titles = [next(title for title in TITLES.values() if f", {title}\n" in tip) for tip in seen]
    order = [category.title for category in CATEGORIES]
    assert len(set(titles)) >= 3 and titles == sorted(titles, key=order.index)


def hovered(browser: Browser, x: float, heights: range) -> Iterator[str]:
    """What the page says of the places above each other."""
    for y in heights:
        browser.point(x, y)
        if text := browser.text("#tip"):
            yield text


def test_all_that_is_alive_at_the_peak(browser, page, probed):
    """The rows add up to the peak, category by category, and the largest category comes first."""
    result, record = probed
    browser.show(page)
    assert browser.text("#peak-title") == (
        f"Alive at the peak: {size(record.peak_bytes)} ({record.peak_bytes:,} bytes)"
    )
    browser.run("for (const part of document.querySelectorAll('#peak details')) part.open = true")
    sums = {}
    for part in browser.find("#peak details"):
        lines = part.text.splitlines()
        title = lines[0].partition(":")[0]
        exact = browser.run(
            "return [...arguments[0].querySelectorAll('tbody td:first-child')].map((cell) => cell.title)", part
        )
        rows = [int(text.removesuffix(" bytes").replace(",", "")) for text in exact]
        assert rows == sorted(rows, reverse=True) and rows
        sums[title] = sum(rows)
    used = {TITLES[name]: nbytes for name, nbytes in result["breakdown"].items() if nbytes}
    assert sums == used and sum(sums.values()) == record.peak_bytes
    assert list(sums.values()) == sorted(sums.values(), reverse=True)


def grouped(alive: list[Allocation]) -> Counter:
    """Bytes of what the page puts into one row: the tensors of all layers."""
    sums = Counter()
    for a in alive:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", PEFT_NAMES.sub("", a.module))
        sums[a.category, name, a.op, a.shape, a.dtype, a.nbytes] += a.nbytes
    return sums


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_click_holds_what_is_alive_there(browser, page, probed, share):
    """The total and the ten largest of that event, and they stay when the pointer moves on; a click lets go."""
    record = probed[1]
    browser.show(page)
    plot = browser.box("#plot")
    x, y = plot["left"] + share * plot["width"], plot["top"] + 200
    browser.point(x, y, click=True)
    title = browser.text("#place-title")
    event = int(re.match(r"After event ([\d,]+) of", title)[1].replace(",", "")) - 1
    assert title.endswith(" (held)") and size(record.timeline()[event]) in title
    phase = [phase for start, phase in record.phase_starts if start <= event][-1]
    assert f", {phase}: " in title
    cells = browser.run(
        "return [...document.querySelectorAll('#place tbody td:first-child')].map((cell) => cell.title)"
    )
    rows = [int(text.removesuffix(" bytes").replace(",", "")) for text in cells]
    assert rows == sorted(grouped(record.alive_at(event)).values(), reverse=True)[:10]
    browser.point(x + 90, y)
    assert browser.text("#place-title") == title
    browser.point(x + 90, y, click=True)
    browser.point(x + 120, y)
    assert browser.text("#place-title") not in (title, "")


def events_shown(browser: Browser) -> tuple[int, int]:
    """The first and the last event below the picture."""
    words = browser.run("return [...document.querySelectorAll('#plot text')].map((text) => text.textContent)")
    numbers = [int(word.removeprefix("event ").replace(",", "")) for word in words if word.startswith("event ")]
    return numbers[0], numbers[-1]


def test_zooming(browser, page, probed):
    """By dragging, by a click on a phase, and back."""
    record = probed[1]
    browser.show(page)
    plot = browser.box("#plot")
    whole = (1, len(record.events))
    assert events_shown(browser) == whole
    browser.point(plot["left"] + 400, plot["top"] + 150, drag_to=plot["left"] + 500)
    first, last = events_shown(browser)
    assert 0 < last - first < 0.15 * len(record.events)
    browser.find("button[data-key=Escape]")[0].click()
    assert events_shown(browser) == whole
    (start, _), (end, _) = [item for item in record.phase_starts if item[1] == "backward"][0], record.phase_starts[3]
    middle = plot["left"] + 72 + (plot["width"] - 84) * (start + end) / 2 / len(record.events)
    browser.point(middle, plot["top"] + 8, click=True)
    assert events_shown(browser) == (start + 1, end)


def test_the_keyboard(browser, page, probed):
    """Tab reaches the picture; arrows step, Home goes to the peak, + and - zoom, Escape shows all."""
    record = probed[1]
    browser.show(page)
    plot = browser.find("#plot")[0]
    plot.send_keys("\ue012")  # the left arrow
    assert browser.text("#place-title").startswith(f"After event {record.peak_index:,} of")
    plot.send_keys("\ue014\ue014")
    assert browser.text("#place-title").startswith(f"After event {record.peak_index + 2:,} of")
    assert plot.get_attribute("aria-valuetext") == browser.text("#place-title")
    plot.send_keys("\ue011")
    assert browser.text("#place-title").startswith(f"After event {record.peak_index + 1:,} of")
    plot.send_keys("++")
    first, last = events_shown(browser)
    assert first <= record.peak_index + 1 <= last and last - first < 0.3 * len(record.events)
    plot.send_keys("\ue00c")
    assert events_shown(browser) == (1, len(record.events))


def test_a_category_is_left_out(browser, page, probed):
    """Its button takes the largest one from the picture, whose axis then ends lower, and from the list."""
    breakdown = probed[0]["breakdown"]
    largest = TITLES[max(breakdown, key=breakdown.get)]
    browser.show(page)

    def largest_tick() -> str:
        return browser.run(
            "return [...document.querySelectorAll('#plot text')].filter((t) => t.textContent.endsWith('iB')).at(-1)"
        ).text

    before, rows = largest_tick(), browser.text("#place")
    button = next(button for button in browser.find("#legend button") if largest in button.text)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert largest_tick() != before and browser.text("#place") != rows
    button.click()
    assert largest_tick() == before and browser.text("#place") == rows


def contrast(first: str, second: str) -> float:
    """WCAG 2's ratio of two colours as a browser writes them, rgb(1, 2, 3)."""

    def luminance(colour: str) -> float:
        shares = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_legible(browser, page, scheme, width):
    """Text stands out from what is behind it by WCAG's 4.5, and nothing is wider than the window."""
    browser.show(page, width, scheme)

    def colour(selector: str, property: str) -> str:
        return browser.find(selector)[0].value_of_css_property(property)

    back, panel = colour("body", "background-color"), colour("#plot", "background-color")
    assert (contrast(back, "rgb(255, 255, 255)") < 1.5) == (scheme == "light")
    for text in (colour("body", "color"), colour(".muted", "color"), colour("#verdict", "color")):
        assert contrast(text, back) >= 4.5
    assert contrast(colour("#plot text", "fill"), panel) >= 4.5
    assert browser.run("return document.documentElement.scrollWidth") <= width
    plot = browser.box("#plot")
    assert 0.9 * width < plot["width"] < width
    assert all(label.rect["width"] > 0 for label in browser.find("#plot text"))


def test_the_settings_and_the_verdict(browser, page, probed):
    result = probed[0]
    browser.show(page)
    assert "tiny, LoRA r=8" in browser.text("h1") and browser.driver.title == browser.text("h1")
    assert browser.text("#verdict").startswith("FITS RTX 4090") and browser.find("#verdict.good")
    assert size(result["device_bytes"]) in browser.text("#figures")
    assert not browser.find("#front")[0].is_displayed()
    browser.find("details summary")[0].click()
    assert "--lora_r 8" in browser.text("#settings")


def test_nothing_comes_from_a_network(browser, page):
    """No address in the page but the name of SVG, and nothing is loaded."""
    assert set(re.findall(r"https?://[^\s\"']+", page.read_text())) == {"http://www.w3.org/2000/svg"}
    browser.show(page)
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_names_stay_text(browser, probed, tmp_path):
    """A model or a module whose name is markup is shown as such: nothing of it runs."""
    result, record = copy.deepcopy(probed)
    name = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"
    result["model"] = result["config"]["model"] = name
    result["notes"] = [name]
    record.largest_at_peak(1)[0].module = name
    path = tmp_path / "step.html"
    path.write_text(step_page(result, record))
    browser.show(path)
    assert name in browser.text("h1") and name in browser.text("#notes") and name in browser.driver.title
    assert name in browser.text("#place")
    assert browser.find("img") == []


def test_an_error_of_the_script_is_seen(chromium, page, tmp_path):
    """What the other tests rely on."""
    path = tmp_path / "broken.html"
    path.write_text(page.read_text().replace("addLegend();", "addLegends();", 1))
    chromium.show(path)
    assert any("addLegends is not defined" in error for error in chromium.errors())
    chromium.show(page)
    assert chromium.errors() == []


def front_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Device GiB, tokens a second: the third is beaten by the second, the fourth is over the budget, the last has no
    time."""
    rows = []
    for rank, gib, tokens in ((8, 4, 1000), (16, 6, 3000), (32, 7, 2000), (64, 12, 5000), (0, 5, None)):
        row = {"config": result["config"] | {"lora_r": rank}, "device_bytes": gib * GIB, "host_bytes": 2 * GIB}
        row |= {"tokens_per_second": tokens, "step_seconds": tokens and 2048 / tokens, "fits": gib < 10}
        rows.append(row)
    return rows


def test_settings_to_choose_from(browser, probed, tmp_path):
    """A point a row that has a time, a budget, the choice in a ring; hovering and focus say what a point is."""
    result, record = probed
    rows = front_rows(result)
    front = Choices(rows, chosen=rows[1], budget_bytes=10 * GIB, keys=["lora_r", "lora_target_modules"])
    path = tmp_path / "plan.html"
    path.write_text(step_page(result, record, front))
    browser.show(path)
    dots = browser.find("circle.setting")
    assert len(dots) == 4 and len(browser.find("circle.over")) == 1
    places = [(float(dot.get_attribute("cx")), float(dot.get_attribute("cy"))) for dot in dots]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == [places[i][1] for i in range(4)] and places[0][1] > places[2][1] > places[1][1]
    budget = float(browser.find("line.budget")[0].get_attribute("x1"))
    assert places[2][0] < budget < places[3][0] and "budget 10.00 GiB" in browser.text("#front-plot")
    (ring,) = browser.find("circle.ring")
    assert (float(ring.get_attribute("cx")), float(ring.get_attribute("cy"))) == places[1]
    stairs = browser.find("path.stairs")[0].get_attribute("d")
    assert f"{places[2][0]:.2f}"[:6] not in stairs and stairs.count("V") == 2
    plot = browser.box("#front-plot")
    browser.point(plot["left"] + places[3][0], plot["top"] + places[3][1])
    shown = browser.text("#tip").splitlines()
    assert shown[0] == "5,000 tokens/s, 12.00 GiB" and "does not fit" in shown
    assert "lora_r 64" in shown and "lora_target_modules q_proj v_proj o_proj" in shown
    browser.run("arguments[0].focus()", dots[0])
    assert browser.text("#tip").startswith("1,000 tokens/s, 4.00 GiB")
    table = [row.text for row in browser.find("#front-table tbody tr")]
    assert len(table) == 5 and "16" in browser.text("tr.chosen") and "3,000 yes" in browser.text("tr.chosen")
    assert "683 ms" in table[1] and table[3].endswith("5,000 no") and table[4].endswith("GiB yes")
    assert browser.find("#plot path") and browser.text("#peak-title")  # the choice's step


def test_settings_without_a_time_are_a_table_alone(browser, probed, tmp_path):
    rows = front_rows(probed[0])[-1:]
    path = tmp_path / "plan.html"
    path.write_text(step_page(*probed, Choices(rows, chosen=rows[0], budget_bytes=10 * GIB, keys=["lora_r"])))
    browser.show(path)
    assert not browser.find("#front-plot")[0].is_displayed() and len(browser.find("#front-table tbody tr")) == 1


def test_what_does_not_fit_is_said(browser, probed, tmp_path):
    result, record = probed
    path = tmp_path / "step.html"
    budget = {"budget_bytes": result["device_bytes"] - 1, "fits": False}
    path.write_text(step_page(result | budget, record))
    browser.show(path)
    assert browser.text("#verdict.bad").startswith("DOES NOT FIT")


@pytest.mark.slow
def test_the_page_of_a_real_model_is_small(browser, tmp_path):
    """MGM-2B, and with more events than there are places: below 3 MB, and drawn within seconds of a slow machine."""
    config = ProbeConfig(mode="predict", model="mgm-2b", max_seq_len=2048)
    for flags in ({}, {"gradient_accumulation_steps": 4, "gradient_checkpointing": False}):
        result, record = probe_with_record(replace(config, **flags))
        path = tmp_path / "step.html"
        path.write_text(step_page(result, record.device))
        assert path.stat().st_size < 3e6
        assert (len(record.device.events) > 20_000) == bool(flags)
        browser.show(path)
        assert browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
        assert json.loads(browser.run("return document.getElementById('data').textContent"))["words"]
        assert browser.text("#peak-title").endswith(f"({record.device.peak_bytes:,} bytes)")
