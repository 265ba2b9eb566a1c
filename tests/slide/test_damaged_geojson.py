"""The first files that ``fuzz_geojson.py`` makes are read, or refused in a sentence."""

from __future__ import annotations

from fuzz_geojson import fuzz


def test_damaged_geojson_is_read_or_refused_in_a_sentence() -> None:
    counts, faults = fuzz(range(250), seed=0)
    assert faults == []
    assert counts["read"] > 20
    assert counts["refused"] > 100
