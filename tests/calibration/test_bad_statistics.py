"""Statistics files of another model, or broken ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, random_weight, read_model, small_model, write_model
from tests.refusals import Q, refused

pytestmark = pytest.mark.usefixtures("here")


def test_a_calibration_of_another_model(job):
    assert ptq("calibrate", job, "--activations", "acts", "-o", "c.safetensors").code == 0
    small_model(job, **{f"{Q}.weight": random_weight(12, 32, seed=9)})
    for command in ("gptq", "rtn"):
        words = ("c.safetensors", "another model", "model.safetensors")
        refused(command, job, "--calibration", "c.safetensors", words=words)
    refused("calibrate", job, "--merge", "c.safetensors", words=("c.safetensors", "another model"))


def test_a_model_is_no_statistics_file(job):
    words = ("model.safetensors", "not a statistics file")
    refused("gptq", job, "--calibration", job, words=words)


def changed_statistics(change):
    """c.safetensors with its content changed by `change(content, tensors)`."""
    path = Path("c.safetensors")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    content = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["ptq"])
    dtypes = {"F32": np.float32, "I64": np.int64, "F16": np.float16}
    tensors = {
        name: np.frombuffer(data, dtypes[dtype]).reshape(shape).copy()
        for name, (dtype, shape, data) in read_model(path).items()
    }
    content = change(content, tensors) or content
    text = content if isinstance(content, str) else json.dumps(content)
    write_model(path, tensors, {"ptq": text})


def without(key):
    def change(content, tensors):
        content["sites"][Q].pop(key)

    return change


def setting(key, value):
    def change(content, tensors):
        content["sites"][Q][key] = value

    return change


def tensor(part, value):
    def change(content, tensors):
        if value is None:
            del tensors[f"{Q}.{part}"]
        else:
            tensors[f"{Q}.{part}"] = value(tensors[f"{Q}.{part}"])

    return change


def spoiled(array):
    array[0] = np.nan
    return array


BROKEN_STATISTICS = {
    **{f"without {key}": without(key) for key in (
        "linears", "n_tokens", "n_seen", "min", "max", "mean", "std", "histogram_start")},
    **{f"without {part}": tensor(part, None) for part in (
        "hessian", "absmax", "absmean", "histogram", "heldout")},
    "no content": lambda content, tensors: "{}",
    "a list": lambda content, tensors: "[]",
    "nested": lambda content, tensors: "[" * 100_000,
    "sites a list": lambda content, tensors: {**content, "sites": [1]},
    "no model": lambda content, tensors: {**content, "model": None},
    "limit a word": lambda content, tensors: {**content, "heldout_limit": "many"},
    "other version": lambda content, tensors: {**content, "version": 99},
    "tokens negative": setting("n_tokens", -1),
    "tokens a word": setting("n_tokens", "x"),
    "tokens infinite": setting("n_tokens", float("inf")),
    "mean NaN": setting("mean", float("nan")),
    "linears a word": setting("linears", "abc"),
    "linears numbers": setting("linears", [1]),
    "hessian NaN": tensor("hessian", spoiled),
    "hessian narrower": tensor("hessian", lambda a: a[:-1]),
    "hessian negative": tensor("hessian", lambda a: -a),
    "hessian of integers": tensor("hessian", lambda a: a.astype(np.int64)),
    "absmax a number": tensor("absmax", lambda a: a[0].reshape(())),
    "absmax NaN": tensor("absmax", spoiled),
    "histogram of floats": tensor("histogram", lambda a: a.astype(np.float32)),
    "histogram empty": tensor("histogram", lambda a: a[:0]),
    "heldout NaN": tensor("heldout", spoiled),
    "heldout narrower": tensor("heldout", lambda a: a[:, :-1]),
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN_STATISTICS.values(), ids=BROKEN_STATISTICS)
def test_broken_statistics_are_refused(change, job):
    assert ptq("calibrate", job, "--activations", "acts", "-o", "c.safetensors").code == 0
    changed_statistics(change)
    refused("gptq", job, "--calibration", "c.safetensors", words=("c.safetensors",))
