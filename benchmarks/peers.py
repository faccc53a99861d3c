"""Other tools that round weights, each in a process of its own, for `accuracy.py`.

    python benchmarks/peers.py autoround JOB.json OUT.safetensors

The job says which model, calibration tokens and grid. Out come the linears' rounded weights in
float32 and, on the last line of standard output, the seconds that rounding took (a process's start,
imports and the model's loading are outside). Nothing of this project is imported here, so that a
peer may have an environment of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

AUTOROUND_ITERATIONS = 200
BATCH = 8


@dataclass(frozen=True)
class Job:
    """model: a folder; calibration: token ids [n, length] in a .npy file"""

    model: str
    calibration: str
    bits: int
    group_size: int
    sym: bool


Weights = dict[str, Any]  # by the checkpoint's names, torch tensors


@dataclass(frozen=True)
class Peer:
    """what: for the table; packages: that have to be there; prepare: gives what is timed"""

    what: str
    packages: tuple[str, ...]
    prepare: Callable[[Job], Callable[[], Weights]]


def token_ids(job: Job) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.load(job.calibration).astype(np.int64))


def load(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)


def linear_weights(model: Any) -> Weights:
    import torch

    head = model.get_output_embeddings()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def autoround(job: Job) -> Callable[[], Weights]:
    """AutoRound leaves rounded weights in its model."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = token_ids(job)
    rounder = AutoRound(
        load(job), AutoTokenizer.from_pretrained(job.model), bits=job.bits,
        scheme=f"W{job.bits}A16" if job.bits in (2, 3, 4, 8) else "W4A16",
        group_size=job.group_size, sym=job.sym, iters=AUTOROUND_ITERATIONS,
        dataset=[{"input_ids": ids[i : i + BATCH]} for i in range(0, len(ids), BATCH)],
        seqlen=ids.shape[1], nsamples=len(ids), batch_size=BATCH, device_map="cpu",
        enable_torch_compile=False,
    )  # fmt: skip
    return lambda: linear_weights(rounder.quantize()[0])


def gptqmodel(job: Job) -> Callable[[], Weights]:
    """GPTQModel packs its codes; it decodes them itself."""
    import torch

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it wants two, but takes half the cores
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # which would be compiled every time
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = QuantizeConfig(
        bits=job.bits, group_size=job.group_size, sym=job.sym, desc_act=False,
        act_group_aware=True, mse=2.0, offload_to_disk=False, device="cpu",
    )  # fmt: skip
    model = GPTQModel.load(job.model, settings, dtype=torch.float32)
    exact = {name: weight.detach().clone() for name, weight in linear_weights(model.model).items()}
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in token_ids(job)]

    def run() -> Weights:
        model.quantize(data, batch_size=BATCH, calibration_sort=None)
        modules = dict(model.model.named_modules())
        return {
            name: decoded(modules[name.removesuffix(".weight")], weight)
            for name, weight in exact.items()
        }

    return run


def decoded(packed: Any, weight: Any) -> Any:
    """What GPTQModel's module holds. Its zeros, read from memory, may be one off on asymmetric
    grids: of the three offsets the one that lies nearest to the float weight [out, in]."""
    packed.post_init()
    given = packed.dequantize_weight().T.float()
    step = packed.scales.float()[packed.g_idx.long()].T
    return min((given + k * step for k in (-1, 0, 1)), key=lambda found: (found - weight).norm())


def llmcompressor(job: Job) -> Callable[[], Weights]:
    """llm-compressor leaves rounded weights in its model."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    grid = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.sym, strategy="group",
        group_size=job.group_size, observer="mse",
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    model, ids = load(job), token_ids(job)
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}

    def run() -> Weights:
        oneshot(
            model=model, dataset=Dataset.from_dict(rows), num_calibration_samples=len(ids),
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
            max_seq_length=ids.shape[1], shuffle_calibration_samples=False,
        )  # fmt: skip
        return linear_weights(model)

    return run


PEERS = {
    "autoround": Peer(
        f"AutoRound, {AUTOROUND_ITERATIONS} iterations",
        ("torch", "transformers", "auto_round"),
        autoround,
    ),
    "gptqmodel": Peer(
        "GPTQModel, act_group_aware, mse 2", ("torch", "transformers", "gptqmodel"), gptqmodel
    ),
    "llmcompressor": Peer(
        "llm-compressor, GPTQ, observer mse",
        ("torch", "transformers", "datasets", "llmcompressor"),
        llmcompressor,
    ),
}


def cpu_seconds() -> float:
    """User and system, of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def installed(name: str, python: str) -> bool:
    """Whether `python`, an interpreter, has what the peer needs."""
    asked = [python, __file__, name]
    return subprocess.run(asked, check=False, capture_output=True).returncode == 0


def ask(name: str, python: str, job: Job, out: Path) -> dict[str, float]:
    """Have a peer write its weights to `out`; gives its CPU and wall seconds."""
    told = out.with_suffix(".json")
    told.write_text(json.dumps(asdict(job)))
    done = subprocess.run(
        [python, __file__, name, told, out], cwd=out.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{PEERS[name].what} failed:\n{done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    peer = PEERS[sys.argv[1]]
    if len(sys.argv) == 2:
        sys.exit(not all(importlib.util.find_spec(package) for package in peer.packages))
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    run = peer.prepare(Job(**json.loads(Path(sys.argv[2]).read_text())))
    cpu, wall = cpu_seconds(), time.perf_counter()
    weights = run()
    seconds = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}

    from safetensors.torch import save_file

    rounded = {name: weight.detach().float().contiguous() for name, weight in weights.items()}
    save_file(rounded, sys.argv[3])
    print(json.dumps(seconds), file=channel, flush=True)


if __name__ == "__main__":
    main()
