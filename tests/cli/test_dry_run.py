"""--dry-run: what a run would do, what it would take, what it would refuse; nothing is written."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
import tomllib
from collections import namedtuple
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from ptq_cli.commands import estimate
from ptq_cli.commands.api import rtn
from ptq_cli.commands.estimate import Piece, Workers, document
from ptq_cli.commands.quantize import prepare
from ptq_cli.storage import scratch
from ptq_cli.storage.machine import multiply_adds
from tests.builders import ROOT, ptq, random_weight, tree, write_model

SCHEMA = json.loads((ROOT / "ptq_cli" / "commands" / "dry_run.schema.json").read_text())
TOKENS = ("--tokens", ROOT / "sample_data" / "calibration_tokens.npy", "--nsamples", 4)
RATE = 1e9  # multiply-adds a second

QUANTIZING = [
    ["gptq"],
    ["gptq", "--asym", "--bits", 3, "--format", "gptq_v2"],
    ["gptq", *TOKENS],
    ["rtn", "--include", "lm_head"],
    ["pack", "--bits", 8, "--group-size", -1],
    ["awq", "--no-compare", "--n-grid", 2],
    ["smoothquant"],
    ["smoothquant", "--bits", 16],
    ["smoothquant", *TOKENS],
]
IDS = [" ".join(map(str, words[:3])) for words in QUANTIZING]


def dry(*words, code=0, leftover=False):
    """The document of a dry run, which leaves nothing behind, and no work folder but `leftover`."""
    before = tree(Path())
    outcome = ptq(*words, "--dry-run", "--json")
    assert outcome.code == code, outcome.err
    assert tree(Path()) == before
    assert bool(list(Path().glob("*.partial"))) == leftover
    document = outcome.document
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    return document


@pytest.mark.parametrize("words", QUANTIZING, ids=IDS)
def test_the_plan_is_what_the_run_does(sample, words):
    command = [words[0], sample, *words[1:], "-o", "out"]
    planned = dry(*command)
    outcome = ptq(*command, "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.document
    for key in ("layers", "left_alone", "bytes_before", "bytes_after", "bits_per_weight"):
        if key != "left_alone" or report["layers"]:
            assert planned["totals"][key] == pytest.approx(report["totals"][key]), key
    rows = {row["module"]: row for row in report["layers"]}
    assert {row["module"] for row in planned["layers"]} == set(rows)
    for row in planned["layers"]:
        found = rows[row["module"]]
        for key in ("layer", "shape", "bits", "group_size", "sym", "bytes", "bits_per_weight"):
            assert row[key] == found[key], (row["module"], key)
    reasons = {row["tensor"]: row["reason"] for row in planned["left_alone"]}
    for row in report["left_alone"]:
        assert reasons[row["tensor"]] == row["reason"]
    units = [unit for unit in planned["units"] if not unit["unit"].startswith("smoothing ")]
    assert {module for unit in units for module in unit["layers"]} == set(rows)
    sites = 8 if words[0] in ("awq", "smoothquant") else 0
    assert len(planned["units"]) - len(units) == sites == len(report.get("sites", ()))
    assert planned["output"] == "out"
    written = sum(map(len, tree(Path("out")).values()))
    assert written <= planned["disk"]["needed"] < planned["disk"]["free"]


def test_repacking_calibrating_and_evaluating(sample, monkeypatch):
    monkeypatch.setattr(estimate, "multiply_adds", lambda _: RATE)
    assert ptq("rtn", sample, "-o", "q").code == 0
    planned = dry("pack", "q", "--format", "gguf", "--group-size", 32, "-o", "out")
    outcome = ptq("pack", "q", "--format", "gguf", "--group-size", 32, "-o", "out", "--json")
    assert planned["method"] == "repack"
    assert planned["totals"]["layers"] == outcome.document["totals"]["layers"]
    assert planned["totals"]["bytes_after"] == outcome.document["totals"]["bytes_after"]
    for own in ([], TOKENS):
        planned = dry("calibrate", sample, *own, "-o", "c.safetensors")
        outcome = ptq("calibrate", sample, *own, "-o", "c.safetensors", "--force", "--json")
        sites = outcome.document["sites"]
        assert {unit["unit"]: unit["layers"] for unit in planned["units"]} == {
            site: entry["linears"] for site, entry in sites.items()
        }
        size = Path("c.safetensors").stat().st_size
        assert size / 2 < planned["totals"]["bytes_after"] < 2 * size
        Path("c.safetensors").unlink()
    planned = dry("eval", sample, "q")
    assert planned["output"] is None
    assert len(planned["units"]) == 14
    assert dry("eval", sample, "q", *TOKENS)["time"]["seconds"] > planned["time"]["seconds"]


def test_it_is_said_in_words(sample):
    outcome = ptq("gptq", sample, "--dry-run")
    for words in (
        "gptq, 4 bits g128, 4.19 bits/weight: 14: model.layers.{0-1}.",
        "copied (embedding): 1: model.embed_tokens.weight",
        "ptq gptq would round 14 layers at 4.19 bits/weight and copy 7 tensors: 1.75 MiB",
        "output: sample_data-gptq-w4g128",
        "a rough estimate",
        "nothing was written",
    ):
        assert words in outcome.out, words
    assert outcome.err == ""
    assert len(outcome.out.splitlines()) < 20


def test_layers_without_statistics_say_why_they_are_rounded_to_nearest(tmp_path, job):
    (tmp_path / "acts" / "layers.0.o_proj.npy").unlink()
    command = ["gptq", job, "--activations", "acts", "--fallback", "rtn"]
    rows = {row["module"]: row for row in dry(*command)["layers"]}
    assert rows["layers.0.o_proj"]["method"] == "rtn"
    assert rows["layers.0.o_proj"]["reason"] == "no statistics for it"
    assert rows["layers.0.q_proj"]["method"] == "gptq"
    outcome = ptq(*command, "--dry-run")
    assert "rounded to nearest (no statistics for it), " in outcome.out
    assert ": 1: layers.0.o_proj\n" in outcome.out
    assert len(outcome.warnings) == len({*outcome.warnings}) > 0
    assert ptq(*command, "--dry-run", "--strict").code == 1


# ---- mistakes that a run finds before it works ----


def refused(*words):
    before = tree(Path())
    real = ptq(*words)
    found = ptq(*words, "--dry-run")
    assert (found.code, found.errors) == (real.code, real.errors)
    assert found.code == 1
    assert tree(Path()) == before
    return found.errors[0]


def test_an_output_that_exists(job):
    os.mkdir("out")
    for command in ("gptq", "rtn", "pack"):
        assert "exists already" in refused(command, job, "-o", "out")
    Path("out/precious").touch()
    assert "did not write" in refused("rtn", job, "-o", "out", "--force")
    assert "being read" in refused("rtn", job, "-o", job, "--force")
    Path("c.safetensors").touch()
    command = ("calibrate", job, "--activations", "acts", "-o", "c.safetensors")
    assert "exists already" in refused(*command)


def test_a_place_where_nothing_can_be_written(job):
    assert "no such folder" in refused("rtn", job, "-o", "nowhere/out")
    assert "no such folder" in refused("rtn", job, "-o", "out", "--report", "nowhere/r.json")
    assert "not a name" in refused("rtn", job, "-o", "..")


def test_another_run_at_work(job):
    os.mkdir("out.partial")
    other = os.open("out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "another run is working" in refused("rtn", job, "-o", "out")
    os.close(other)


def test_files_of_somebody_else_where_a_run_would_work(job):
    os.mkdir("out.partial")
    Path("out.partial/letter.txt").touch()
    assert "not a run's" in refused("rtn", job, "-o", "out")


def interrupted(job):
    """What a run leaves that is stopped after two layers."""

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rtn(job, output="out", workers=1, listen=stop)


def test_an_interrupted_run_is_gone_on_with_or_refused(job):
    command = ("rtn", job, "-o", "out")
    interrupted(job)
    planned = dry(*command, leftover=True)
    assert planned["interrupted"] == len(list(Path("out.partial/units").glob("*.json"))) > 0
    assert "goes on with an interrupted run" in ptq(*command, "--dry-run").out
    assert "other bits" in refused(*command, "--bits", 3)
    assert dry(*command, "--bits", 3, "--restart", leftover=True)["interrupted"] is None


def test_too_little_space(sample, monkeypatch):
    needed = dry("rtn", sample, "-o", "out")["disk"]["needed"]
    with_tokens = dry("gptq", sample, *TOKENS, "-o", "out")["disk"]
    assert with_tokens["needed"] > needed + with_tokens["scratch"] // 2
    fields = namedtuple("fields", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: fields(needed - 1, 1))
    tokens = [[name, sample, *TOKENS, "-o", "out"] for name in ("gptq", "awq")]
    for command in (["rtn", sample, "-o", "out"], *tokens):
        assert "are needed" in refused(*command)
        assert "are needed" in ptq(*command, "--dry-run", "--json").err
    monkeypatch.setattr(os, "statvfs", lambda _: fields(needed, 1))
    assert ptq("rtn", sample, "-o", "out", "--dry-run").code == 0
    assert "are needed" in refused("gptq", sample, *TOKENS, "-o", "out")


def test_a_full_disk_is_found_by_every_command_before_it_works(sample, monkeypatch):
    assert ptq("rtn", sample, "-o", "q").code == 0
    fields = namedtuple("fields", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: fields(100_000, 1))
    for command in (
        ["awq", sample, "-o", "out"],
        ["smoothquant", sample, "--bits", 16, "-o", "out"],
        ["pack", sample, "-o", "out"],
        ["pack", "q", "--format", "gptq", "-o", "out"],
        ["calibrate", sample, "-o", "out"],
        ["calibrate", sample, *TOKENS, "-o", "out"],
        ["eval", sample, "q", *TOKENS],
    ):
        assert "are needed, 0.1 MB free" in refused(*command)
        assert not Path("out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["1KiB", "1GiB"])
@pytest.mark.parametrize(
    "command", [["gptq"], ["calibrate"], ["gptq", "--drift", 0], ["awq", "--no-compare"]]
)
def test_scratch_files_take_what_was_said(sample, monkeypatch, command, memory):
    words = [command[0], sample, *command[1:], *TOKENS, "--max-memory", memory, "-o", "out"]
    said = dry(*words)["disk"]["scratch"]
    most = []

    def watched(real):
        def method(self, *arguments):
            result = real(self, *arguments)
            files = [path for path in Path("out.partial/stream").rglob("*") if path.is_file()]
            most.append(sum(path.stat().st_size for path in files))
            return result

        return method

    kept = scratch.MemoryScratch if memory == "1GiB" else scratch.FileScratch
    for cls, name in ((kept, "put"), (scratch.Rows, "write"), (scratch.Rows, "finish")):
        monkeypatch.setattr(cls, name, watched(getattr(cls, name)))
    assert ptq(*words).code == 0
    ahead = (
        2 if (command[0], memory) == ("awq", "1KiB") else 1
    )  # it looks ahead, for which as much is kept free
    assert max(most) <= said < 1.5 * ahead * max(most)


# ---- what it takes ----


def test_memory_of_those_who_work_at_once(sample):
    alone = dry("gptq", sample, "--workers", 1)["memory"]
    assert alone["largest_bytes"] < alone["peak_bytes"] < alone["largest_bytes"] + (100 << 20)
    three = dry("gptq", sample, "--workers", 3)["memory"]
    assert three["workers"] == 3
    assert three["peak_bytes"] > alone["peak_bytes"] + 2 * alone["largest_bytes"] * 0.9
    tight = dry("gptq", sample, "--workers", 3, "--max-memory", "1MiB")["memory"]
    assert tight["alone"]
    assert tight["peak_bytes"] < three["peak_bytes"]


def test_states_are_counted_where_they_are(sample):
    """In memory where they fit a quarter of it, else in files, of which a batch of inputs is read
    at a time, and for the drift the inputs and residuals of both models."""
    rows, width, hidden = 1024, 384, 128
    for command, drifts in (("gptq", True), ("awq", True), ("calibrate", False)):
        words = [command, sample, *TOKENS, "--workers", 1, "-o", "out", "--max-memory"]
        there, files = (dry(*words, memory) for memory in ("1GiB", "1KiB"))
        states = files["disk"]["scratch"] - there["disk"]["scratch"]
        read = 4 * rows * (width + 2 * (width + hidden) * drifts)
        more = there["memory"]["peak_bytes"] - files["memory"]["peak_bytes"]
        assert more == states - read
        assert states > 0
        assert there["disk"]["scratch"] > 0  # what survives a kill


def test_peaks_by_hand():
    pieces = [Piece(str(m), (), 0, m << 20) for m in (10, 500, 300, 200)]
    process = 60 << 20
    assert Workers(1, 1 << 40).peak(pieces) == (500 << 20) + process
    assert Workers(2, 1 << 40).peak(pieces) == (800 << 20) + 3 * process
    assert Workers(2, 600 << 20).peak(pieces) == (600 << 20) + 3 * process
    assert Workers(2, 100 << 20).peak(pieces) == (500 << 20) + 3 * process
    assert Workers(4, 1 << 40, True, 7).peak(pieces) == 7 + (500 << 20) + process
    assert Workers(2, 1 << 40).peak([]) == 3 * process


def seconds(model, command="gptq", rate=RATE, **settings):
    job = prepare(command, model, settings)
    return document(job.estimate(), rate)["time"]["seconds"]


def test_more_work_takes_more_time(tmp_path):
    small, large = (
        write_model(tmp_path / f"{n}.safetensors", {"a.weight": random_weight(n, n)})
        for n in (256, 2048)
    )
    assert 0 < seconds(small, "rtn") < seconds(large, "rtn")
    assert 0 < seconds(large, "rtn", rate=1e12) < seconds(large, "rtn")


def test_each_method_that_is_tried_is_counted(sample):
    assert seconds(sample, "rtn") < seconds(sample, "gptq")

    def smoothed(**settings):
        job = prepare("awq", sample, settings)
        return document(job.estimate(), RATE)["time"]["seconds"]

    assert smoothed(compare=False) < smoothed(compare=True)


def test_the_measurement_is_short_and_positive():
    begin = time.process_time()
    assert multiply_adds(1) > 1e6
    assert time.process_time() - begin < 2


# ---- very large models ----

CHILD = """
import sys
from ptq_cli.cli.main import run
code = run(sys.argv[1:])
# VmHWM, not ru_maxrss: that one begins with what the parent had.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(f"peak {peak} KiB", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """A model of 70 billion parameters that is headers and nothing else."""
    folder = tmp_path_factory.mktemp("headers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from headers import write_headers
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert write_headers(folder, "70b") > 140e9
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(["inspect", "."], ["gptq", ".", "--dry-run", "--json"]),
        pytest.param(["rtn", ".", "--dry-run"], marks=pytest.mark.slow),
        pytest.param(
            ["pack", ".", "--dry-run", "--format", "compressed-tensors"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_seventy_billion_parameters_in_200_mib(headers, words):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], cwd=headers, capture_output=True, text=True
    )
    peak = int(done.stderr.rsplit("peak ", 1)[1].split()[0])
    assert peak < 200 << 10, f"{peak >> 10} MiB"
    if "--dry-run" in words:  # there is no room for 35 GB everywhere
        assert done.returncode == 0 or "are needed" in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
    if "gptq" in words:
        content = json.loads(done.stdout)
        assert content["totals"]["layers"] == 560
        assert content["time"]["seconds"] > 10


@pytest.mark.slow(5)
def test_seventy_billion_parameters_are_shared_out_in_seconds(headers, tmp_path):
    """Once errors are there."""
    import resource
    import subprocess

    from ptq_cli.commands.plan_allocation import prepare_allocation
    from ptq_cli.plan.allocation import Budget

    table, recipe = tmp_path / "t.json", tmp_path / "r.toml"
    job = prepare_allocation("rtn", headers, {}, Budget(bits_per_weight=4.5), table=table)
    random = np.random.default_rng(1)
    for group in job.work.groups:
        for module in group.modules:
            errors = {c: {"rel_err": random.exponential(4.0 ** -int(c[1]))} for c in group.layers}
            job.table.errors[module] = {
                c: {**x, "heldout_rel_err": None} for c, x in errors.items()
            }
    job.table.save()
    words = ["allocate", ".", "--method", "rtn", "--target-size", "40GiB", "--table", table]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words), "-o", str(recipe)],
        cwd=headers, capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.rsplit("peak ", 1)[1].split()[0]) < 300 << 10
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    size = tomllib.loads(recipe.read_text())["allocation"]["bytes"]
    assert (40 << 30) * 0.9999 < size <= 40 << 30
