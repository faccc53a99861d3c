"""Progress: live lines on a terminal, one plain line a piece elsewhere, nothing on stdout."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

import ptq_cli
from ptq_cli.cli.progress import Follow, Meter, duration
from ptq_cli.core.progress import Progress
from tests.builders import SAMPLE, ptq, random_weight, write_model
from tests.cli.test_terminal import on_terminal, start

LAYER = re.compile(
    r"\[(?P<done>\d)/4\] (?P<name>\S+) (?P<method>gptq|rtn) (?P<error>[\d.e-]+)"
    r"( \(([\d.]+x better than rtn|[\d.]+x rtn: worse|rtn is better on .*)\))?,"
    r" (under 1 s left|[\d.]+ (s|min \d+ s) left|in [\d.]+ s)"
)


class Screen:
    """What a terminal shows in the end: the few sequences that rich sends, and text."""

    def __init__(self) -> None:
        self.rows, self.row, self.column, self.cursor = [""], 0, 0, True

    def feed(self, text: str) -> Screen:
        for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
            if part == "\n":
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif part == "\r":
                self.column = 0
            elif part[0] != "\x1b":
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + part + line[self.column + len(part) :]
                self.column += len(part)
            elif part.endswith("A"):
                self.row -= int(part[2:-1] or 1)
            elif part.endswith("K"):
                self.rows[self.row] = ""
            elif part in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor = part.endswith("h")
            else:
                assert part.endswith("m"), repr(part)
        return self


# ---- speed, and how long still ----


def test_time_left_follows_the_work_not_the_pieces():
    meter = Meter(100.0)
    meter.add(Progress("quantize", 1, 10, "a", 900, 1000))
    assert meter.rate(109.0) == 100
    assert meter.rate(109.0, pieces=True) == pytest.approx(1 / 9)
    assert meter.left(109.0) == 1
    meter.add(Progress("quantize", 2, 10, "b", 1000, 1000))
    assert meter.left(110.0) == 0


def test_without_sizes_it_follows_the_pieces():
    meter = Meter(0.0)
    assert meter.left(1.0) is None
    meter.add(Progress("smooth", 2, 8))
    assert meter.left(4.0) == 12


def test_what_an_interrupted_run_did_is_no_speed():
    meter = Meter(0.0)
    meter.add(Progress("quantize", 5, 10, "a", 500, 1000, kept=True))
    assert meter.left(0.1) is None
    meter.add(Progress("quantize", 6, 10, "b", 600, 1000))
    assert meter.rate(10.0) == 10
    assert meter.left(10.0) == 40


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.4, "59 s"), (59.9, "1 min 0 s"),
        (3599.9, "1 h 0 min"), (3700, "1 h 1 min"), (100_000, "1 d 3 h"), (1e7, "115 d 17 h"),
    ],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


# ---- the live lines ----


def follow(job):
    """A listener that heard of a long run's three layers, at a clock that stands at 60 s."""
    report = ptq_cli.rtn(job, activations=["acts"], output="heard")
    clock = iter([0.0, *[60.0] * 1000])
    listener = Follow("gptq", quiet=True, clock=lambda: next(clock))
    for done, row in enumerate(report.rows[:3], 1):
        listener(Progress("quantize", done, 3000, row.module, done * 10**9, 3 * 10**12, row))
    return listener, max(report.rows[:3], key=lambda row: row.heldout_rel_err)


@pytest.mark.parametrize("width", [200, 80, 60, 20, 0])
@pytest.mark.parametrize("unicode", [True, False])
def test_live_lines_fit_and_the_count_comes_first(width, unicode, job):
    listener, worst = follow(job)
    lines = listener.lines(width, unicode)
    assert len(lines) == 3
    assert unicode or "".join(lines).isascii()
    assert width > 60 or lines[0].startswith("quantizing 3/3000 layers")
    if width >= 60:
        assert max(map(len, lines)) <= width
        for words in ("quantizing", "3/3000 layers", "50 M weights/s", "16 h 39 min left"):
            assert words in lines[0]
        assert lines[2] == f"worst {worst.module} {worst.heldout_rel_err:.3g}"


@pytest.mark.parametrize(
    ("columns", "env"),
    [
        *((60, {}), (80, {"PYTHONIOENCODING": "ascii"})),
        pytest.param(200, {}, marks=pytest.mark.slow),
    ],
)
def test_on_a_terminal(columns, env):
    model = SAMPLE / "model.safetensors"
    words = ("gptq", model, "-o", "out", "--top", 2, "--sweeps", 12, "--workers", 1)
    code, shown = on_terminal(*words, columns=columns, env=env)
    assert code == 0
    assert re.search(r"quantizing .*\d+/28 layers.* left.* [kM] weights/s", shown)
    assert re.search(r"last  .*gptq [\d.e-]+ \([\d.]+x\)", shown)
    assert re.search(r"worst .* [\d.e-]+", shown)
    live = [
        part
        for part in re.split(r"[\r\n]|\x1b\[[0-9;?]*\w", shown)
        if part.startswith("quantizing")
    ]
    assert max(map(len, live)) < columns
    assert env == {} or shown.isascii()
    screen = Screen().feed(shown)
    assert screen.cursor
    assert not [row for row in screen.rows if "quantizing" in row or "worst " in row[:6]]
    assert any("written: out" in row for row in screen.rows)


@pytest.mark.parametrize("env", [{"CI": "true"}, {"TERM": "dumb"}], ids=["CI", "dumb"])
def test_no_line_is_drawn_anew_for_a_build_server(env, job):
    code, shown = on_terminal("gptq", job, "--activations", "acts", "-o", "out", env=env)
    assert code == 0
    assert len(re.findall(r"^\[\d/4\] layers\.0\.\w+ ", shown, re.M)) == 4
    assert not re.search(r"\x1b\[[0-9?]*[A-LhK]", shown)


# ---- plain lines ----


def test_one_line_a_layer(job):
    outcome = ptq("gptq", job, "--activations", "acts", "-o", "out", "--json")
    *layers, wrote = outcome.progress
    rows = {row["module"]: row for row in outcome.document["layers"]}
    found = [LAYER.fullmatch(line) for line in layers]
    assert all(found), layers
    assert [match["done"] for match in found] == ["1", "2", "3", "4"]
    assert {match["name"] for match in found} == set(rows)
    for match in found:
        row = rows[match["name"]]
        assert match["method"] == row["method"]
        assert float(match["error"]) == pytest.approx(row["heldout_rel_err"], rel=5e-3)
    assert found[-1][0].split(", ")[-1].startswith("in ")
    assert re.fullmatch(r"\[1/1\] wrote model\.safetensors, in [\d.]+ s", wrote)


def test_quiet_says_nothing(job):
    for words in (
        ("calibrate", job, "--activations", "acts", "-o", "c.safetensors"),
        ("gptq", job, "--calibration", "c.safetensors", "-o", "out"),
        ("eval", job, "out", "--calibration", "c.safetensors"),
        ("pack", "out", "-o", "packed"),
    ):
        outcome = ptq(*words, "--quiet")
        assert (outcome.code, outcome.err, outcome.progress) == (0, "", ())


def test_every_long_phase_is_told(one_block):
    tokens = ("--tokens", SAMPLE / "eval_tokens.npy", "--nsamples", 2)
    phases = {
        ("calibrate", one_block, *tokens, "-o", "c.safetensors"): {"calibrated": 5},
        ("smoothquant", one_block, "-o", "smooth"): {"smoothed": 2, "layer": 7, "wrote": 1},
        ("gptq", one_block, *tokens, "-o", "out"): {"layer": 7, "wrote": 1},
        ("eval", one_block, "out", *tokens): {"layer": 7, "ran": 3, "predicted": 1},
        ("pack", "out", "--format", "gptq", "-o", "packed"): {"repacked": 7, "wrote": 1},
    }
    for words, expected in phases.items():
        outcome = ptq(*words)
        assert outcome.code == 0, outcome.err
        found: dict[str, int] = {}
        for line in outcome.progress:
            verb = re.sub(r"^\[[ \d]+/\d+\] ", "", line).split(" ")[0]
            key = "layer" if "." in verb else verb
            found[key] = found.get(key, 0) + 1
        assert found == expected, words


def test_layers_of_an_interrupted_run_are_kept_and_named_so(job):
    def stop(step):
        if step.done == 2:
            raise KeyboardInterrupt

    run = {"activations": ["acts"], "output": "out", "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        ptq_cli.gptq(job, listen=stop, **run)
    outcome = ptq("gptq", job, "--activations", "acts", "-o", "out", "--workers", 1)
    assert outcome.code == 0
    kept = ["kept from the interrupted run" in line for line in outcome.progress]
    assert kept == [True, True, True, False, False]  # the second and third are one unit


def test_hostile_names_in_plain_lines(tmp_path):
    names = ("\x1b[2J", "a\nb", "a\u202eb")
    model = write_model(
        tmp_path / "m.safetensors", {f"{name}.weight": random_weight(4, 8) for name in names}
    )
    outcome = ptq("pack", model, "-o", "out")
    assert len(outcome.progress) == 4
    text = "\n".join(outcome.progress)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J" in text


def test_a_listener_that_cannot_write_does_not_end_the_run(job):
    with open("/dev/full", "w") as full:
        result = start("pack", job, "-o", "out", "--json", stdout=subprocess.PIPE, stderr=full)
    assert result.returncode == 0
    assert json.loads(result.stdout)["output"] == "out"
