"""Tokens: shapes, masks, draws, warnings, text; and scratch files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.scratch import FileScratch, MemoryScratch, Rows, Scratch
from ptq_cli.storage.tokens import Tokens, TokenSettings, read_tokens

SAMPLE = Path(__file__).parents[2] / "sample_data"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(SAMPLE)


def read(checkpoint: Checkpoint, folder: Path, ids: object, **settings: object) -> Tokens:
    np.save(folder / "ids.npy", ids)  # type: ignore[arg-type]
    return read_tokens(TokenSettings(tokens=folder / "ids.npy", **settings), checkpoint)  # type: ignore[arg-type]


def test_one_dimension_is_cut_into_sequences(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokens = read(checkpoint, tmp_path, np.arange(11, dtype=np.uint16), seq_len=3)
    assert tokens.ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert tokens.mask.all()
    assert not tokens.warnings


def test_samples_are_drawn_by_seed_and_keep_their_order(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ids = np.arange(400).reshape(100, 4)
    first, same, other = (
        read(checkpoint, tmp_path, ids, nsamples=20, seed=seed).ids for seed in (1, 1, 2)
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert (np.diff(first[:, 0]) > 0).all()


def test_repeated_sequences_are_warned_of(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokens = read(checkpoint, tmp_path, np.array([[1, 2], [3, 4], [1, 2], [1, 2]]))
    assert tokens.warnings[0].endswith("2 of 4 sequences repeat an earlier one")


def test_a_mask_hides_padding_and_its_ids(checkpoint: Checkpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.array([[1, 1, 0], [1, 0, 0]]))
    ids = np.array([[5, 6, 99999], [7, -1, -1]])
    tokens = read(checkpoint, tmp_path, ids, mask=tmp_path / "mask.npy")
    assert tokens.ids.tolist() == [[5, 6, 0], [7, 0, 0]]
    assert tokens.mask.sum() == 3


@pytest.mark.parametrize(
    ("ids", "settings", "words"),
    [
        (np.zeros((2, 2)), {}, "not integers"),
        (np.arange(9), {}, "--seq-len"),
        (np.arange(9), {"seq_len": 10}, "fewer than a sequence"),
        (np.zeros((2, 3), int), {"seq_len": 4}, "no sequence of 4"),
        (np.zeros((2, 3, 4), int), {}, "tokens are [n, length]"),
        (np.array([[1, 2048]]), {}, "token 2048, but the model has 2048"),
        (np.array([[-1, 2]]), {}, "token -1"),
    ],
)
def test_what_does_not_fit_is_an_error(
    checkpoint: Checkpoint, tmp_path: Path, ids: object, settings: dict[str, int], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(checkpoint, tmp_path, ids, **settings)
    assert words in str(caught.value)


def test_masks_that_do_not_fit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for mask, words in ((np.ones((1, 2)), "not integers"), (np.ones((2, 2), int), "[2, 2]"),
                        (np.zeros((1, 2), int), "hides every token")):  # fmt: skip
        np.save(tmp_path / "mask.npy", mask)
        with pytest.raises(InputError) as caught:
            read(checkpoint, tmp_path, np.array([[1, 2]]), mask=tmp_path / "mask.npy")
        assert words in str(caught.value)


def test_text_needs_the_extra(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "a.txt").write_text("def f(): pass")
    with pytest.raises(InputError, match=r"ptq\[text\]"):
        read_tokens(TokenSettings(text=tmp_path / "a.txt"), checkpoint)


def test_text_through_the_models_tokenizer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = "def f(x):\n    return x + 1\n" * 40
    (tmp_path / "a.txt").write_text(text)
    tokens = read_tokens(TokenSettings(text=tmp_path / "a.txt", seq_len=16), checkpoint)
    own = tokenizers.Tokenizer.from_file(str(SAMPLE / "tokenizer.json")).encode(text).ids
    assert tokens.ids.ravel().tolist() == own[: tokens.ids.size]
    some = read_tokens(TokenSettings(text=tmp_path / "a.txt", seq_len=16), checkpoint, 5)
    drawn = np.sort(np.random.default_rng(0).choice(len(tokens.ids), 5, replace=False))
    assert np.array_equal(some.ids, tokens.ids[drawn])
    asked = TokenSettings(text=tmp_path / "a.txt", seq_len=16, nsamples=7)
    assert len(read_tokens(asked, checkpoint, 5).ids) == 7
    assert len(
        read_tokens(TokenSettings(text=tmp_path / "a.txt", seq_len=16), checkpoint, 999).ids
    ) == len(tokens.ids)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_tokens(TokenSettings(text=tmp_path / "b.txt"), checkpoint)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(SAMPLE / "model.safetensors", bare)
    with pytest.raises(InputError, match="no tokenizer"):
        read_tokens(TokenSettings(text=tmp_path / "a.txt"), open_checkpoint(bare))


@pytest.mark.parametrize("make", [MemoryScratch, lambda: FileScratch(Path("now"))])
def test_scratch_gives_back_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Scratch]
) -> None:
    monkeypatch.chdir(tmp_path)
    scratch = make()
    arrays = {"a": np.arange(6).reshape(2, 3), "inputs/x": np.zeros((0, 4), np.float32)}
    scratch.put("k", arrays)
    scratch.put("k", arrays | {"b": np.ones((3, 1), np.float32)[::-1]})
    assert scratch.names("k") == ["a", "inputs/x", "b"]
    for name in ("a", "inputs/x", "b"):
        assert len(scratch.get("k", name)) == {"a": 2, "inputs/x": 0, "b": 3}[name]
    assert np.array_equal(scratch.get("k", "a"), arrays["a"])
    scratch.put("k", {"t": arrays["a"].T})
    assert scratch.get("k", "t").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert scratch.get("k", "t").flags.c_contiguous  # what is computed from it is the same
    scratch.drop()


def test_arrays_in_memory_keep_nothing_else_alive_and_nothing_changes_them() -> None:
    scratch, whole = MemoryScratch(), np.arange(12.0).reshape(4, 3)
    scratch.put("k", {"part": whole[:2], "whole": whole, "twice": whole, "flat": whole.reshape(-1)})
    found = {name: scratch.get("k", name) for name in scratch.names("k")}
    assert not np.shares_memory(found["part"], whole)
    assert found["whole"] is found["twice"]
    assert np.shares_memory(found["flat"], whole)
    for array in found.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    whole[0] = 5  # whoever made it still may
    assert found["part"][0].tolist() == [0, 1, 2]


def written(path: Path) -> Rows:
    rows = Rows(path, [slice(0, 2), slice(2, 5)], 2)
    rows.begin()
    rows.write(slice(2, 5), np.ones((3, 2), np.float32))
    rows.write(slice(0, 2), np.zeros((2, 2), np.float32))
    assert not rows.whole
    rows.finish()
    return rows


def test_rows_are_whole_only_when_closed(tmp_path: Path) -> None:
    rows = written(tmp_path / "new" / "r")
    assert rows.whole
    assert rows.read(slice(1, 3)).tolist() == [[0, 0], [1, 1]]
    assert not Rows(rows.path, [slice(0, 5)], 2).whole  # of other batches
    rows.drop()
    assert not rows.whole


def test_rows_are_written_over_those_that_were_dropped(tmp_path: Path) -> None:
    """Which may be longer: another run's, that stopped."""
    first = written(tmp_path / "r.0")
    inode = first.path.stat().st_ino
    with open(first.path, "ab") as file:
        file.write(bytes(100))
    first.drop()
    second = written(tmp_path / "r.1")
    assert second.whole
    assert second.path.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["r.1"]


@pytest.mark.parametrize("place", [0, 17, 39, 40, 47])
def test_rows_that_are_damaged_are_not_there(tmp_path: Path, place: int) -> None:
    """As a power loss leaves what was not yet on the disk: cut, empty, zeros."""
    rows = written(tmp_path / "r")
    content = rows.path.read_bytes()
    assert len(content) == 4 * 5 * 2 + 2 * 4
    flipped = bytes([content[place] ^ 1])
    for damaged in (
        content[:place],
        content[:place] + flipped + content[place + 1 :],
        content[:place] + bytes(len(content) - place),
    ):
        rows.path.write_bytes(damaged)
        assert rows.whole == (damaged == content)
    rows.path.write_bytes(content)
    assert rows.whole
