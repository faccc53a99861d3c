"""Quantized folders that were changed: refused, by `eval` and by the functions."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from tests.builders import ptq, raw_safetensors
from tests.refusals import DOWN, Q, refused

pytestmark = pytest.mark.usefixtures("here")


def changed_output(change):
    path = Path("out/model.safetensors")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    content = json.loads(header["__metadata__"]["ptq"])
    data = bytearray(raw[8 + length :])
    content = change(content, header, data) or content
    header["__metadata__"]["ptq"] = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(raw_safetensors(header, bytes(data)))


def layer_setting(key, value):
    def change(content, header, data):
        content["layers"][Q][key] = value

    return change


def written(part, value, dtype):
    def change(content, header, data):
        start, _ = header[f"{Q}.{part}"]["data_offsets"]
        patch = np.array([value], dtype).tobytes()
        data[start : start + len(patch)] = patch

    return change


BROKEN_OUTPUTS = {
    **{f"bits {bits!r}": layer_setting("bits", bits) for bits in (0, 1, 9, True, "4", None, 3)},
    **{f"shape {shape!r}": layer_setting("shape", shape) for shape in (
        [12, 33], [-12, -32], [0, 32], [], 5, [12], None, [6, 64])},
    **{f"group {size!r}": layer_setting("group_size", size) for size in (4, -2, 1.5, None)},
    "sym a word": layer_setting("sym", "yes"),
    "scale_dtype": layer_setting("scale_dtype", "float32"),
    "scale_dtype unknown": layer_setting("scale_dtype", "int4"),
    "tensor unknown": layer_setting("tensor", "nothing.weight"),
    "tensor of another shape": layer_setting("tensor", f"{DOWN}.weight"),
    "g_idx too large": written("g_idx", 99, np.int32),
    "g_idx negative": written("g_idx", -1, np.int32),
    "scales NaN": written("scales", np.nan, np.float16),
    "scales inf": written("scales", np.inf, np.float16),
    "no layers": lambda content, header, data: {**content, "layers": 5},
    "format unknown": lambda content, header, data: {**content, "format": "zip"},
    "version": lambda content, header, data: {**content, "version": 2},
    "nested": lambda content, header, data: "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN_OUTPUTS.values(), ids=BROKEN_OUTPUTS)
def test_broken_outputs_are_refused(change, job):
    arguments = ["--activations", "acts", "--act-order", "desc", "-g", 8, "-o", "out"]
    assert ptq("gptq", job, *arguments).code == 0
    changed_output(change)
    outcome = refused("eval", job, "out")
    assert "out" in outcome.errors[0] or "model.safetensors" in outcome.errors[0]
    with pytest.raises(ptq_cli.PtqError):
        ptq_cli.evaluate(job, "out")


def test_an_unknown_module_of_an_output(job):
    ptq("pack", job, "-o", "out")
    with pytest.raises(ptq_cli.PtqError, match=r"no quantized module 'x'\n.*layers\.0"):
        ptq_cli.load_weight("out", "x")


def test_a_bad_older_output_and_a_bad_original_are_refused_by_eval(job):
    ptq("pack", job, "-o", "out")
    Path("bad.safetensors").write_bytes(b"text that is long enough")
    refused("eval", "bad.safetensors", "out", words=("bad.safetensors",))
    refused("eval", job, "bad.safetensors", words=("bad.safetensors",))
    refused("eval", job, job, words=("model.safetensors", "not a quantized checkpoint"))
    refused("eval", job, "nowhere", words=("nowhere", "No such file"))
