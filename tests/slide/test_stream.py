from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from slides import DrawnSlide, damage_tile, make_slide

import maskattn.slide.stream as stream_module
import maskattn.slide.workers as workers_module
from maskattn.demo.train import BUNDLED_WEIGHTS
from maskattn.nn import VisionTransformer
from maskattn.nn.slide_model import SlideModel
from maskattn.nn.slide_models.two_stage import two_stages
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.reader import SlideReader
from maskattn.slide.stream import TileBatch, stream_tiles
from maskattn.slide.workers import count_workers, outlasts_decoding


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> DrawnSlide:
    return make_slide(tmp_path_factory.mktemp("slides") / "drawn.tif", 700, 500, downsamples=())


@pytest.fixture(scope="module")
def reader(slide: DrawnSlide) -> SlideReader:
    return SlideReader(slide.path)


@pytest.fixture(scope="module")
def grid(reader: SlideReader) -> TokenGrid:
    return whole_grid(reader, tile_px=64)


def whole_grid(reader: SlideReader, tile_px: int, spacing_um: float = 0.5) -> TokenGrid:
    return make_grid(reader.info, None, tile_px=tile_px, token_px=tile_px // 4, spacing_um=spacing_um, masked=False)


def joined(batches: list[TileBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.cat([batch.tiles_BCHW for batch in batches]),
        torch.cat([batch.rows_B for batch in batches]),
        torch.cat([batch.readable_B for batch in batches]),
    )


def test_every_kept_tile_comes_once_in_order(slide: DrawnSlide, reader: SlideReader, grid: TokenGrid) -> None:
    tiles, rows, readable = joined(list(stream_tiles(reader, grid, batch_size=7)))
    assert tiles.shape == (88, 3, 64, 64)
    assert (tiles.dtype, rows.dtype, readable.dtype) == (torch.uint8, torch.int64, torch.bool)
    assert rows.tolist() == list(range(88))
    assert readable.all()
    padded = np.full((512, 704, 3), 255, np.uint8)
    padded[:500, :700] = slide.rgb_HW3
    expected = padded.reshape(8, 64, 11, 64, 3).transpose(0, 2, 4, 1, 3).reshape(88, 3, 64, 64)
    np.testing.assert_array_equal(tiles.numpy(), expected)


def test_tiles_are_resampled_to_the_models_spacing(slide: DrawnSlide, reader: SlideReader) -> None:
    grid = whole_grid(reader, tile_px=64, spacing_um=1.0)
    tiles, _, _ = joined(list(stream_tiles(reader, grid, batch_size=4)))
    mean = slide.rgb_HW3[:128, :128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(tiles[0].numpy() - mean).max() <= 0.51


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 1), (16, 2), (1000, 2)])
def test_batch_size_and_workers_change_nothing(
    reader: SlideReader, grid: TokenGrid, batch_size: int, workers: int
) -> None:
    expected = joined(list(stream_tiles(reader, grid, batch_size=32)))
    batches = list(stream_tiles(reader, grid, batch_size=batch_size, workers=workers))
    assert [len(batch.rows_B) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for part, whole in zip(joined(batches), expected, strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_may_differ_in_size(reader: SlideReader, grid: TokenGrid, workers: int) -> None:
    expected = joined(list(stream_tiles(reader, grid, batch_size=32)))
    sizes = [1, 40, 7, 40]
    batches = list(stream_tiles(reader, grid, batch_size=sizes, workers=workers))
    assert [len(batch.rows_B) for batch in batches] == sizes
    for part, whole in zip(joined(batches), expected, strict=True):
        assert torch.equal(part, whole)
    for wrong in ([40, 40], [88, 0], [89]):
        with pytest.raises(ValueError, match="stream_tiles needs"):
            stream_tiles(reader, grid, batch_size=wrong)


def test_workers_decode_in_other_processes(
    reader: SlideReader, grid: TokenGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the tiles were decoded in this process")

    stream = stream_tiles(reader, grid, batch_size=32, workers=1)
    monkeypatch.setattr(SlideReader, "read_region", refuse)
    assert sum(len(batch.rows_B) for batch in stream) == 88


def test_chosen_rows_come_in_their_order(reader: SlideReader, grid: TokenGrid) -> None:
    tiles, _, _ = joined(list(stream_tiles(reader, grid, batch_size=32)))
    chosen, rows, _ = joined(list(stream_tiles(reader, grid, batch_size=2, rows=[5, 3, 80])))
    assert rows.tolist() == [5, 3, 80]
    assert torch.equal(chosen, tiles[[5, 3, 80]])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_tiles_give_no_batches(reader: SlideReader, grid: TokenGrid, workers: int) -> None:
    assert list(stream_tiles(reader, grid, batch_size=4, rows=[], workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_tile_comes_white_and_the_stream_goes_on(tmp_path: Path, workers: int) -> None:
    slide = make_slide(tmp_path / "s.tif", 768, 512, downsamples=())
    damage_tile(slide.path, 1)
    reader = SlideReader(slide.path)
    grid = whole_grid(reader, tile_px=256)
    tiles, rows, readable = joined(list(stream_tiles(reader, grid, batch_size=4, workers=workers)))
    assert rows.tolist() == list(range(6))
    assert readable.tolist() == [True, False, True, True, True, True]
    assert (tiles[1] == 255).all()
    np.testing.assert_array_equal(tiles[5].permute(1, 2, 0).numpy(), slide.rgb_HW3[256:512, 512:768])


def test_a_slide_that_vanishes_midway_gives_unreadable_tiles(tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "s.tif", 512, 256, downsamples=())
    reader = SlideReader(slide.path)
    grid = whole_grid(reader, tile_px=256)
    reader.close()
    slide.path.unlink()
    _, _, readable = joined(list(stream_tiles(reader, grid, batch_size=1)))
    assert not readable.any()


def test_decoding_stays_a_bounded_way_ahead(reader: SlideReader, grid: TokenGrid) -> None:
    seen: list[int] = []

    class Counting(SlideReader):
        def read_region(self, x_lv0: int, *args: object) -> np.ndarray:
            seen.append(x_lv0)
            return super().read_region(x_lv0, *args)

    stream = stream_tiles(Counting(reader.path), grid, batch_size=8)
    assert seen == []
    next(stream)
    assert 8 <= len(seen) <= 16  # the batch after it is on its way
    next(stream)
    assert 16 <= len(seen) <= 24
    stream.close()
    assert len(seen) <= 24


def test_no_more_workers_than_cores_or_batches(
    reader: SlideReader, grid: TokenGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    loader = stream_module.DataLoader

    def recording(*args: object, num_workers: int, **kwargs: object) -> object:
        asked.append(num_workers)
        kwargs = {key: kwargs[key] for key in ("batch_sampler", "collate_fn")}
        return loader(*args, num_workers=0, **kwargs)

    monkeypatch.setattr(stream_module, "DataLoader", recording)
    for batch_size, workers in ((1, 1000), (1000, 2)):
        assert (
            sum(len(batch.rows_B) for batch in stream_tiles(reader, grid, batch_size=batch_size, workers=workers)) == 88
        )
    assert asked == [min(len(os.sched_getaffinity(0)), 88), 1]


def test_pinning_without_a_gpu_is_silently_skipped(reader: SlideReader, grid: TokenGrid) -> None:
    batch = next(stream_tiles(reader, grid, batch_size=2, pin_memory=True))
    assert batch.tiles_BCHW.is_pinned() == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "got batch_size=0, workers=0"),
        ({"batch_size": 1, "workers": -1}, "got batch_size=1, workers=-1"),
        ({"batch_size": 1, "rows": [88]}, "the grid's 88 kept tiles, got 88 to 88"),
        ({"batch_size": 1, "rows": [-1, 4]}, "got -1 to 4"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    reader: SlideReader, grid: TokenGrid, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream_tiles(reader, grid, **arguments)


def test_real_slides_that_are_tiny_or_do_not_decode(shared_slides: Path) -> None:
    for name, readable in (("openslide_small.svs", True), ("openslide_unreadable.svs", False)):
        reader = SlideReader(shared_slides / name)
        (batch,) = stream_tiles(reader, whole_grid(reader, tile_px=64), batch_size=4)
        assert batch.tiles_BCHW.shape == (1, 3, 64, 64)
        assert batch.readable_B.tolist() == [readable]
        assert (batch.tiles_BCHW[..., 16:] == 255).all()
        assert (batch.tiles_BCHW[..., :16, :16] == 255).all().item() is not readable


def test_workers_are_started_automatically_only_for_large_slides(monkeypatch):
    monkeypatch.setattr(workers_module, "_cores", lambda: 8)
    numbers = (10, 1999, 2000, 50_000)
    assert [count_workers(None, tiles, tiles) for tiles in numbers] == [0, 0, 4, 4]
    assert [count_workers(None, tiles, tiles, needs_the_cores=True) for tiles in numbers] == [0, 0, 2, 2]


@pytest.mark.parametrize(("cores", "otherwise", "beside_a_long_model"), [(2, 1, 0), (4, 2, 1), (64, 4, 4)])
def test_workers_take_fewer_cores_from_a_model_that_outlasts_decoding(
    monkeypatch: pytest.MonkeyPatch, cores: int, otherwise: int, beside_a_long_model: int
) -> None:
    monkeypatch.setattr(workers_module, "_cores", lambda: cores)
    assert count_workers(None, 5000, 100) == otherwise
    assert count_workers(None, 5000, 100, needs_the_cores=True) == beside_a_long_model


def test_the_demonstrations_encoder_does_not_outlast_decoding_and_timms_smallest_does() -> None:
    bundled = two_stages(SlideModel.load(BUNDLED_WEIGHTS)).encoder
    assert bundled is not None
    assert not outlasts_decoding(bundled, bundled.token_px)
    assert outlasts_decoding(VisionTransformer(embed_dim=192, depth=12, num_heads=3), 16)
