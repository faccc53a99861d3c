"""Outputs of a budget are never larger than it, and nearly as large; a plan of them is quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import ptq
from tests.cli.allocate.words import CHOICES, bits, done, is_alike, types, weights_size


@pytest.fixture(scope="module")
def ends(llama, errors):
    """The bytes of all layers at the smallest choice and at the largest, by format."""
    found: dict[str, tuple[int, int]] = {}

    def look(fmt: str) -> tuple[int, int]:
        if fmt not in found:
            run = ("--format", fmt, *CHOICES[fmt], "--table", errors(fmt), "--method", "rtn")
            looked = ptq("allocate", llama, *run, "--target-bpw", 6, "--dry-run", "--json").document
            low, *_, high = (own["bytes"] for own in looked["choices"].values())
            found[fmt] = low, high
        return found[fmt]

    return look


@pytest.mark.parametrize("fmt", [*CHOICES, "x.gguf"])
@pytest.mark.parametrize("part", [0.1, 0.7])
def test_an_output_is_never_above_its_target_and_what_runtimes_fuse_is_alike(
    llama, errors, ends, fmt, part
):
    kind, output = ("gguf", Path("x.gguf")) if fmt == "x.gguf" else (fmt, Path("out"))
    low, high = ends(kind)
    low, high = (low + 6000, high + 2500) if fmt == "x.gguf" else (low, high)  # with the job
    target = int(low + part * (high - low))
    run = ("--format", kind, *CHOICES[kind], "--table", errors(kind), "--target-size", target)
    done("rtn", llama, *run, "-o", output)
    assert target * 0.93 < weights_size(output) <= target
    found = types(output) if fmt == "x.gguf" else bits()
    assert len(set(found.values())) > 1
    if kind != "gguf":  # where every tensor is its own
        assert is_alike(found)


@pytest.mark.parametrize("fmt", ["ptq", "gguf"])
def test_headers_of_several_files_count(llama, errors, fmt):
    target = {"ptq": 31000, "gguf": 21500}[fmt]
    run = ("--format", fmt, *CHOICES[fmt], "--table", errors(fmt), "--target-size", target)
    done("rtn", llama, *run, "-o", "whole")
    done("rtn", llama, *run, "-o", "out", "--max-shard-size", "8KB")
    found = [path for path in Path("out").iterdir() if path.suffix in (".safetensors", ".gguf")]
    assert len(found) > 1
    assert target * 0.93 < weights_size(Path("out")) <= target
    assert target * 0.93 < weights_size(Path("whole")) <= target


@pytest.mark.slow(2)
@pytest.mark.parametrize("fmt", ["ptq", "compressed-tensors", "mlx", "gguf", "x.gguf"])
def test_an_output_comes_within_half_a_percent_of_its_target(whole_sample, fmt):
    kind, output = ("gguf", Path("x.gguf")) if fmt == "x.gguf" else (fmt, Path("out"))
    choices = CHOICES["gguf"] if kind == "gguf" else ("--choices", "W3A16,W4A16,W6A16,W8A16")
    choices = (*choices, "-g", 64) if kind == "mlx" else choices
    common = ("--format", kind, *choices, "--table", "t.json")
    low, *_, high = (
        own["bytes"]
        for own in ptq("allocate", whole_sample, *common, "--target-bpw", 6, "--dry-run", "--json",
                       "--method", "rtn").document["choices"].values()
    )  # fmt: skip
    for part in (0.3, 0.6):
        target = int(low + part * (high - low))
        done("rtn", whole_sample, *common, "--target-size", target, "-o", output, "--force")
        assert target * 0.995 <= weights_size(output) <= target
