"""The commands as functions. Each makes a plan, runs it and gives back its report; none prints.

The quantizing ones take their settings by name: `inspect.signature` and `ptq_cli/__init__.pyi` have
them from the settings' dataclasses (commands/signatures.py). Paths may be strings; where several
are taken, one alone will do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from inspect import Signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.find import AnyPath, Paths, as_paths, find_source, take_source
from ptq_cli.commands.budget import check_method, check_recipe, take_budget, write_recipe
from ptq_cli.commands.calibrate import prepare_calibration
from ptq_cli.commands.check import check as check
from ptq_cli.commands.job import take_run_options
from ptq_cli.commands.plan_allocation import prepare_allocation
from ptq_cli.commands.quantize import prepare
from ptq_cli.commands.signatures import WHERE, allocate_signature, signature_of
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError, NotRead
from ptq_cli.models.forward.linear import QuantizedLinear
from ptq_cli.numerics.activations import ActivationSettings, stated
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.run.schedule import ALL_THERE_IS, Resources, RunOptions
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.experts import one_by_one
from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.quantized import gguf_of, holds_quantized, open_quantized
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.tokens import TokenSettings

Tokens = AnyPath | TokenSettings | None


def gptq(model: AnyPath, **options: Any) -> RunReport:
    """Quantize with GPTQ.

    >>> ptq_cli.gptq("model/", bits=4, group_size=128, tokens="tokens.npy")  # doctest: +SKIP
    """
    return _quantize("gptq", model, options)


def rtn(model: AnyPath, **options: Any) -> RunReport:
    """Round to nearest with a scale search."""
    return _quantize("rtn", model, options)


def pack(model: AnyPath, **options: Any) -> RunReport:
    """Round a float model to nearest and pack it, or repack a quantized folder without loss."""
    return _quantize("pack", model, options)


def smoothquant(model: AnyPath, **options: Any) -> RunReport:
    """Smooth, and quantize weights and inputs; `bits` may be 16: the smoothed float weights."""
    return _quantize("smoothquant", model, options)


def awq(model: AnyPath, **options: Any) -> RunReport:
    """Scale weights by the mean size of their inputs, then round."""
    return _quantize("awq", model, options)


def allocate(model: AnyPath, **options: Any) -> dict[str, Any]:
    """Share out a size among the layers (`ptq allocate`), and write the recipe.

    method: whose recipe it is, and by which errors are measured: "gptq", "rtn" or "awq"
    target_bpw, target_size: bits a weight, or bytes of the weights files; one of them
    output: default `<model>-<method>-<bits>bpw.toml` in the current folder

    Returns:
        `output`, what the recipe's [allocation] says, `groups` (name → choice), `uniform` (choice →
        what it would cost alone), `bent` (groups whose divergence is not in proportion to their
        error), `notes`, `warnings`.

    >>> ptq_cli.allocate("model/", target_bpw=4.25, tokens="tokens.npy")  # doctest: +SKIP
    """
    _check_names(options, allocate_signature())
    method, output = options.pop("method", "gptq"), options.pop("output", None)
    budget, table = take_budget(options)
    if budget is None:
        raise InputError("target_bpw or target_size says how much there is to share out")
    how, source = take_run_options(options), take_source(options)
    check_method(method, options)
    job = prepare_allocation(method, model, options, budget, {}, source, table=table)
    path = None if output is None else Path(output)
    check_recipe(job, path, force=how.force)
    allocation = job.run(how)
    written = write_recipe(job, allocation, path, force=how.force)
    return {**written, "notes": job.notes(allocation), "warnings": list(job.warnings)}


def _quantize(command: str, model: AnyPath, options: dict[str, Any]) -> RunReport:
    """Plan and run. What is no option of the run or of its inputs must be a setting."""
    _check_names(options, signature_of(command))
    how, source = take_run_options(options), take_source(options)
    where = {name: options.pop(name) for name in WHERE if name in options}
    (budget, table), recipe = take_budget(options), {}
    if budget is not None:
        job = prepare_allocation(command, model, options, budget, {}, source, table=table, **where)
        job.check_output(how, named=where.get("output") is not None)
        options, recipe = {}, job.recipe(job.run(how))
    return prepare(command, model, options, recipe, source, **where).run(how)


def _check_names(options: dict[str, Any], signature: Signature) -> None:
    """Refuse unknown names; patterns may be one alone."""
    known = signature.parameters
    if unknown := sorted(options.keys() - known.keys()):
        raise InputError(f"unknown settings {', '.join(unknown)}", hint=f"known: {sorted(known)}")
    for name, value in options.items():
        if isinstance(value, str) and known[name].annotation == tuple[str, ...]:
            options[name] = (value,)


for _function in (gptq, rtn, pack, smoothquant, awq):
    _function.__signature__ = signature_of(_function.__name__)  # type: ignore[attr-defined]
allocate.__signature__ = allocate_signature()  # type: ignore[attr-defined]


def calibrate(
    model: AnyPath,
    activations: Paths = (),
    output: AnyPath | None = None,
    *,
    tokens: Tokens = None,
    text: AnyPath | None = None,
    chat: AnyPath | None = None,
    seq_len: int | None = None,
    nsamples: int | None = None,
    seed: int | None = None,
    mask: AnyPath | None = None,
    min_expert_tokens: int | None = None,
    merge: Paths = (),
    gradients: Paths = (),
    bf16: bool = False,
    heldout_every: int = HELDOUT_EVERY,
    heldout_limit: int = HELDOUT_LIMIT,
    missing: str = "error",
    imatrix_out: AnyPath | None = None,
    force: bool = False,
    restart: bool = False,
    resources: Resources = ALL_THERE_IS,
    listen: Listener = nobody,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Stream activations into a statistics file, or what the model computes on tokens, or merge
    statistics files.

    output: default `<model>.calibration.safetensors` beside the model
    gradients: folders of per-sample gradients `<module>.npy`; their diagonal Fisher information is
        stored too, and alone where there are no activations
    imatrix_out: an importance matrix for llama.cpp is written there, too

    Returns:
        `output`, `sites` (name → what the file's metadata says of it), `warnings`, `seconds`, and
        `earlier`: whether an earlier run had made the file already, from the same inputs.
    """
    which = {"tokens": tokens, "text": text, "chat": chat, "seq_len": seq_len, "mask": mask}
    which |= {"nsamples": nsamples, "seed": seed, "min_expert_tokens": min_expert_tokens}
    job = prepare_calibration(
        model,
        take_source({"activations": activations, "bf16": bf16, **which}),
        merge=as_paths(merge),
        gradients=as_paths(gradients),
        heldout=(heldout_every, heldout_limit),
        missing=missing,
        output=output,
    )
    place = None if imatrix_out is None else Path(imatrix_out)
    job = dataclasses.replace(job, imatrix_out=place)
    for warning in job.warnings:
        warn(warning)
    options = RunOptions(resources, listen=listen, force=force, restart=restart)
    return job.run(options, warn)


def dequantize(
    model: AnyPath,
    output: AnyPath | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    force: bool = False,
    restart: bool = False,
    listen: Listener = nobody,
) -> dict[str, Any]:
    """Write the float model folder that a quantized model stands for.

    output: default `<model>-float` in the current folder
    dtype: "bfloat16", "float16" or "float32" for what is decoded; None: the model's

    Returns:
        `output`, `quantized_as` (how the source was, in words), `warnings`, `seconds`, `earlier`
        (an earlier run had made it already), and otherwise `tensors`, `decoded`, `bytes`.
    """
    from ptq_cli.commands.dequantize import prepare_dequantization

    job = prepare_dequantization(model, dtype=dtype, output=output)
    given = {"max_shard_size": max_shard_size, "force": force, "restart": restart}
    return job.run(take_run_options({**given, "listen": listen}))


def evaluate(
    original: AnyPath,
    quantized: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Paths = (),
    bf16: bool = False,
    tokens: Tokens = None,
    text: AnyPath | None = None,
    chat: AnyPath | None = None,
    seq_len: int | None = None,
    nsamples: int | None = None,
    seed: int | None = None,
    mask: AnyPath | None = None,
    min_expert_tokens: int | None = None,
    kl_per_block: bool = False,
    activation_scheme: str | None = None,
    activation_bits: int | None = None,
    percentile: float | None = None,
    listen: Listener = nobody,
) -> RunReport:
    """Measure a quantized folder against the original, from their tensors alone.

    tokens: run both models on these, too (evaluation/perplexity.py); the report then has `quality`
    activation_scheme: "dynamic-token", "dynamic-tensor" or "static" also measures the outputs with
        integer inputs of `activation_bits` (default: 8), the range of dynamic ones at `percentile`
        (default: 1.0)
    """
    from ptq_cli.commands.evaluate import prepare_evaluation

    named = {"calibration": calibration, "activations": activations, "bf16": bf16}
    which = {"tokens": tokens, "text": text, "chat": chat, "seq_len": seq_len, "mask": mask}
    which |= {"nsamples": nsamples, "seed": seed, "min_expert_tokens": min_expert_tokens}
    job = prepare_evaluation(
        original,
        quantized,
        take_source({**named, **which}),
        per_block=kl_per_block,
        scheme=activation_scheme,
        bits=activation_bits,
        percentile=percentile,
    )
    return job.run(listen)


def inspect(
    path: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Paths = (),
    bf16: bool = False,
) -> dict[str, Any]:
    """What a float model or a quantized folder holds (ptq_cli/evaluation/inspect.py says what); of
    a GGUF file also its types, as `gguf` (ptq_cli/evaluation/file_types.py)."""
    from ptq_cli.evaluation.file_types import file_types

    named = {"calibration": calibration, "activations": activations, "bf16": bf16}
    document, gguf = _inspect(path, named), gguf_of(Path(path))
    return document if gguf is None else document | {"gguf": file_types(read_gguf_header(gguf))}


def _inspect(path: AnyPath, named: dict[str, Any]) -> dict[str, Any]:
    """named: where calibration is"""
    from ptq_cli.evaluation.inspect import inspect_model, inspect_quantized

    checkpoint = None
    if holds_quantized(Path(path)):
        if named["calibration"] is not None or as_paths(named["activations"]) or named["bf16"]:
            raise InputError(f"{path}: quantized already: calibration says nothing of its codes")
        with contextlib.suppress(NotRead):
            return inspect_quantized(open_quantized(Path(path)))
        with contextlib.suppress(NotRead):  # its tensors can be shown still, and what it is
            checkpoint = open_float(Path(path))
    if checkpoint is None:
        place = Path(path)
        if gguf_of(place) is not None:
            checkpoint = open_float(place, any_architecture=True)
        else:
            checkpoint = one_by_one(open_checkpoint(place))
    source = find_source(checkpoint, take_source(dict(named)))
    return inspect_model(checkpoint, source)


def load_weight(quantized: AnyPath, module: str) -> NDArray[np.float32]:
    """The dequantized weight of a module, float32 in its original shape."""
    folder = open_quantized(Path(quantized))
    weight, layer = folder.load(module).dequantized(), folder.layers[module]
    return layer.as_stored(weight)


def load_linear(
    quantized: AnyPath, module: str, activations: ActivationSettings | None = None
) -> QuantizedLinear:
    """A module of an output folder as something to call: `linear(inputs)`.

    Inputs are rounded as the folder states (W8A8: an integer product), or as `activations` say.
    """
    folder = open_quantized(Path(quantized))
    weight = folder.load(module)
    said = folder.layers[module].activation
    small = said if activations is None and said is not None and said.levels != "integer" else None
    if activations is None and said is not None and small is None:
        activations = stated(said, weight.input_scale)
    bias = f"{module}.bias"
    present = bias in folder.checkpoint.tensors
    return QuantizedLinear(
        weight,
        folder.checkpoint.read(bias).astype(np.float32) if present else None,
        activations,
        small,
    )
