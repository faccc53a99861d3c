"""What transformers makes of quantized folders: `python -m tests.interop.compare JOBS.json
OUT.json`.

JOBS is a list of `{"name", "float", "folder"}`. For each OUT has `missing` and `unexpected` keys,
and `error`, the largest difference of the logits from those of the twin, over the largest of them.
The twin is the float model with what this tool's decoder gives, in the model's own dtype.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, named)
    model, found = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model.eval(), found


def _twin(job: dict[str, str], folder: Path) -> Any:
    import torch
    from safetensors.torch import load_file, save_file

    from ptq_cli.storage.folder import open_float, open_quantized

    source = Path(job["float"])
    state = load_file(source / "model.safetensors")
    tensors = open_float(source).tensors
    quantized = open_quantized(Path(job["folder"]))
    for module in quantized.layers:
        weight = torch.from_numpy(quantized.load(module).dequantized())
        stored = tensors[f"{module}.weight"]
        whole = stored.part_of or stored  # of all experts
        values, itemsize = state[whole.spec.name], state[whole.spec.name].element_size()
        strides = stored.strides or (weight.shape[1] * itemsize, itemsize)
        place = (stored.offset - whole.offset) // itemsize
        own = torch.as_strided(values, weight.shape, [n // itemsize for n in strides], place)
        own.copy_(weight)  # rounded to the model's dtype
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return _load(folder)[0]


def compare(job: dict[str, str]) -> dict[str, Any]:
    import torch

    tokens = torch.randint(0, 240, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model, found = _load(Path(job["folder"]))
        logits = model(input_ids=tokens).logits.float()
        wanted = _twin(job, Path(folder))(input_ids=tokens).logits.float()
    return {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "error": float((logits - wanted).abs().max() / wanted.abs().max()),
    }


if __name__ == "__main__":
    jobs_file, out_file = sys.argv[1:]
    results = {}
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            results[job["name"]] = compare(job)
        except Exception as error:
            results[job["name"]] = {"raised": f"{type(error).__name__}: {error}"}
    Path(out_file).write_text(json.dumps(results))
