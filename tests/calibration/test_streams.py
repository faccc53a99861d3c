"""The two models of a run in sequence, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.from_tokens import TokenSource, token_source
from ptq_cli.calibration.stream import Stream
from ptq_cli.calibration.streams import Streams
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.tokens import TokenSettings, read_tokens

SAMPLE = Path(__file__).parents[2] / "sample_data"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> TokenSource:
    """Sixteen batches, of the sample."""
    monkeypatch.setattr("ptq_cli.calibration.from_tokens.BATCH_TOKENS", 64)
    checkpoint = open_checkpoint(SAMPLE)
    path = SAMPLE / "calibration_tokens.npy"
    tokens = read_tokens(TokenSettings(path, nsamples=32, seq_len=32), checkpoint)
    source = token_source(checkpoint, tokens, (8, 512), feedback=True, correct=True)
    assert len(source.batches) == 16
    return source


def entered(source: TokenSource, work: Path, workers: int) -> Streams:
    streams = Streams(source, work, workers, None)
    streams.enter(0)
    return streams


def inputs_of_both(streams: Streams) -> list[Any]:
    site = next(name for name, place in streams.source.places.items() if place.order == (1, 0))
    return [np.concatenate(list(stream.inputs(site))) for stream in streams.streams]


def test_the_float_model_goes_on_beside_the_rounding(source: TokenSource, tmp_path: Path) -> None:
    """With a second thread it has left the stage at the end of the block, alone; without one it
    waits. Both see the same afterwards, behind a boundary too."""
    found = []
    for workers in (1, 2):
        streams = entered(source, tmp_path / f"{workers}", workers)
        for order in streams.orders((0, 3)):
            main, float_model = streams.streams
            with streams.float_ahead():
                assert (main.block, main.stage) == order
            ahead = (float_model.block, float_model.stage) > order
            assert ahead == (workers == 2)
            streams.advance({})
        assert [(x.block, x.stage) for x in streams.streams] == [(1, 0)] * 2
        assert all(x.boundary(1).whole and not x.boundary(0).whole for x in streams.streams)
        found.append(inputs_of_both(streams))
    for one, two in zip(*found, strict=True):
        assert one.tobytes() == two.tobytes()


def test_where_the_rounding_stops_the_float_model_begins_no_more(
    source: TokenSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = entered(source, tmp_path, 2)
    begun = []

    def slow(self: Stream, batch: Any, state: Any) -> None:
        begun.append(batch.key)
        time.sleep(0.1)

    monkeypatch.setattr(Stream, "_keep", slow)
    with pytest.raises(KeyboardInterrupt), streams.float_ahead():
        raise KeyboardInterrupt
    assert len(begun) < len(source.batches) / 2
    assert streams.streams[1].stage == 0


def test_what_fails_in_the_float_model_is_raised(
    source: TokenSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = entered(source, tmp_path, 2)
    rounded = []

    def fail(self: Stream, batch: Any, state: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Stream, "_keep", fail)
    with pytest.raises(MemoryError), streams.float_ahead():
        rounded.append("unit")
    assert rounded
