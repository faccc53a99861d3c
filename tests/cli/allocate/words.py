"""Words and looks that the tests of budgets share. (Its models and tables are in conftest.py.)"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.quantized import open_quantized
from tests.builders import ptq
from tests.refusals import refused

BLOCKS = ("model.layers.0.", "model.layers.1.")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# By the format that they are for; each has what it can hold.
CHOICES = {
    "ptq": ("--choices", "W2A16,W3A16,W4A16,W6A16", "-g", 16),
    "compressed-tensors": ("--choices", "W3A16,W4A16,W8A16", "-g", 32),
    "mlx": ("--choices", "W2A16,W3A16,W4A16,W6A16", "-g", 32),
    "gptq": ("--choices", "W2A16,W4A16,W8A16", "-g", 16),
    "gguf": ("--choices", "Q4_0,Q5_0,Q8_0"),
}
# What the table `quick` has measured: whatever is asked for so takes a moment.
WIDTHS = ("-g", 16, "--choices", "W2A16,W4A16,W6A16")
QUICK = (*WIDTHS, "--method", "rtn")
BUDGET = ("--target-bpw", 4.6)


def TOKENS(model: Path) -> tuple[object, ...]:
    return ("--tokens", model / "tokens.npy")


def done(*arguments):
    outcome = ptq(*arguments, "-q") if arguments[0] != "allocate" else ptq(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def refuse(*arguments, words=(), code=1):
    return refused(*arguments, words=words, code=code).errors[0]


def recipe_of(path="r.toml"):
    return tomllib.loads(Path(path).read_text())


def table(path="m.choices.json"):
    """The one set of measurements in a table."""
    (own,) = json.loads(Path(path).read_text())["tables"].values()
    return own


def bits(folder="out"):
    """Of each layer, by its name."""
    return {name: x.grid.bits for name, x in open_quantized(Path(folder)).layers.items()}


def types(path="out/model.gguf"):
    """Of the matrices of a GGUF file that are quantized."""
    tensors = read_gguf_header(Path(path)).tensors
    return {x.spec.name: x.spec.dtype for x in tensors if not x.spec.dtype.startswith("F")}


def weights_size(output):
    files = [output] if output.is_file() else output.glob("*.safetensors"), output.glob("*.gguf")
    found = [output] if output.is_file() else [path for own in files for path in own]
    return sum(path.stat().st_size for path in found)


def is_alike(found):
    """Whether what runtimes fuse has the same numbers."""
    return all(
        len(
            {
                width
                for name, width in found.items()
                if name.startswith(block) and name.endswith(own)
            }
        )
        == 1
        for block in BLOCKS
        for own in FUSED
    )


def noting(found, function):
    """Note which layers are rounded."""

    def called(unit, *arguments):
        found.extend(layer.module for layer in unit.layers)
        return function(unit, *arguments)

    return called
