"""The commands as functions. Each makes a plan, runs it and gives back its report; none prints.

The quantizing ones take their settings by name: `inspect.signature` and `ptq_cli/__init__.pyi` have
them from the settings' dataclasses (commands/signatures.py). Paths may be strings; where several
are taken, one alone will do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.find import AnyPath, Paths, as_paths, find_source, take_source, take_tokens
from ptq_cli.commands.calibrate import CalibrationSettings, prepare_calibration
from ptq_cli.commands.check import check as check
from ptq_cli.commands.quantize import prepare
from ptq_cli.commands.signatures import RUN_OPTIONS, WHERE, with_signature
from ptq_cli.commands.smooth import prepare_smoothing
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.core.settings import settings_fields
from ptq_cli.errors import InputError
from ptq_cli.models.forward.linear import QuantizedLinear
from ptq_cli.numerics.activations import ActivationSettings, stated
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.plan.grid_settings import settings_classes
from ptq_cli.registry import SMOOTHERS
from ptq_cli.run.schedule import ALL_THERE_IS, Resources, take_resources
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.folder import holds_quantized, open_quantized
from ptq_cli.storage.tokens import TokenSettings

Tokens = AnyPath | TokenSettings | None


@with_signature("gptq")
def gptq(model: AnyPath, **options: Any) -> RunReport:
    """Quantize with GPTQ.

    >>> ptq_cli.gptq("model/", bits=4, group_size=128, tokens="tokens.npy")  # doctest: +SKIP
    """
    return _quantize("gptq", model, options)


@with_signature("rtn")
def rtn(model: AnyPath, **options: Any) -> RunReport:
    """Round to nearest with a scale search."""
    return _quantize("rtn", model, options)


@with_signature("pack")
def pack(model: AnyPath, **options: Any) -> RunReport:
    """Round a float model to nearest and pack it, or repack a quantized folder without loss."""
    return _quantize("pack", model, options)


@with_signature("smoothquant")
def smoothquant(model: AnyPath, **options: Any) -> RunReport:
    """Smooth, and quantize weights and inputs; `bits` may be 16: the smoothed float weights."""
    return _quantize("smoothquant", model, options)


@with_signature("awq")
def awq(model: AnyPath, **options: Any) -> RunReport:
    """Scale weights by the mean size of their inputs, then round."""
    return _quantize("awq", model, options)


def _quantize(command: str, model: AnyPath, options: dict[str, Any]) -> RunReport:
    """Plan and run. What is no option of the run or of its inputs must be a setting."""
    how = {name: options.pop(name) for name in RUN_OPTIONS if name in options}
    how["resources"] = take_resources(options)
    where = {name: options.pop(name) for name in WHERE if name in options}
    source = take_source(options)
    kinds = {field.name: kind for field, kind in settings_fields(*settings_classes(command))}
    if unknown := sorted(options.keys() - kinds.keys()):
        raise InputError(f"unknown settings {', '.join(unknown)}", hint=f"known: {sorted(kinds)}")
    for name, value in options.items():
        if isinstance(value, str) and kinds[name] == tuple[str, ...]:
            options[name] = (value,)
    plan: Any = prepare_smoothing if command in SMOOTHERS else prepare
    report: RunReport = plan(command, model, options, {}, source, **where).run(**how)
    return report


def calibrate(
    model: AnyPath,
    activations: Paths = (),
    output: AnyPath | None = None,
    *,
    tokens: Tokens = None,
    text: AnyPath | None = None,
    seq_len: int | None = None,
    nsamples: int | None = None,
    seed: int | None = None,
    mask: AnyPath | None = None,
    merge: Paths = (),
    gradients: Paths = (),
    bf16: bool = False,
    heldout_every: int = HELDOUT_EVERY,
    heldout_limit: int = HELDOUT_LIMIT,
    missing: str = "error",
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

    Returns:
        `output`, `sites` (name → what the file's metadata says of it), `warnings`, `seconds`, and
        `earlier`: whether an earlier run had made the file already, from the same inputs.
    """
    settings = CalibrationSettings(
        activations=as_paths(activations),
        gradients=as_paths(gradients),
        bf16=bf16,
        tokens=_tokens(tokens, text=text, seq_len=seq_len, nsamples=nsamples, seed=seed, mask=mask),
        merge=as_paths(merge),
        heldout=(heldout_every, heldout_limit),
        missing=missing,
    )
    job = prepare_calibration(model, settings, output)
    for warning in job.warnings:
        warn(warning)
    return job.run(force=force, restart=restart, resources=resources, listen=listen, warn=warn)


def evaluate(
    original: AnyPath,
    quantized: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Paths = (),
    bf16: bool = False,
    tokens: Tokens = None,
    text: AnyPath | None = None,
    seq_len: int | None = None,
    nsamples: int | None = None,
    seed: int | None = None,
    mask: AnyPath | None = None,
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
    activation = evaluated_inputs(activation_scheme, activation_bits, percentile)
    source = take_source(named)
    read = _tokens(tokens, text=text, seq_len=seq_len, nsamples=nsamples, seed=seed, mask=mask)
    job = prepare_evaluation(original, quantized, source, read, activation, per_block=kl_per_block)
    return job.run(listen)


def evaluated_inputs(
    scheme: str | None, bits: int | None, percentile: float | None
) -> ActivationSettings | None:
    """How `evaluate` rounds inputs, or None where it does not. Raises InputError."""
    if scheme in (None, "none"):
        return None
    if scheme == "static" and percentile is not None:
        raise InputError(
            f"--percentile {percentile} does nothing here",
            hint="it needs --activation-scheme dynamic-token or dynamic-tensor",
        )
    bits, part = 8 if bits is None else bits, 1.0 if percentile is None else percentile
    return ActivationSettings(bits, scheme, part, static_scale=0.0)


def inspect(
    path: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Paths = (),
    bf16: bool = False,
) -> dict[str, Any]:
    """What a float model or a quantized folder holds (ptq_cli/evaluation/inspect.py says what)."""
    from ptq_cli.evaluation.inspect import inspect_model, inspect_quantized

    if holds_quantized(Path(path)):
        if calibration is not None or as_paths(activations) or bf16:
            raise InputError(f"{path}: quantized already: calibration says nothing of its codes")
        return inspect_quantized(open_quantized(Path(path)))
    checkpoint = open_checkpoint(Path(path))
    named = {"calibration": calibration, "activations": activations, "bf16": bf16}
    source = find_source(checkpoint, take_source(named))
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
    if activations is None:
        said = folder.layers[module].activation
        activations = None if said is None else stated(said, weight.input_scale)
    bias = f"{module}.bias"
    present = bias in folder.checkpoint.tensors
    return QuantizedLinear(
        weight,
        folder.checkpoint.read(bias).astype(np.float32) if present else None,
        activations,
    )


def _tokens(tokens: Tokens, **options: Any) -> TokenSettings:
    """Which tokens a model is run on, from the options of a function."""
    if isinstance(tokens, TokenSettings):
        return tokens
    return take_tokens({"tokens": tokens, **options})
