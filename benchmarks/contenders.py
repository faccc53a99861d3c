"""What `solver.py` times: each contender lives in a process of its own and is asked over pipes.

Every contender rounds the same weight to 4 bits, asymmetric, groups of 128, columns as they stand
(our defaults choose their own order), damping 0.01, in float32. It answers with the seconds of
the factorization and of the columns, and with what it decoded, from which the loss is computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BITS, GROUP, BLOCK, DAMP = 4, 128, 128, 0.01
TOP = 2**BITS - 1
NEEDS = {"torch": ("torch",), "gptqmodel": ("torch", "gptqmodel")}  # packages, by contender

Weights = np.ndarray[Any, np.dtype[np.float32]]
Timed = tuple[float, float, Weights]  # seconds of factorization, of columns; decoded weight
Run = Callable[[Weights, Weights], Timed]


def ours(**stated: Any) -> Run:
    """This engine, by the calls its gptq method makes. stated: settings, where not its defaults"""
    from ptq_cli.core.grid import Grid
    from ptq_cli.methods.gptq import GptqSettings
    from ptq_cli.numerics.feedback import make_feedback
    from ptq_cli.numerics.gptq import solve
    from ptq_cli.numerics.panel import Passes

    grid, settings = Grid(BITS, GROUP, sym=False), GptqSettings(**stated)
    passes = Passes(settings.mse, settings.refine, settings.sweeps)

    def run(weight: Weights, hessian: Weights) -> Timed:
        start = time.perf_counter()
        feedback = make_feedback(hessian, DAMP, grid, settings.act_order)
        middle = time.perf_counter()
        result = solve(weight, grid, feedback, passes)
        end = time.perf_counter()
        return middle - start, end - middle, result.dequantized()

    return run


def numpy_factor(hessian: Weights) -> Weights:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.copy()
    damped.flat[:: len(damped) + 1] += np.float32(DAMP * damped.diagonal().mean())
    return np.linalg.cholesky(np.linalg.inv(damped)).T.copy()


def numpy_columns(weight: Weights, inverse: Weights) -> Weights:
    """The paper's algorithm (arXiv 2210.17323) as its authors' code has it, in plain NumPy."""
    weight, decoded = weight.copy(), np.zeros_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block, errors = weight[:, start:stop].copy(), np.zeros_like(weight[:, start:stop])
        corner = inverse[start:stop, start:stop]
        for i in range(stop - start):
            if (start + i) % GROUP == 0:
                group = weight[:, start + i : start + i + GROUP]
                low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
                scale = (high - low) / np.float32(TOP)
                zero = np.rint(-low / scale)
            codes = np.clip(np.rint(block[:, i] / scale) + zero, 0, TOP)
            decoded[:, start + i] = scale * (codes - zero)
            error = (block[:, i] - decoded[:, start + i]) / corner[i, i]
            block[:, i:] -= np.outer(error, corner[i, i:])
            errors[:, i] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return decoded


def numpy_loop() -> Run:
    def run(weight: Weights, hessian: Weights) -> Timed:
        start = time.perf_counter()
        inverse = numpy_factor(hessian)
        middle = time.perf_counter()
        decoded = numpy_columns(weight, inverse)
        return middle - start, time.perf_counter() - middle, decoded

    return run


def torch_factor(hessian: Any) -> Any:
    """As the authors' code has it: Cholesky, the inverse from it, Cholesky of that."""
    import torch

    damped = hessian.clone()
    damped.diagonal().add_(DAMP * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def torch_columns(weight: Any, inverse: Any) -> Any:
    """`numpy_columns` in torch."""
    import torch

    weight, decoded = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:stop].clone()
        errors, corner = torch.zeros_like(block), inverse[start:stop, start:stop]
        for i in range(stop - start):
            if (start + i) % GROUP == 0:
                group = weight[:, start + i : start + i + GROUP]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (high - low) / TOP
                zero = torch.round(-low / scale)
            codes = torch.clamp(torch.round(block[:, i] / scale) + zero, 0, TOP)
            decoded[:, start + i] = scale * (codes - zero)
            error = (block[:, i] - decoded[:, start + i]) / corner[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    return decoded


def torch_loop() -> Run:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def run(weight: Weights, hessian: Weights) -> Timed:
        with torch.inference_mode():
            tensor, matrix = torch.from_numpy(weight), torch.from_numpy(hessian)
            start = time.perf_counter()
            inverse = torch_factor(matrix)
            middle = time.perf_counter()
            decoded = torch_columns(tensor, inverse)
            return middle - start, time.perf_counter() - middle, decoded.numpy()

    return run


class Stopwatch:
    """What GPTQModel's class takes as `region_timer`: adds up the seconds of its regions."""

    seconds = 0.0

    @contextlib.contextmanager
    def measure(self, region: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start if region == "hessian_inverse" else 0.0


def gptqmodel_task() -> tuple[Callable[[Weights], Any], Callable[[Any], Weights]]:
    """What makes GPTQModel's own class of a weight, and what has it quantize, with the Hessian
    that it has gathered or been given.

    Its fallback to plain rounding is off, so are its reordering of groups and its offloading, and
    the answer is refused unless the damping is the one asked for and the loss is a number.
    """
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = QuantizeConfig(
        bits=BITS, group_size=GROUP, sym=False, desc_act=False, act_group_aware=False,
        damp_percent=DAMP, fallback=None, offload_to_disk=False, device="cpu",
    )  # fmt: skip

    def make(weight: Weights) -> Any:
        linear = torch.nn.Linear(1, 1, bias=False)
        linear.weight = torch.nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
        linear.out_features, linear.in_features = weight.shape
        task = GPTQ(linear, settings, region_timer=Stopwatch())
        task.quantizer.configure(perchannel=True)
        return task

    def quantize(task: Any) -> Weights:
        decoded, _, _, _, _, average, damp, samples = task.quantize(blocksize=BLOCK)
        if not (isinstance(average, float) and damp == DAMP and samples == task.nsamples):
            raise RuntimeError(f"GPTQModel fell back: {average=} {damp=} {samples=}")
        found: Weights = decoded.detach().numpy()
        return found

    return make, quantize


def gptqmodel_class() -> Run:
    """GPTQModel's own class, given the Hessian it would have gathered; `quantize()` is timed."""
    import torch

    make, quantize = gptqmodel_task()

    def run(weight: Weights, hessian: Weights) -> Timed:
        task = make(weight)
        task.H, task.nsamples = torch.from_numpy(hessian.copy()), 4 * len(hessian)
        start = time.perf_counter()
        decoded = quantize(task)
        total = time.perf_counter() - start
        seconds = task.region_timer.seconds
        return seconds, total - seconds, decoded

    return run


def product() -> Run:
    """No contender: the seconds of one 2048³ product, as "columns"."""
    left = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    out = np.empty_like(left)

    def run(weight: Weights, hessian: Weights) -> Timed:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            np.matmul(left, left, out=out)
            seconds.append(time.perf_counter() - start)
        return 0.0, float(np.median(seconds)), weight

    return run


CONTENDERS: dict[str, Callable[[], Run]] = {
    "product": product,
    "paper": lambda: ours(refine=0, sweeps=0, mse=False, act_order="none"),
    "refine": lambda: ours(sweeps=0, mse=False, act_order="none"),
    "fast": lambda: ours(effort="fast"),
    "defaults": lambda: ours(),
    "numpy": numpy_loop,
    "torch": torch_loop,
    "gptqmodel": gptqmodel_class,
}


def loss(weight: Weights, decoded: Weights, hessian: Weights) -> float:
    """`tr(E H Eᵀ)` of what was decoded."""
    error = weight - decoded
    return float(np.multiply(error @ hessian, error).sum(dtype=np.float64))


def answer(run: Run, folder: Path, with_loss: bool) -> dict[str, float | None]:
    weight, hessian = np.load(folder / "weight.npy"), np.load(folder / "hessian.npy")
    np.ones(4 * (weight.size + hessian.size), np.float32)  # the machine's first touch of memory
    factorization, columns, decoded = run(weight, hessian)
    measured = loss(weight, decoded, hessian) if with_loss else None
    return {"factorization": factorization, "columns": columns, "loss": measured}


def main() -> None:
    """Lines of JSON in, lines of JSON out; what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name = sys.argv[1]
    run = CONTENDERS[name]()
    for line in sys.stdin:
        question = json.loads(line)
        reply = answer(run, Path(question["folder"]), question["with_loss"])
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
