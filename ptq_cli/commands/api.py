"""The commands as functions. Each makes a plan, runs it and gives back its report; none prints.

Paths may be strings. Settings are the fields of `GridSettings` and of the method's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.find import AnyPath, find_source, take_source
from ptq_cli.commands.calibrate import prepare_calibration
from ptq_cli.commands.check import check as check
from ptq_cli.commands.quantize import prepare
from ptq_cli.core.progress import Listener, nobody
from ptq_cli.core.report import RunReport
from ptq_cli.errors import InputError
from ptq_cli.models.forward.linear import QuantizedLinear
from ptq_cli.numerics.activations import ActivationSettings, stated
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.plan.grid_settings import GridSettings
from ptq_cli.plan.settings import settings_fields
from ptq_cli.registry import method
from ptq_cli.run.schedule import ALL_THERE_IS, Resources, take_resources
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.folder import holds_quantized, open_quantized
from ptq_cli.storage.tokens import TokenSettings

_RUN = ("force", "restart", "listen", "max_shard_size")


def calibrate(
    model: AnyPath,
    activations: Iterable[AnyPath] = (),
    output: AnyPath | None = None,
    *,
    tokens: TokenSettings | None = None,
    merge: Iterable[AnyPath] = (),
    gradients: Iterable[AnyPath] = (),
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
    job = prepare_calibration(
        model,
        activations,
        output,
        tokens=tokens,
        merge=merge,
        gradients=gradients,
        bf16=bf16,
        heldout=(heldout_every, heldout_limit),
        missing=missing,
    )
    for warning in job.warnings:
        warn(warning)
    return job.run(force=force, restart=restart, resources=resources, listen=listen, warn=warn)


def quantize(model: AnyPath, command: str = "gptq", **options: Any) -> RunReport:
    """Quantize a model; see `quantize_job.prepare` for the options. Everything else is a setting by
    name.

    >>> quantize("model.safetensors", bits=4, group_size=128, output="out")  # doctest: +SKIP
    """
    chosen = method("rtn" if command == "pack" else command)
    own = ("output", "fallback", "require_calibration", "runtime")
    return _run(prepare, command, model, options, own, (GridSettings, chosen.settings))


def _run(
    prepare_job: Callable[..., Any],
    command: str,
    model: AnyPath,
    options: dict[str, Any],
    own: Iterable[str],
    settings: Iterable[type[Any]],
) -> RunReport:
    """Plan and run. own: the options of `prepare_job` itself; what is left must be settings"""
    run_options = _taken(options, _RUN)
    run_options["resources"] = take_resources(options)
    where = _taken(options, own)
    source = take_source(options)
    known = {field.name for field, _ in settings_fields(*settings)}
    if unknown := sorted(set(options) - known):
        raise InputError(f"unknown settings {', '.join(unknown)}", hint=f"known: {sorted(known)}")
    report: RunReport = prepare_job(command, model, options, {}, source, **where).run(**run_options)
    return report


def _taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def gptq(model: AnyPath, **options: Any) -> RunReport:
    """Quantize with GPTQ; options as in `quantize`."""
    return quantize(model, "gptq", **options)


def rtn(model: AnyPath, **options: Any) -> RunReport:
    """Round to nearest with a scale search; options as in `quantize`."""
    return quantize(model, "rtn", **options)


def pack(model: AnyPath, **options: Any) -> RunReport:
    """Round a float model to nearest and pack it, or repack a quantized folder without loss;
    options as in `quantize`."""
    return quantize(model, "pack", **{"mse": False, **options})


def evaluate(
    original: AnyPath,
    quantized: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Iterable[AnyPath] = (),
    bf16: bool = False,
    tokens: TokenSettings | None = None,
    kl_per_block: bool = False,
    activation_scheme: str | None = None,
    activation_bits: int | None = None,
    percentile: float = 1.0,
    listen: Listener = nobody,
) -> RunReport:
    """Measure a quantized folder against the original, from their tensors alone.

    tokens: run both models on these, too (quality.py); the report then has `quality`
    activation_scheme: "dynamic-token", "dynamic-tensor" or "static" also measures the outputs with
        integer inputs of `activation_bits` (default: 8), their range at `percentile`
    """
    from ptq_cli.commands.evaluate import prepare_evaluation

    named = {"calibration": calibration, "activations": activations, "bf16": bf16}
    activation = evaluated_inputs(activation_scheme, activation_bits, percentile)
    source = take_source(named)
    job = prepare_evaluation(
        original, quantized, source, tokens, activation, per_block=kl_per_block
    )
    return job.run(listen)


def evaluated_inputs(
    scheme: str | None, bits: int | None, percentile: float
) -> ActivationSettings | None:
    """How `evaluate` rounds inputs, or None where it does not."""
    if scheme in (None, "none"):
        return None
    return ActivationSettings(8 if bits is None else bits, scheme, percentile, static_scale=0.0)


def inspect(
    path: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Iterable[AnyPath] = (),
    bf16: bool = False,
) -> dict[str, Any]:
    """What a float model or a quantized folder holds (ptq_cli/evaluation/inspect.py says what)."""
    from ptq_cli.evaluation.inspect import inspect_model, inspect_quantized

    if holds_quantized(Path(path)):
        return inspect_quantized(open_quantized(Path(path)))
    checkpoint = open_checkpoint(Path(path))
    named = {"calibration": calibration, "activations": activations, "bf16": bf16}
    source = find_source(checkpoint, take_source(named))
    return inspect_model(checkpoint, source.statistics)


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


def smoothquant(model: AnyPath, **options: Any) -> RunReport:
    """Smooth, and quantize weights and inputs; options as in `quantize`, `bits` may be 16."""
    return _smooth(model, "smoothquant", options)


def awq(model: AnyPath, **options: Any) -> RunReport:
    """Scale weights by their inputs' loudness, then round; options as in `quantize`."""
    return _smooth(model, "awq", options)


def _smooth(model: AnyPath, command: str, options: dict[str, Any]) -> RunReport:
    from ptq_cli.commands.smooth import prepare_smoothing, smooth_settings

    own = ("output", "runtime")
    return _run(prepare_smoothing, command, model, options, own, smooth_settings(command))
