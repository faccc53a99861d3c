"""The commands as functions. Each makes a plan, runs it and gives back its report; none prints.

Paths may be strings. Settings are the fields of `GridSettings` and of the method's settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli._version import __version__
from ptq_cli.calibration import (
    Match,
    calibrate_sites,
    match_activations,
    match_warnings,
    missing_error,
)
from ptq_cli.checking import check as check
from ptq_cli.checking import runtime_warnings
from ptq_cli.errors import InputError
from ptq_cli.grid_settings import SCHEMES, GridSettings
from ptq_cli.linear import QuantizedLinear
from ptq_cli.numerics.activations import ActivationSettings
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.options import make_settings, settings_fields
from ptq_cli.plan import make_plan
from ptq_cli.registry import format_named, method
from ptq_cli.repack_job import RepackJob, prepare_repack
from ptq_cli.runner import Listener, run
from ptq_cli.sequential import TokenSource
from ptq_cli.storage.calibration import (
    Activations,
    CalibrationFile,
    Merged,
    StatisticsSource,
    beside,
    find_activations,
    open_calibration,
)
from ptq_cli.storage.checkpoint import CALIBRATION_SUFFIX, Checkpoint, open_checkpoint
from ptq_cli.storage.folder import MAX_SHARD, holds_quantized, open_quantized
from ptq_cli.storage.gradients import GradientSite, match_gradients
from ptq_cli.storage.machine import parse_size
from ptq_cli.storage.npy import InputsFile
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tokens import TokenSettings, read_tokens
from ptq_cli.tasks import ALL_THERE_IS, Resources
from ptq_cli.values import Activation, Plan, RunReport

AnyPath = str | Path
Heldout = (HELDOUT_EVERY, HELDOUT_LIMIT)


@dataclasses.dataclass(frozen=True)
class Source:
    """Statistics for a command: where from, fingerprint, warnings of the matching."""

    statistics: StatisticsSource | None
    warnings: tuple[str, ...] = ()
    fingerprint: str | None = None


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
    listen: Callable[[int, int, str], None] = lambda done, total, site: None,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Stream activations into a statistics file, or what the model computes on tokens, or merge
    statistics files.

    output: default `<model>.calibration.safetensors` beside the model
    gradients: folders of per-sample gradients `<module>.npy`; their diagonal Fisher information is
        stored too, and alone where there are no activations

    Returns:
        `output`, `sites` (name → what the file's metadata says of it), `warnings`, `seconds`.
    """
    checkpoint = open_checkpoint(Path(model))
    target = (
        checkpoint.folder / (checkpoint.stem + CALIBRATION_SUFFIX)
        if output is None
        else Path(output)
    )
    merged = [Path(path) for path in merge]
    heldout = (heldout_every, heldout_limit)
    if merged:
        files = tuple(_calibration_of(checkpoint, path) for path in merged)
        heldout = (int(files[0].content["heldout_every"]), files[0].heldout_limit)
        source: StatisticsSource = Merged(files)
        warnings: list[str] = []
        job_inputs = [file.checkpoint.fingerprint for file in files]
        inputs = list(source.files)
    elif tokens is not None and tokens.given:
        read = read_tokens(tokens, checkpoint)
        source = TokenSource(checkpoint, read, heldout)
        warnings, job_inputs = list(read.warnings), [source.fingerprint]
        inputs = list(source.files)
    else:
        slopes = [Path(path) for path in gradients]
        found = match_gradients(checkpoint, find_activations(slopes, bf16))
        if slopes and not found:
            raise InputError(f"{slopes[0]}: no gradients <module>.npy in it")
        folders = [Path(path) for path in activations]
        if not folders and (not found or beside(checkpoint)[1] is not None):
            folders = [_activations_beside(checkpoint)]
        match = match_activations(checkpoint, find_activations(folders, bf16))
        alone = bool(found) and not folders
        if ((match.missing and missing == "error") or not match.entries) and not alone:
            raise missing_error(match, ", ".join(map(str, folders)))
        warnings = match_warnings(match)
        if match.missing:
            warnings.append(
                f"no activations for {len(match.missing)} linears: {', '.join(match.missing[:10])}"
            )
        name = ", ".join(map(str, folders))
        source = Activations(name, match.entries, heldout, gradients=found)
        job_inputs = activations_fingerprint(match) + gradients_fingerprint(found)
        inputs = list(source.files)
    for warning in warnings:
        warn(warning)
    job = {
        "command": "calibrate",
        "version": __version__,
        "model": checkpoint.fingerprint,
        "inputs": job_inputs,
        "heldout": list(heldout),
    }
    staging = Staging(target, job, force=force, restart=restart, keep=[*checkpoint.files, *inputs])
    result = calibrate_sites(source, checkpoint.fingerprint, heldout, staging, listen, resources)
    if bare := result.pop("without_tokens"):
        warnings.append(f"no token reaches {len(bare)} sites: {', '.join(bare[:10])}")
        warn(warnings[-1])
    return {"output": str(target), "warnings": warnings, **result}


def activations_fingerprint(match: Match) -> list[str]:
    """What tells one set of activations from another: their headers and a sample of each file."""
    return [
        _fingerprint((site, entry.info.linears), entry.files)
        for site, entry in match.entries.items()
    ]


def gradients_fingerprint(gradients: Mapping[str, GradientSite]) -> list[str]:
    """The same for gradients."""
    return [_fingerprint((module, "gradients"), g.files) for module, g in gradients.items()]


def _fingerprint(key: Any, files: Iterable[InputsFile]) -> str:
    import hashlib

    digest = hashlib.sha256(repr(key).encode())
    for file in files:
        digest.update(repr((file.npy.shape, file.npy.dtype.str, file.npy.fortran)).encode())
        for start in {0, file.n_tokens // 2, max(0, file.n_tokens - 1)}:
            digest.update(file.read(start, min(start + 1, file.n_tokens)).tobytes())
    return digest.hexdigest()


def _activations_beside(checkpoint: Checkpoint) -> Path:
    _, folder = beside(checkpoint)
    if folder is None:
        raise InputError(
            f"{checkpoint.path}: no activations given, and no activations/ beside it",
            hint="--activations DIR",
        )
    return folder


def _calibration_of(checkpoint: Checkpoint, path: Path) -> CalibrationFile:
    statistics = open_calibration(path)
    if statistics.model != checkpoint.fingerprint:
        raise InputError(
            f"{path}: these statistics were made for another model than {checkpoint.path}",
            hint="calibrate this one",
        )
    return statistics


def find_source(
    checkpoint: Checkpoint,
    calibration: AnyPath | None,
    activations: Iterable[AnyPath],
    *,
    bf16: bool = False,
) -> Source:
    """Statistics for a model: as named, else the file beside it, else `activations/` beside it.

    Linears that they lack are the plan's business: it knows which are quantized.
    """
    folders = [Path(path) for path in activations]
    path = None if calibration is None else Path(calibration)
    if path is not None and folders:
        raise InputError(
            f"both a calibration ({path}) and activations ({folders[0]}) are given",
            hint="give one of them",
        )
    if path is None and not folders:
        path, folder = beside(checkpoint)
        folders = [folder] if folder is not None and path is None else []
    if path is not None:
        statistics = _calibration_of(checkpoint, path)
        return Source(statistics, (), statistics.checkpoint.fingerprint)
    if not folders:
        return Source(None)
    match = match_activations(checkpoint, find_activations(folders, bf16))
    name = ", ".join(map(str, folders))
    warnings = tuple(w for w in match_warnings(match) if "fit no linear" in w)
    fingerprint = " ".join(activations_fingerprint(match))
    streamed = Activations(name, match.entries, Heldout, match.surplus)
    return Source(streamed, warnings, fingerprint)


def token_source(
    checkpoint: Checkpoint, settings: TokenSettings, *, feedback: bool, correct: bool
) -> Source:
    """Statistics from the model's own forward; see `TokenSource`."""
    tokens = read_tokens(settings, checkpoint)
    statistics = TokenSource(checkpoint, tokens, Heldout, feedback=feedback, correct=correct)
    return Source(statistics, tokens.warnings, statistics.fingerprint)


def settings_of(plan: Plan) -> dict[str, Any]:
    """Every setting of a plan by its name."""
    return {k: v for part in plan.settings for k, v in dataclasses.asdict(part).items()}


@dataclasses.dataclass(frozen=True)
class Job:
    """A quantization that is planned and ready to run."""

    plan: Plan
    checkpoint: Checkpoint
    source: Source
    output: Path
    command: str
    on_failure: str

    def run(
        self,
        *,
        force: bool = False,
        restart: bool = False,
        resources: Resources = ALL_THERE_IS,
        max_shard_size: str | int = MAX_SHARD,
        listen: Listener = lambda _: None,
    ) -> RunReport:
        """Do the work, and give the output its name. Raises PtqError."""
        inputs = {"model": self.checkpoint.fingerprint}
        if self.source.fingerprint is not None:
            inputs["calibration"] = self.source.fingerprint
        settings = settings_of(self.plan)
        job = {
            "command": self.command,
            "version": __version__,
            "fallback": self.on_failure,
            "max_shard_size": parse_size(str(max_shard_size)),
            **settings,
            **inputs,
        }
        keep = [*self.checkpoint.files, self.checkpoint.weights]
        if self.source.statistics is not None:
            keep += self.source.statistics.files
        staging = Staging(self.output, job, force=force, restart=restart, keep=keep)
        return run(
            self.plan,
            self.checkpoint,
            self.source.statistics,
            staging,
            command=self.command,
            on_failure=self.on_failure,
            inputs=inputs,
            listen=listen,
            resources=resources,
            max_shard=parse_size(str(max_shard_size)),
        )

    def memory_warnings(self, resources: Resources) -> list[str]:
        """Units that take more memory than there is. (No part of the report: that depends on
        nothing but what was asked.)"""
        if resources.scheduler is not None:
            return []
        limit = resources.memory
        big = [unit for unit in self.plan.units if unit.memory > limit]
        if not big:
            return []
        most = max(unit.memory for unit in big)
        return [
            f"{len(big)} units need more memory ({most / 1e9:.2f} GB) than the"
            f" {limit / 1e9:.2f} GB allowed; each runs alone: {', '.join(u.name for u in big[:10])}"
        ]


def prepare(
    command: str,
    model: AnyPath,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any] = {},
    *,
    calibration: AnyPath | None = None,
    activations: Iterable[AnyPath] = (),
    bf16: bool = False,
    tokens: TokenSettings | None = None,
    parallel_layers: bool = False,
    output: AnyPath | None = None,
    fallback: str = "error",
    require_calibration: bool = False,
    runtime: str | None = None,
) -> Job | RepackJob:
    """Plan a quantization: every mistake that can be known is found here.

    command: "gptq", "rtn", or "pack" (plain rounding to nearest, without calibration)
    given, recipe: settings by name; `given` wins
    runtime: warn of what this runtime could not load (`check`)
    tokens: run the model on these, layers in sequence; with `parallel_layers` the float model only
    """
    if command == "pack" and holds_quantized(Path(model)):
        return prepare_repack(Path(model), given, recipe, output, runtime)
    chosen = method("rtn" if command == "pack" else command)
    recipe = with_scheme(given, recipe)
    settings = make_settings(GridSettings, given, recipe)
    own = make_settings(chosen.settings, given, recipe)
    checkpoint = open_checkpoint(Path(model))
    source = Source(None)
    if command != "pack" and tokens is not None and tokens.given:
        if calibration is not None or list(activations):
            raise InputError("tokens exclude --calibration and --activations")
        correct = getattr(own, "drift", 0.0) > 0
        source = token_source(checkpoint, tokens, feedback=not parallel_layers, correct=correct)
    elif command != "pack":
        source = find_source(checkpoint, calibration, activations, bf16=bf16)
    if require_calibration and source.statistics is None:
        raise InputError(
            f"{checkpoint.path}: no calibration found",
            hint="--tokens FILE, --calibration FILE or --activations DIR",
        )
    fmt = format_named(settings.format)
    plan = make_plan(
        checkpoint,
        chosen,
        settings,
        own,
        fmt,
        source.statistics,
        missing=fallback,
        activation=Activation() if settings.scheme == "W8A8" else None,
    )
    said = runtime_warnings(plan, checkpoint, runtime)
    plan = dataclasses.replace(plan, warnings=(*plan.warnings, *source.warnings, *said))
    target = Path(default_output(checkpoint, command, settings)) if output is None else Path(output)
    return Job(plan, checkpoint, source, target, command, fallback)


def with_scheme(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with what `scheme` is short for: named on the command line it wins over the recipe's
    own values, named in the recipe the recipe's own values win over it."""
    if given.get("scheme"):
        return {**recipe, **SCHEMES.get(given["scheme"], {})}
    return {**SCHEMES.get(recipe.get("scheme", ""), {}), **recipe}


def default_output(checkpoint: Checkpoint, command: str, settings: GridSettings) -> str:
    """`<model>-gptq-w4g128`, in the current directory."""
    stem = checkpoint.stem
    if checkpoint.path.is_dir():
        stem = checkpoint.path.resolve().name or stem
    group = {-1: "row", 0: "tensor"}.get(settings.group_size, f"g{settings.group_size}")
    name = f"{stem}-{command}-w{settings.bits}{group}" + ("" if settings.sym else "-asym")
    return name if settings.format == "ptq" else f"{name}-{settings.format}"


def quantize(model: AnyPath, command: str = "gptq", **options: Any) -> RunReport:
    """Quantize a model; see `prepare` for the options. Everything else is a setting by name.

    >>> quantize("model.safetensors", bits=4, group_size=128, output="out")  # doctest: +SKIP
    """
    run_options: dict[str, Any] = {
        key: options.pop(key)
        for key in ("force", "restart", "listen", "max_shard_size")
        if key in options
    }
    run_options["resources"] = take_resources(options)
    own = (
        "calibration",
        "activations",
        "bf16",
        "output",
        "fallback",
        "require_calibration",
        "runtime",
        "parallel_layers",
    )
    where = {key: options.pop(key) for key in own if key in options}
    where["tokens"] = token_settings(options)
    chosen = method("rtn" if command == "pack" else command)
    _refuse_unknown(options, (GridSettings, chosen.settings))
    return prepare(command, model, options, **where).run(**run_options)


def _refuse_unknown(options: Mapping[str, Any], classes: Iterable[type[Any]]) -> None:
    known = {field.name for field, _ in settings_fields(*classes)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"unknown settings {', '.join(unknown)}", hint=f"known: {sorted(known)}")


def token_settings(options: dict[str, Any]) -> TokenSettings:
    """Take the fields of `TokenSettings` out of `options`; paths may be strings.

    Raises:
        InputError: which tokens to take, but none are given.
    """
    names = [field.name for field in dataclasses.fields(TokenSettings)]
    values = {name: options.pop(name) for name in names if options.get(name) is not None}
    for name in ("tokens", "text", "mask"):
        if name in values:
            values[name] = Path(values[name])
    settings = TokenSettings(**values)
    idle = [name for name in ("seq_len", "nsamples", "mask") if name in values]
    if idle and not settings.given:
        raise InputError(f"--{idle[0].replace('_', '-')} needs --tokens or --text")
    return settings


def take_resources(options: dict[str, Any]) -> Resources:
    """Take `workers`, `max_memory` (bytes, or words like 2GiB) and `scheduler` out of `options`."""
    workers, memory = options.pop("workers", None), options.pop("max_memory", None)
    size = None if memory is None else parse_size(str(memory))
    return Resources(workers, size, options.pop("scheduler", None))


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
    listen: Callable[[int, int, Any], None] = lambda done, total, row: None,
) -> RunReport:
    """Measure a quantized folder against the original, from their tensors alone.

    tokens: run both models on these, too (quality.py); the report then has `quality`
    activation_scheme: "dynamic-token", "dynamic-tensor" or "static" also measures the outputs with
        integer inputs of `activation_bits` (default: 8), their range at `percentile`
    """
    from ptq_cli.evaluation import evaluate as run_evaluation
    from ptq_cli.evaluation import open_sides

    checkpoint = open_checkpoint(Path(original))
    folder = open_quantized(Path(quantized))
    source = find_source(checkpoint, calibration, activations, bf16=bf16)
    activation = None
    if activation_scheme not in (None, "none"):
        activation = ActivationSettings(
            8 if activation_bits is None else activation_bits,
            activation_scheme,
            percentile,
            static_scale=0.0,
        )
    sides = open_sides(checkpoint, folder, source.statistics, activation)
    read = read_tokens(tokens, checkpoint) if tokens is not None and tokens.given else None
    report = run_evaluation(sides, listen)
    if read is None:
        return report
    from ptq_cli.quality import measure_quality

    quality = measure_quality(checkpoint, folder, read, per_block=kl_per_block, listen=listen)
    warnings = (*report.warnings, *read.warnings)
    return dataclasses.replace(report, quality=quality, warnings=warnings)


def inspect(
    path: AnyPath,
    *,
    calibration: AnyPath | None = None,
    activations: Iterable[AnyPath] = (),
    bf16: bool = False,
) -> dict[str, Any]:
    """What a float model or a quantized folder holds (ptq_cli/inspection.py says what)."""
    from ptq_cli.inspection import inspect_model, inspect_quantized

    if holds_quantized(Path(path)):
        return inspect_quantized(open_quantized(Path(path)))
    checkpoint = open_checkpoint(Path(path))
    source = find_source(checkpoint, calibration, activations, bf16=bf16)
    return inspect_model(checkpoint, source.statistics)


def load_weight(quantized: AnyPath, module: str) -> NDArray[np.float32]:
    """The dequantized weight of a module, float32 in its original shape."""
    folder = open_quantized(Path(quantized))
    weight, layer = folder.load(module).dequantized(), folder.layers[module]
    return layer.as_stored(weight)


def _stated(activation: Activation | None, scale: float | None) -> ActivationSettings | None:
    """How a layer's metadata says its inputs are rounded."""
    if activation is None:
        return None
    if not activation.dynamic:
        return ActivationSettings(activation.bits, "static", static_scale=scale)
    scheme = "dynamic-token" if activation.per_token else "dynamic-tensor"
    return ActivationSettings(activation.bits, scheme)


def load_linear(
    quantized: AnyPath, module: str, activations: ActivationSettings | None = None
) -> QuantizedLinear:
    """A module of an output folder as something to call: `linear(inputs)`.

    Inputs are rounded as the folder states (W8A8: an integer product), or as `activations` say.
    """
    folder = open_quantized(Path(quantized))
    weight = folder.load(module)
    if activations is None:
        activations = _stated(folder.layers[module].activation, weight.input_scale)
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
    from ptq_cli.smooth_job import prepare_smoothing, smooth_settings

    runs = ("force", "restart", "listen", "listen_sites")
    run_options: dict[str, Any] = {key: options.pop(key) for key in runs if key in options}
    run_options["resources"] = take_resources(options)
    own = ("calibration", "activations", "bf16", "output")
    where = {key: options.pop(key) for key in own if key in options}
    _refuse_unknown(options, smooth_settings(command))
    return prepare_smoothing(command, model, options, **where).run(**run_options)
