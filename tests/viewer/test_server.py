"""The server: what it answers, whom it refuses, and that no address leads out of what is shown."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz_addresses import SECRET, answer_to, check
from PIL import Image
from run_of_three import EVIL
from served import serving
from small_slides import SHAPE, write_slide

from maskattn.slide.finished import build_mosaic, open_maps
from maskattn.slide.manifest import SlideJob
from maskattn.viewer.answers import CHUNK, Answers
from maskattn.viewer.assets import read_assets
from maskattn.viewer.catalogue import Entry, read_catalogue
from maskattn.viewer.opened_slide import OpenedSlide
from maskattn.viewer.server import ViewerServer


def get(server: ViewerServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def get_json(server: ViewerServer, path: str) -> dict:
    status, body, _ = get(server, path)
    assert status == 200, body
    return json.loads(body)


def test_the_page_and_its_files_are_there_and_may_load_nothing_else(viewer: ViewerServer) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/assets/app.js", "text/javascript"),
        ("/assets/leaflet.js", "text/javascript"),
    ):
        status, body, headers = get(viewer, path)
        assert status == 200
        assert len(body) > 1000
        assert headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"//" not in get(viewer, "/")[1].replace(b"<!DOCTYPE", b"")


def test_leaflet_is_the_one_that_its_makers_published() -> None:
    # The digests of version 1.9.4 that leafletjs.com gives for its scripts' integrity.
    assets = read_assets()
    published = {
        "/assets/leaflet.js": "db49d009c841f5ca34a888c96511ae936fd9f5533e90d8b2c4d57596f4e5641a",
        "/assets/leaflet.css": "a7837102824184820dfa198d1ebcd109ff6d0ff9a2672a074b9a1b4d147d04c6",
    }
    assert {path: hashlib.sha256(assets[path][1]).hexdigest() for path in published} == published


def test_the_table_has_every_slide_and_column_of_the_run(viewer: ViewerServer, out: Path) -> None:
    run = get_json(viewer, "/api/run")
    assert [slide["id"] for slide in run["slides"]] == ["plain", EVIL, "broken"]
    assert [slide["maps"] for slide in run["slides"]] == [True, True, False]
    header = (out / "summary.csv").read_text().splitlines()[0].split(",")
    assert set(header) <= set(run["columns"])
    assert run["slides"][0]["row"]["tiles"] == str(
        json.loads((out / "plain" / "prediction.json").read_text())["counts"]["kept_tiles"]
    )


def test_a_slide_tells_its_size_scores_and_maps_and_a_broken_one_its_reason(viewer: ViewerServer, out: Path) -> None:
    about = get_json(viewer, "/api/slides/0")
    assert (about["height"], about["width"]) == SHAPE
    assert about["maps"] == ["benign", "low/high", "attention"]
    said = json.loads((out / "plain" / "prediction.json").read_text())
    assert about["scores"] == pytest.approx(said["scores"])
    assert get_json(viewer, "/api/slides/2")["problem"].startswith("a slide must have outputs")


def test_chunks_are_the_maps_own_values(viewer: ViewerServer, out: Path) -> None:
    with open_maps(out / "plain" / "relevance.h5") as table:
        for index in range(3):
            about = get_json(viewer, f"/api/slides/0/maps/{index}")
            finest = build_mosaic(table, index).levels[0]
            assert about["levels"][0] == list(finest.shape[::-1])
            status, body, headers = get(viewer, f"/api/slides/0/maps/{index}/0/0_0.f32")
            assert status == 200
            assert "max-age" in headers["Cache-Control"]
            values = np.frombuffer(body, "<f4").reshape(CHUNK, CHUNK)
            np.testing.assert_array_equal(values[: finest.shape[0], : finest.shape[1]], finest)


def test_a_place_has_the_values_of_its_token_and_tile(viewer: ViewerServer, out: Path) -> None:
    with h5py.File(out / "plain" / "relevance.h5") as file:
        tile = 3
        x, y = (int(value) for value in file["coords"][tile])
        keep = file["tokens/keep"][tile]
        row, column = (int(value) for value in np.argwhere(keep)[0])
        side = int(file["coords"].attrs["patch_size_level0"]) / keep.shape[0]
        about = get_json(viewer, f"/api/slides/0/at/{x + (column + 0.5) * side:.2f}_{y + (row + 0.5) * side:.2f}")
        assert (about["tile"], about["corner"]) == (tile, [x, y])
        assert about["values"] == pytest.approx([*file["tiles/relevance"][:, tile], file["tiles/attention"][tile]])
        assert (about["token"]["row"], about["token"]["column"], about["token"]["kept"]) == (row, column, True)
        assert about["token"]["values"][:2] == pytest.approx(list(file["tokens/relevance"][:, tile, row, column]))
    assert get_json(viewer, "/api/slides/0/at/-5_0") == {"tile": None}


def test_the_strongest_tiles_are_those_of_the_table(viewer: ViewerServer, out: Path) -> None:
    with h5py.File(out / "plain" / "relevance.h5") as file:
        relevance_KT = file["tiles/relevance"][:]
    for index, relevance_T in enumerate(relevance_KT):
        strongest = get_json(viewer, f"/api/slides/0/maps/{index}")["strongest"]
        expected = {"for": sorted(relevance_T, reverse=True), "against": sorted(relevance_T)}
        for name, sign in (("for", 1), ("against", -1)):
            values = [value for value in expected[name][:12] if sign * value > 0]
            assert [tile["value"] for tile in strongest[name]] == pytest.approx([float(value) for value in values])
    assert (relevance_KT > 0).any()
    assert (relevance_KT < 0).any()
    assert not get_json(viewer, "/api/slides/0/maps/2")["strongest"]["against"]


def test_attention_below_zero_is_shown_on_both_sides_of_zero(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    with h5py.File(tmp_path / "out" / "plain" / "relevance.h5", "r+") as file:
        attention_T = file["tiles/attention"][:]
        attention_T[3] = -2 * attention_T.max()
        file["tiles/attention"][:] = attention_T
    with serving(tmp_path / "out") as server:
        about = get_json(server, "/api/slides/0/maps/2")
    assert (about["kind"], about["of_class"]) == ("diverging", False)
    assert about["limits"][0] == -about["limits"][1] < 0
    assert [tile["tile"] for tile in about["strongest"]["against"]] == [3]


def test_a_tile_is_shown_as_the_slide_has_it(viewer: ViewerServer) -> None:
    status, body, _ = get(viewer, "/api/slides/0/tiles/3.jpg")
    assert status == 200
    assert Image.open(io.BytesIO(body)).size == (256, 256)
    assert get(viewer, "/api/slides/0/tiles/9999.jpg")[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "", "127.0.0.1:x"]
)
def test_a_request_to_another_host_is_refused(viewer: ViewerServer, host: str) -> None:
    status, body, _ = get(viewer, "/api/run", Host=host)
    assert status == 403
    assert "127.0.0.1 or localhost" in json.loads(body)["error"]


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:1", "[::1]:8651", "LOCALHOST"])
def test_a_tunnel_may_have_another_port(viewer: ViewerServer, host: str) -> None:
    assert get(viewer, "/api/run", Host=host)[0] == 200


def test_two_hosts_or_none_are_refused(viewer: ViewerServer) -> None:
    port = viewer.server_port
    for hosts in ("", f"Host: 127.0.0.1:{port}\r\nHost: evil.example\r\n"):
        request = f"GET / HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode()
        assert answer_to(port, request)[0] == 403


def test_pages_of_other_sites_may_link_here_and_no_more(viewer: ViewerServer) -> None:
    for site in ("cross-site", "same-site"):
        assert get(viewer, "/api/run", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate")[0] == 403
        assert get(viewer, "/", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
        assert get(viewer, "/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate")[0] == 200
    assert get(viewer, "/api/run", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0] == 200


def test_the_server_listens_on_the_loopback_address_alone(viewer: ViewerServer) -> None:
    assert viewer.server_address[0] == "127.0.0.1"
    assert viewer.socket.family == socket.AF_INET


def test_other_methods_are_refused_and_head_has_no_body(viewer: ViewerServer) -> None:
    status, body, _ = get(viewer, "/", "POST")
    assert status == 405
    assert "the viewer takes GET and HEAD" in json.loads(body)["error"]
    status, body, headers = get(viewer, "/", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


def test_no_address_leads_out_and_each_error_is_a_sentence(out: Path) -> None:
    (out.parent / "secret.txt").write_bytes(SECRET)
    with serving(out) as server:
        statuses = check(server.server_port, 300, seed=1)
    assert statuses[200] > 5
    assert statuses[404] > 50
    assert statuses[403] > 20


def test_a_slide_alone_a_folder_and_one_without_a_spacing_can_be_looked_at(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "bare.tiff", spacing_um=None)
    for shown in (path, tmp_path):
        with serving(shown) as server:
            about = get_json(server, "/api/slides/0")
            assert about["maps"] == []
            assert about["spacing_um"] is None
            status, body, _ = get(server, f"/api/slides/0/squares/{about['levels'] - 1}/1_0.jpg")
            assert status == 200
            assert Image.open(io.BytesIO(body)).size == (256, 256)
            assert get(server, "/api/slides/0/maps/0")[0] == 422


def test_a_slide_whose_file_has_gone_keeps_its_maps_and_is_hatched(out: Path, tmp_path: Path) -> None:
    moved = tmp_path / "out"
    moved.mkdir()
    (moved / "plain").mkdir()
    for name in ("relevance.h5", "prediction.json"):
        (moved / "plain" / name).write_bytes((out / "plain" / name).read_bytes())
    said = json.loads((moved / "plain" / "prediction.json").read_text())
    said["slide"]["path"] = str(tmp_path / "gone" / "disc.tiff")
    (moved / "plain" / "prediction.json").write_text(json.dumps(said))
    with serving(moved) as server:
        about = get_json(server, "/api/slides/0")
        assert "which does not exist" in about["problem"]
        assert get_json(server, "/api/slides/0/maps/0")["levels"]
        status, body, _ = get(server, f"/api/slides/0/squares/{about['levels'] - 1}/0_0.jpg")
        assert status == 200
        grey = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
        assert np.abs(grey[..., 0] - grey[..., 1]).max() < 4
        assert 30 < np.ptp(grey) < 60
    with serving(moved, slides_dir=out.parent) as server:
        assert get_json(server, "/api/slides/0")["problem"] == ""


def test_many_slides_stay_open_no_longer_than_they_are_needed(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "disc.tiff")
    table = tmp_path / "many.csv"
    table.write_text("slide_id,slide_path\n" + "".join(f"s{index},{path.name}\n" for index in range(12)))
    answers = Answers(read_catalogue(table))
    for _ in range(2):
        for index in range(12):
            assert answers.answer(f"/api/slides/{index}/squares/10/0_0.jpg").status == 200
    answers.close()


def test_an_address_is_taken_as_written(viewer: ViewerServer) -> None:
    for path in ("/api/slides/00", "/api/slides/+1", "/api/slides/1 ", "/api/slides/%31", "/api/run/", "/assets/"):
        assert (
            answer_to(
                viewer.server_port,
                f"GET {path.replace(' ', '%20')} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
            )[0]
            == 404
        )


def test_a_small_answer_does_not_wait_for_its_head_to_be_acknowledged(viewer: ViewerServer) -> None:
    took = []
    connection = http.client.HTTPConnection("127.0.0.1", viewer.server_port, timeout=60)
    for _ in range(40):
        start = time.perf_counter()
        connection.request("GET", "/nothing")
        connection.getresponse().read()
        took.append(time.perf_counter() - start)
    connection.close()
    # A delayed acknowledgement takes 40 ms at the least; a quarter of the requests meets a quiet moment.
    assert sorted(took)[10] < 0.03


def test_the_first_slide_is_open_before_it_is_asked_for(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = read_catalogue(out)
    assert catalogue.entries[catalogue.first].has_maps
    looked_over = threading.Event()
    monkeypatch.setattr(OpenedSlide, "look_over", lambda opened: looked_over.set())
    answers = Answers(catalogue)
    answers.open_first()
    assert looked_over.wait(60)
    answers.close()


def test_a_square_that_is_asked_for_while_its_slide_is_closed_comes_all_the_same(tmp_path: Path) -> None:
    opened = OpenedSlide(Entry("disc", {}, job=SlideJob("disc", write_slide(tmp_path / "disc.tiff"))), None)
    finest = opened.pyramid.levels - 1
    before = opened.square(finest, 0, 0)
    opened.close()
    assert opened.square(finest, 0, 0) == before
