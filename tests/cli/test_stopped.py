"""Ctrl-C while a command that has no output folder works: no scratch folder and no half of a file
stays behind, and one line says whether anything is kept."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from ptq_cli.cli import signals
from ptq_cli.storage.interruption import State, Stopped
from tests.builders import ptq
from tests.run.tiny_llama import tiny_llama
from tests.stopping import stop_at, stopped

MEASURE = "ptq_cli.run.measure_choices"
ALLOCATE = [
    (f"{MEASURE}:Trials", 1),  # the folder is there, and empty
    (f"{MEASURE}:quantize_unit", 5),
    ("ptq_cli.calibration.trials:forward_block", 7),  # in a thread
    ("ptq_cli.calibration.streams:Streams.advance", 2),
    ("ptq_cli.storage.choices:ChoiceTable.save", 1),
    ("os:replace", 1),  # of the table, written beside it
    ("shutil:rmtree", 1),  # the end of the folder
    ("os:replace", 6),  # of the recipe
]
EVALUATE = [
    ("ptq_cli.evaluation.errors:_row", 9),  # between two sites
    ("ptq_cli.evaluation.perplexity:_run", 1),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama with its tokens, and `out`, what rtn makes of it."""
    model = tiny_llama(tmp_path_factory.mktemp("stopped") / "m", 64)
    assert ptq("rtn", model, "-g", 16, "-o", model / "out").code == 0
    return model


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Where scratch files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def _signals(monkeypatch):
    """The command line's answers to signals, and Python's own afterwards."""
    before = {number: signal.getsignal(number) for number in signals.WORDS}
    monkeypatch.setattr(State, "arrived", 0)
    monkeypatch.setattr(State, "keeps", False)

    def leave(number):
        raise AssertionError("the process would end at once")

    monkeypatch.setattr(signals, "leave", leave)
    signals.install()
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


def commands(llama):
    tokens = ("--tokens", llama / "tokens.npy")
    choices = ("--choices", "W2A16,W6A16", "-g", 16, "--target-bpw", 5, "--method", "rtn")
    where = ("--table", "t.json", "-o", "r.toml")
    return {
        "allocate": ("allocate", llama, *tokens, *choices, *where),
        "eval": ("eval", llama, llama / "out", *tokens, "--report", "e.json"),
    }


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    ("command", "place", "number"),
    [("allocate", *at) for at in ALLOCATE] + [("eval", *at) for at in EVALUATE],
)
def test_nothing_stays_behind(llama, scratch, monkeypatch, command, place, number):
    kept = []

    def answer():
        kept.extend(path.name for path in scratch.iterdir())
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(place, number, answer, monkeypatch.setattr)
    with pytest.raises(Stopped):
        ptq(*commands(llama)[command])
    assert bool(kept) == ((place, number) != ALLOCATE[-1])  # it had a scratch folder
    assert list(scratch.iterdir()) == []
    assert {path.name for path in Path().iterdir()} <= {"scratch", "t.json"}
    assert not State.open_works
    assert State.keeps == (command == "allocate")


@pytest.mark.parametrize(
    ("command", "place", "more"),
    [
        ("allocate", ALLOCATE[1][0], "; finished work is kept, the same command goes on"),
        ("eval", EVALUATE[0][0], ""),
    ],
)
def test_the_process_ends_with_a_line(llama, scratch, command, place, more):
    code, err = stopped(place, 2, "SIGINT", *commands(llama)[command], "-q")
    assert (code, err) == (130, f"ptq: interrupted{more}\n")
    assert list(scratch.iterdir()) == []
