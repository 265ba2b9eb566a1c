"""The viewer and the report in headless Chromium: pages, pointer, keys, links, narrow and wide, light and dark.

Skipped where there is no Chromium or no playwright; the server's own tests need neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_of_three import EVIL

from maskattn.slide.report import write_report
from maskattn.viewer.server import ViewerServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not installed")

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
_SHOWN = """() => document.querySelector(".square img") && document.querySelector("canvas.map-square")
  && !document.querySelector(".leaflet-tile:not(.leaflet-tile-loaded)")"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Chromium has no sandbox for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, viewer: ViewerServer) -> Iterator[Callable[..., Any]]:
    """Opens the viewer; whatever a page says on its console, or asks of another host, fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_it(fragment: str = "", size: dict[str, int] = WIDE, scheme: str = "light", url: str = "") -> Any:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: _note_strange(request.url, url or viewer.url, complaints))
        page.goto((url or viewer.url) + fragment)
        if not url:
            page.wait_for_function(_SHOWN)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def _note_strange(asked: str, own: str, complaints: list[str]) -> None:
    if not asked.startswith((own, "data:", "blob:")):
        complaints.append(f"asks for {asked}")


def map_colours(page: Any) -> list[int]:
    """Red less blue, and alpha, of every pixel of the map's squares, summed."""
    return page.evaluate(
        """() => {
          let [red, alpha] = [0, 0];
          for (const canvas of document.querySelectorAll("canvas.map-square")) {
            const copy = Object.assign(document.createElement("canvas"), { width: 256, height: 256 });
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const { data } = context.getImageData(0, 0, 256, 256);
            for (let at = 0; at < data.length; at += 4) {
              red += (data[at] - data[at + 2]) * (data[at + 3] > 0);
              alpha += data[at + 3];
            }
          }
          return [red, alpha];
        }"""
    )


def text_of(page: Any, selector: str) -> str:
    return page.locator(selector).inner_text()


def test_the_page_shows_the_slide_its_map_and_the_table_without_a_complaint(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert text_of(page, "#slide-name") == "plain"
    assert page.locator("#table tbody tr").count() == 3
    assert page.locator("#which option").count() == 3
    assert text_of(page, "#scale-bar span").endswith("µm")
    drawn = page.evaluate(
        "() => [...document.querySelectorAll('.square img')].every((image) => image.naturalWidth > 0)"
    )
    assert drawn
    assert map_colours(page)[1] > 0
    assert EVIL in text_of(page, "#table")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_in_either_theme(
    open_page: Callable[..., Any], size: dict[str, int], scheme: str
) -> None:
    page = open_page(size=size, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    box = page.locator("#map").bounding_box()
    assert box["width"] >= min(size["width"], 390)
    assert box["height"] >= 300
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    # The picture can be looked at where a folder is named for it.
    if folder := os.environ.get("MASKATTN_SCREENSHOTS"):
        page.locator("#theme").click()
        page.screenshot(path=Path(folder) / f"viewer_{size['width']}_{scheme}.png")


def test_the_pointer_reads_values_and_a_click_opens_the_tile(open_page: Callable[..., Any]) -> None:
    page = open_page()
    box = page.locator("#map").bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*centre)
    page.wait_for_function("() => document.getElementById('hover').textContent.includes('attention:')")
    said = text_of(page, "#hover").splitlines()
    assert said[0].startswith("x 2")
    assert [line.split(":")[0] for line in said[1:]] == ["benign", "low/high", "attention"]
    page.mouse.click(*centre)
    page.locator("#place").wait_for()
    assert "Token in row" in text_of(page, "#place-said")
    page.wait_for_function("() => document.getElementById('tile-image').naturalWidth === 256")
    rows = page.locator("#values tbody tr")
    assert rows.count() == 3
    # What hovers is what the panel says of the token.
    assert rows.nth(0).locator("td").nth(0).inner_text() == said[1].split(": ")[1]
    colourful = """() => {
      const data = document.getElementById("tile-map").getContext("2d").getImageData(0, 0, 256, 256).data;
      return data.some((value, at) => at % 4 === 0 && Math.abs(value - data[at + 2]) > 20);
    }"""
    page.wait_for_function(colourful)
    page.keyboard.press("Escape")
    assert page.locator("#place").is_hidden()


def test_opacity_threshold_and_colours_change_the_map_without_the_server(open_page: Callable[..., Any]) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    red, alpha = map_colours(page)
    page.locator("#opacity").fill("35")
    assert map_colours(page)[1] == pytest.approx(alpha / 2, rel=0.02)
    page.locator("#opacity").fill("70")
    page.locator("#threshold").fill("60")
    assert map_colours(page)[1] < 0.8 * alpha
    page.locator("#threshold").fill("0")
    page.locator("#colours").select_option("PuOr_r")
    assert map_colours(page)[0] != red
    page.locator("#colours").select_option("RdBu_r")
    assert map_colours(page) == [red, alpha]
    page.locator("#shown").uncheck()
    assert page.locator("canvas.map-square").count() == 0
    assert not [url for url in asked if "/maps/" in url]


def test_every_control_has_a_key(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.keyboard.press("m")
    assert page.evaluate("document.activeElement.id") == "map"
    before = page.evaluate("location.hash")
    page.keyboard.press("+")
    page.wait_for_function("(before) => location.hash !== before", arg=before)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    page.locator("#place").wait_for()
    for key, which in (("2", "1"), ("0", "2"), ("1", "0")):
        page.keyboard.press(key)
        page.wait_for_function("(which) => document.getElementById('which').value === which", arg=which)
    page.keyboard.press("o")
    assert not page.locator("#shown").is_checked()
    page.keyboard.press("o")
    page.keyboard.press("]")
    page.keyboard.press(".")
    assert (page.locator("#opacity").input_value(), page.locator("#threshold").input_value()) == ("80", "5")
    page.keyboard.press("k")
    assert page.locator("#colours").input_value() == "PuOr_r"
    page.keyboard.press("g")
    assert page.locator("#grey").is_checked()
    page.keyboard.press("n")
    page.wait_for_function("(name) => document.getElementById('slide-name').textContent === name", arg=EVIL)
    page.keyboard.press("p")
    page.wait_for_function("() => document.getElementById('slide-name').textContent === 'plain'")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#keys").is_hidden()
    page.keyboard.press("s")
    assert page.evaluate("document.activeElement.closest('tr') !== null")
    page.keyboard.press("f")
    page.keyboard.type("no such")
    assert page.locator("#table tbody tr").count() == 0


def test_everything_is_reached_by_the_tab_key(open_page: Callable[..., Any]) -> None:
    page = open_page()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    controls = {"show-slides", "copy-link", "theme", "help", "filter", "map", "which", "shown", "opacity", "threshold"}
    assert controls | {"fade", "grey", "colours", "plain", EVIL, "slide id", "Strongest tiles"} <= reached


def test_the_table_sorts_by_any_column_and_finds(open_page: Callable[..., Any]) -> None:
    page = open_page()
    names = page.locator("#table tbody button")
    assert names.all_inner_texts() == ["plain", EVIL, "broken"]
    page.get_by_role("button", name="status").click()
    assert names.all_inner_texts()[0] == "broken"
    page.get_by_role("button", name="status").click()
    assert names.all_inner_texts()[-1] == "broken"
    assert page.locator("#table th[aria-sort='descending']").count() == 1
    page.locator("#filter").fill("BROK")
    assert names.all_inner_texts() == ["broken"]


def test_a_slide_that_failed_says_why(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#table tbody button", has_text="broken").click()
    page.wait_for_function("() => document.getElementById('problem').textContent.includes('got none')")
    assert page.locator("#problem").is_visible()
    page.locator("#table tbody button", has_text="plain").click()
    page.wait_for_function(_SHOWN)
    assert page.locator("#problem").is_hidden()


def test_a_link_leads_to_a_place_and_a_class(open_page: Callable[..., Any]) -> None:
    page = open_page("#slide=plain&map=low%2Fhigh&x=260&y=210&zoom=1")
    assert page.locator("#which").input_value() == "1"
    address = page.evaluate("location.hash")
    for part in ("slide=plain", "x=260", "y=210", "zoom=1", "map=low%2Fhigh"):
        assert part in address
    page.evaluate("location.hash = 'slide=plain&map=attention&x=100&y=100&zoom=0'")
    page.wait_for_function("() => document.getElementById('which').value === '2'")


def test_the_strongest_tiles_are_a_button_away(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#strongest summary").click()
    first = page.locator("#strongest button").first
    said = first.inner_text()
    first.click()
    page.locator("#place").wait_for()
    which = int(page.locator("#which").input_value())
    assert page.locator("#values tbody tr").nth(which).locator("td").nth(1).inner_text() == said


def test_the_report_opens_and_prints_without_a_complaint(
    open_page: Callable[..., Any], out: Path, tmp_path: Path
) -> None:
    report = write_report(out, tmp_path / "report.html")
    for size in (WIDE, NARROW):
        page = open_page(size=size, url=report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        loaded = page.evaluate("() => [...document.images].every((image) => image.naturalWidth > 0)")
        assert loaded
        narrowest = page.evaluate(
            "() => Math.min(...[...document.querySelectorAll('.card dd')].map((dd) => dd.offsetWidth))"
        )
        assert narrowest > 120  # beside the longest term too
        cut = page.evaluate(
            "() => [...document.querySelectorAll('.slide .wide')].some((it) => it.scrollWidth > it.clientWidth)"
        )
        assert not cut
        if folder := os.environ.get("MASKATTN_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"report_{size['width']}.png")
    data = page.pdf()
    assert data.startswith(b"%PDF")
    assert data.count(b"/Type /Page\n") >= 3  # every slide begins a page
