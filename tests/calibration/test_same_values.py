"""The same values in other arrays (order, shape, dtype, byte order) give the same statistics."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import ptq, random_inputs, read_model
from tests.refusals import Q, refused

pytestmark = pytest.mark.usefixtures("here")


def statistics(name, *options):
    """What the statistics file made from acts/ holds, but for what it was made from."""
    assert (
        ptq("calibrate", "model.safetensors", "--activations", "acts", "-o", name, *options).code
        == 0
    )
    content = json.loads(open_checkpoint(Path(name)).metadata["ptq"])
    content.pop("job")
    return content, read_model(Path(name))


def test_orders_and_shapes_of_one_array_give_the_same_bytes(job):
    for dtype in (np.float16, np.float32, np.float64):
        inputs = random_inputs(96, 32, dtype=dtype)
        expected = None
        twins = {
            "c": inputs,
            "f": np.asfortranarray(inputs),
            "3d": inputs.reshape(4, 24, 32),
            "3d-f": np.asfortranarray(inputs.reshape(4, 24, 32)),
            "big": inputs.astype(inputs.dtype.newbyteorder(">")),
            "big-f": np.asfortranarray(inputs.astype(inputs.dtype.newbyteorder(">"))),
        }
        for name, twin in twins.items():
            np.save(f"acts/{Q}.npy", twin)
            made = statistics(f"{name}-{np.dtype(dtype).name}.safetensors")
            expected = expected or made
            assert made == expected, name


def test_wider_floats_of_the_same_values_give_the_same_statistics(job):
    inputs = random_inputs(96, 32)
    results = []
    for dtype in (np.float16, np.float32, np.float64):
        np.save(f"acts/{Q}.npy", inputs.astype(dtype))
        statistics(f"{np.dtype(dtype).name}.safetensors")
        tensors = read_model(Path(f"{np.dtype(dtype).name}.safetensors"))
        results.append({k: v for k, v in tensors.items() if not k.endswith(("heldout", "sample"))})
    assert results[0] == results[1] == results[2]


def test_bfloat16_kept_as_uint16(job):
    inputs = random_inputs(96, 32, dtype=ml_dtypes.bfloat16)
    for site in (Path(p) for p in sorted(os.listdir("acts"))):
        width = np.load(f"acts/{site}").shape[1]
        values = inputs if site.stem == Q else random_inputs(96, width, dtype=ml_dtypes.bfloat16)
        np.save(f"acts/{site}", values.view(np.uint16))
    refused("calibrate", job, "--activations", "acts", words=(".npy", "uint16", "--bf16"))
    statistics("u16.safetensors", "--bf16")
    for file in os.listdir("acts"):
        values = np.load(f"acts/{file}").view(ml_dtypes.bfloat16)
        np.save(f"acts/{file}", values.astype(np.float32))
    statistics("f32.safetensors")
    ours, theirs = (read_model(Path(f"{n}.safetensors")) for n in ("u16", "f32"))
    for name in theirs:
        assert name.endswith(("heldout", "sample")) or ours[name] == theirs[name]
    assert ours[f"{Q}.heldout"][0] == "BF16"
    refused(
        "calibrate", job, "--activations", "acts", "--bf16", words=(".npy", "float32", "uint16")
    )
