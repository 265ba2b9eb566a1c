"""The evaluation's page in headless Chromium: wide and narrow, light and dark, on paper, without a complaint.

Skipped where there is no Chromium or no playwright.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from maskattn.evaluation import Predictions
from maskattn.evaluation.comparison import compare
from maskattn.evaluation.report import write_evaluation
from maskattn.evaluation.results import evaluate_predictions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not installed")

CONTRAST = """() => {
  const light = (colour) => {
    const rgb = colour.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255);
    const linear = rgb.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("svg.drawing g[id^=xtick] text, svg.drawing g[id^=legend] text")];
  return texts.map((text) => {
    const [low, high] = [light(getComputedStyle(text).fill), paper].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 2, 80)
    names = ("a class whose name is long enough to be cut", "<b>&amp;</b>")

    def model(noise, **more):
        positive = 1 / (1 + np.exp(-(2 * truth - 1 + draw.normal(0, noise, 80))))
        return Predictions("binary", "msi", range(80), np.stack([1 - positive, positive], 1), truth, names, **more)

    one, other = model(1.0, fold_P=np.arange(80) % 4), model(2.0)
    found = [evaluate_predictions(one, "vit", resamples=100), evaluate_predictions(other, "abmil", resamples=100)]
    out = tmp_path_factory.mktemp("evaluation")
    return write_evaluation(out, found, [("vit", "abmil", compare(one, other, resamples=100))])


@pytest.fixture(scope="module")
def browser():
    # Chromium has no sandbox for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_its_drawings_can_be_read(browser, report, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or complaints.append(asked.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg.drawing").count() == 6
    assert page.locator("figure").first.bounding_box()["width"] > 0.25 * width
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 20
    assert min(contrasts) > 4.5
    assert page.locator("b").count() == 0  # a name is no markup
    assert complaints == []
    page.close()


def test_the_page_prints(browser, report):
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    assert page.pdf().startswith(b"%PDF")
    page.close()
