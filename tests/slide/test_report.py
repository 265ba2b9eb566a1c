"""The report is self-contained, gives every slide's outcome, shows the right tiles, and escapes names."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from run_of_three import EVIL, write_run
from small_slides import small_model, write_slide
from typer.testing import CliRunner

import maskattn
from maskattn.cli.app import app
from maskattn.errors import OutputError
from maskattn.slide.finished import read_run
from maskattn.slide.manifest import SlideJob
from maskattn.slide.report import show, write_report
from maskattn.slide.report.markup import element
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides


class Page(HTMLParser):
    """The elements of a page with their attributes, and all its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.elements if tag == name)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page(write_report(out).read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file(page: Page) -> None:
    sources = [attributes["src"] or "" for attributes in page.all("img")]
    assert len(sources) > 10
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not [name for name, _ in page.elements if name in ("script", "link", "iframe", "object", "embed")]
    assert all((attributes["href"] or "").startswith("#") for attributes in page.all("a"))
    assert any("default-src 'none'" in (attributes.get("content") or "") for attributes in page.all("meta"))


def test_every_link_of_the_table_leads_to_a_slides_part(page: Page) -> None:
    targets = {attributes.get("id") for attributes in page.all("section")}
    links = [(attributes["href"] or "")[1:] for attributes in page.all("a")]
    assert len(links) == 3
    assert set(links) <= targets


def test_a_name_is_text_whatever_it_holds(page: Page) -> None:
    assert EVIL in page.text
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert all(attributes["src"] != "x" for attributes in page.all("img"))


def test_a_slide_that_failed_is_there_with_its_reason(page: Page, out: Path) -> None:
    reason = read_run(out).slide("broken").reason
    assert reason
    assert page.text.count(reason) == 2


def test_scores_verdicts_counts_versions_and_the_model_are_reported(page: Page, out: Path) -> None:
    said = json.loads((out / "plain" / "prediction.json").read_text())
    for name, score in said["scores"].items():
        assert f"{name}{score:.4f}" in page.text
    assert f"{said['counts']['skipped_tokens']:,} tokens are glass" in page.text
    assert f"Map check {said['maps']['benign']['map_check']}" in page.text
    assert said["model"]["sha256"] in page.text
    assert said["model"]["note"] in page.text
    assert said["versions"]["torch"] in page.text


def test_the_tiles_shown_are_those_of_most_and_least_relevance(out: Path) -> None:
    html = show(out, "plain", top=2).html
    with h5py.File(out / "plain" / "relevance.h5") as file:
        relevance_KT, coords_T2 = file["tiles/relevance"][:], file["coords"][:]
    titles = [attributes["alt"] for attributes in Page(html).all("img")]
    shown = {title for title in titles if title and title.startswith("Tile at")}
    expected = set()
    for relevance_T in relevance_KT:
        order = np.argsort(relevance_T)
        chosen = [tile for tile in order[:2] if relevance_T[tile] < 0]
        chosen += [tile for tile in order[-2:] if relevance_T[tile] > 0]
        expected |= {f"Tile at x {coords_T2[tile, 0]}, y {coords_T2[tile, 1]}" for tile in chosen}
    assert shown == expected
    assert sum((title or "").startswith("Token map") for title in titles) == sum(
        (title or "").startswith("Tile at") for title in titles
    )


def test_the_thumbnail_shows_the_slide_with_a_green_line_around_its_tissue(out: Path) -> None:
    first = next(Page(show(out, "plain").html).all("img"))
    data = base64.b64decode((first["src"] or "").partition(",")[2])
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert image.shape[:2] == (420, 560)
    assert np.abs(image[210, 260] - (200, 110, 160)).max() < 60  # tissue at the disc's centre
    assert (image[5, 5] > 230).all()  # glass in the corner
    green = (image[..., 1] - image[..., 0] > 60) & (image[..., 1] - image[..., 2] > 30)
    rows, columns = np.nonzero(green)
    assert rows.size > 200
    assert rows.min() > 50
    assert columns.max() < 420


def test_a_slide_whose_file_has_gone_keeps_its_figures_and_is_found_where_it_moved(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    recorded = json.loads((copy / "plain" / "prediction.json").read_text())
    recorded["slide"]["path"] = "/nowhere/disc.tiff"
    (copy / "plain" / "prediction.json").write_text(json.dumps(recorded))
    html = show(copy, "plain").html
    assert "There are no pictures: a slide must be a file" in html
    assert "--slides" in html
    assert "<img" not in html
    assert "Predicted" in html
    assert "<img" in show(copy, "plain", slides_dir=out.parent).html


def test_a_slide_of_another_size_is_not_shown_under_these_maps(out: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "disc.tiff", np.full((128, 128, 3), 200, np.uint8))
    html = show(out, "plain", slides_dir=tmp_path).html
    assert "a slide must be the one that was run, got 128 × 128 px" in html


def test_broken_maps_are_reported_as_broken(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "plain" / "relevance.h5").write_bytes(b"half")
    assert "There are no pictures: a slide&#x27;s maps must be a relevance.h5" in show(copy, "plain").html


def test_a_run_without_tokens_shows_its_tiles(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    run_slides([SlideJob("plain", slide)], small_model(), RunSettings(tmp_path / "out", batch_size=8))
    html = show(tmp_path / "out", "plain").html
    assert "the line surrounds the tiles that took part" in html
    assert "Token map" not in html


def test_a_notebook_is_handed_html_under_the_packages_own_name(out: Path) -> None:
    shown = maskattn.slide.show(out, "plain")
    assert shown._repr_html_() == shown.html
    assert shown.html.startswith('<div class="maskattn cell"><style>')
    assert repr(shown) == "ShownSlide('plain')"
    with pytest.raises(ValueError, match="got 'other'; it has 'plain'"):
        maskattn.slide.show(out, "other")


def test_a_folder_without_outputs_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got neither in"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="which is not a folder"):
        write_report(tmp_path / "absent")


def test_ids_of_a_summary_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "prediction.json").write_text("{}")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "summary.csv").write_text("slide_id,status,reason\n../secret,ok,\n/etc,ok,\nplain,failed,why\n")
    assert [slide.slide_id for slide in read_run(folder).slides] == ["plain"]


def test_the_report_is_complete_or_absent(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name must end in"):
        write_report(out, out / "summary.csv")
    assert write_report(out, tmp_path).name == "report.html"
    with pytest.raises(OutputError, match="the report must be written completely"):
        write_report(out, tmp_path / "absent" / "report.html")


def test_the_command_writes_it_and_says_where(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    done = CliRunner().invoke(app, ["report", str(out), "--out", str(path), "--top", "1"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"report      {path}\n"
    assert path.read_text(encoding="utf-8").endswith("</html>\n")


def test_a_run_writes_its_report_where_it_is_asked_to(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    done = CliRunner().invoke(app, ["infer", str(slide), "--out", str(tmp_path / "out"), "--report"])
    assert done.exit_code == 0, done.output
    assert f"report: {tmp_path / 'out' / 'report.html'}\n" in done.stdout
    assert 'href="#slide-0">disc</a>' in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_markup_escapes_text_and_attributes_alike() -> None:
    assert element("p", 'a<b>"', title='"><x') == '<p title="&quot;&gt;&lt;x">a&lt;b&gt;&quot;</p>'
    assert element("p", element("b", "x"), hidden=True, lang=False) == "<p hidden><b>x</b></p>"
    assert element("p", "\ud800") == "<p>�</p>"
