"""What clients make of quantized folders: `in_own_process(compare_all, jobs)`.

Jobs are `{"name", "client", "float", "folder"}`; the client is transformers unless said otherwise.
Of each there are `missing` and `unexpected` keys, and `error`, the largest difference of
the logits from those of the twin, over the largest of them. The twin is the float model with what
this tool's decoder gives and the folder's own dense tensors: in the model's own dtype for
plain transformers, in float32 for the other clients, which compute in it. Where the folder says
that inputs are rounded to small floats, the twin's are (unless the job has `inputs: "float"`, for
clients that do not round them).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.clients import compile_nothing
from tests.interop.rounded_inputs import round_inputs

Job = dict[str, str]


def _client(job: Job) -> str:
    return job.get("client", "transformers")


def _kind(folder: Path) -> Any:
    import transformers

    return getattr(
        transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
    )


def _transformers(job: Job, tokens: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    folder = Path(job["folder"])
    model, found = _kind(folder).from_pretrained(
        folder, output_loading_info=True, **({"dtype": "auto"} | options)
    )
    return model.eval()(**_given(model, tokens)).logits, found


def _gptqmodel(job: Job, tokens: Any) -> tuple[Any, dict[str, Any]]:
    """transformers, with GPTQModel's kernels."""
    import torch
    from transformers import AwqConfig, GPTQConfig

    awq = job["name"].endswith("awq")
    own = AwqConfig(backend="torch_awq") if awq else GPTQConfig(bits=4, backend="gptq_torch")
    return _transformers(job, tokens, dtype=torch.float32, quantization_config=own)


def _gptqmodel_alone(job: Job, tokens: Any) -> tuple[Any, dict[str, Any]]:
    """GPTQModel.load, which computes in float16 and knows mixtures in these formats."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if job["name"].endswith("awq") else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(job["folder"], device="cpu", backend=backend, dtype=torch.float16)
    return loaded.model.eval()(input_ids=tokens).logits, {"missing_keys": [], "unexpected_keys": []}


def _mlx(job: Job, tokens: Any) -> tuple[Any, dict[str, Any]]:
    import mlx.core as mx
    import torch
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["folder"]))
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(tokens.numpy())).astype(mx.float32))
    return torch.from_numpy(logits), {"missing_keys": [], "unexpected_keys": []}


CLIENTS = {
    "transformers": _transformers,
    "gptqmodel": _gptqmodel,
    "GPTQModel": _gptqmodel_alone,
    "mlx": _mlx,
}


def _twin(job: Job, tokens: Any, folder: Path) -> Any:
    import torch
    from safetensors.torch import load_file, save_file

    from ptq_cli.storage.folder import open_quantized
    from ptq_cli.storage.sources import open_float

    source, plain = Path(job["float"]), _client(job) == "transformers"
    state = load_file(source / "model.safetensors")
    tensors = open_float(source).tensors
    quantized = open_quantized(Path(job["folder"]))
    dense = load_file(Path(job["folder"]) / "model.safetensors")
    state |= {name: dense[name] for name in quantized.untouched()}  # smoothing folds into these
    if not plain:
        state = {name: values.float() for name, values in state.items()}
    for module in quantized.layers:
        weight = torch.from_numpy(quantized.load(module).dequantized())
        stored = tensors[f"{module}.weight"]
        whole = stored.part_of or stored  # of all experts
        itemsize = stored.spec.nbytes // weight.numel()
        strides = stored.strides or (weight.shape[1] * itemsize, itemsize)
        place = (stored.offset - whole.offset) // itemsize
        values = state[whole.spec.name]
        own = torch.as_strided(values, weight.shape, [n // itemsize for n in strides], place)
        own.copy_(weight)  # rounded to the dtype there
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    model = _kind(folder).from_pretrained(folder, dtype="auto" if plain else torch.float32)
    if job.get("inputs") != "float":
        round_inputs(model, quantized)
    return model.eval()(**_given(model, tokens)).logits.float()


def _given(model: Any, tokens: Any) -> dict[str, Any]:
    """What the model is called with: an encoder–decoder model sees two different halves."""
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens[:, ::2], "decoder_input_ids": tokens[:, 1::2]}
    return {"input_ids": tokens}


def compare(job: Job) -> dict[str, Any]:
    import torch

    tokens = torch.randint(0, 240, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits, found = CLIENTS[_client(job)](job, tokens)
        wanted = _twin(job, tokens, Path(folder))
    return {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "error": float((logits.float() - wanted).abs().max() / wanted.abs().max()),
    }


def compare_all(jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """`compare` by the jobs' names; of one that fails, the words as `raised`."""
    compile_nothing()
    results = {}
    for job in jobs:
        try:
            results[job["name"]] = compare(job)
        except Exception as error:
            results[job["name"]] = {"raised": f"{type(error).__name__}: {error}"}
    return results
