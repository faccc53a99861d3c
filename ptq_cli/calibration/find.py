"""Where a command's statistics come from: as named, else what lies beside the model, or the model
itself, run on tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from ptq_cli.calibration.from_file import CalibrationFile, beside, open_calibration
from ptq_cli.calibration.from_imatrix import imatrix_source
from ptq_cli.calibration.from_tokens import token_source
from ptq_cli.calibration.sites import match_activations
from ptq_cli.calibration.source import HELDOUT, Source
from ptq_cli.errors import InputError
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.tokens import CALIBRATION_SEQUENCES, TokenSettings, read_tokens

AnyPath = str | PathLike[str]
Paths = AnyPath | Iterable[AnyPath]


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """What statistics come from; with nothing named, what lies beside the model.

    calibration: a statistics file; activations: folders of `<module>.npy`, bf16: uint16 is bfloat16
    tokens: run the model on these, layers in sequence; with `parallel_layers` the float model only
    imatrix: an importance matrix of llama.cpp
    min_expert_tokens: of tokens, those that an expert is calibrated on alone; with fewer, on those
        of all experts beside it. None: an eighth of its columns
    required: none at all is an error
    """

    calibration: Path | None = None
    activations: tuple[Path, ...] = ()
    bf16: bool = False
    tokens: TokenSettings = dataclasses.field(default_factory=TokenSettings)
    parallel_layers: bool = False
    required: bool = False
    imatrix: Path | None = None
    min_expert_tokens: int | None = None

    @property
    def in_sequence(self) -> bool:
        """Whether each layer is calibrated on what the rounded layers before it produce."""
        return self.tokens.given and not self.parallel_layers


BESIDE = SourceSettings()


def as_paths(paths: Paths) -> tuple[Path, ...]:
    """Several paths, or one alone."""
    return (Path(paths),) if isinstance(paths, str | PathLike) else tuple(map(Path, paths))


def take_source(options: dict[str, Any]) -> SourceSettings:
    """Take the fields of `SourceSettings` and `TokenSettings` out of `options`; paths may be
    strings.

    Raises:
        InputError: as `take_tokens`; --parallel-layers or --min-expert-tokens without tokens.
    """
    calibration = options.pop("calibration", None)
    settings = SourceSettings(
        None if calibration is None else Path(calibration),
        as_paths(options.pop("activations", None) or ()),
        bool(options.pop("bf16", False)),
        take_tokens(options),
        bool(options.pop("parallel_layers", False)),
        bool(options.pop("require_calibration", False)),
        None if (imatrix := options.pop("imatrix", None)) is None else Path(imatrix),
        options.pop("min_expert_tokens", None),
    )
    if settings.parallel_layers and not settings.tokens.given:
        raise InputError("--parallel-layers needs --tokens, --text or --chat")
    if settings.min_expert_tokens is not None and not settings.tokens.given:
        raise InputError("--min-expert-tokens needs --tokens, --text or --chat")
    return settings


def take_tokens(options: dict[str, Any]) -> TokenSettings:
    """Take the fields of `TokenSettings` out of `options`, or what `tokens` is if it is such
    settings; paths may be strings.

    Raises:
        InputError: which tokens to take, but none are given.
    """
    names = [field.name for field in dataclasses.fields(TokenSettings)]
    values = {name: options.pop(name) for name in names if options.get(name) is not None}
    tokens = values.get("tokens")
    if isinstance(tokens, TokenSettings):
        return tokens
    for name in ("tokens", "text", "chat", "mask"):
        if name in values:
            values[name] = Path(values[name])
    settings = TokenSettings(**values)
    idle = [name for name in ("seq_len", "nsamples", "mask") if name in values]
    if idle and not settings.given:
        raise InputError(f"--{idle[0].replace('_', '-')} needs --tokens, --text or --chat")
    if "seed" in values and settings.nsamples is None:
        raise InputError("--seed needs --nsamples")
    return settings


def find_source(
    checkpoint: Checkpoint,
    settings: SourceSettings,
    *,
    correct: bool = False,
    couple: bool = False,
    hessians: bool = True,
    sums_drift: bool = True,
) -> Source | None:
    """Statistics for a model: as named, else the file beside it, else `activations/` beside it.

    Linears that they lack are the plan's business: it knows which are quantized.
    correct, couple: with tokens, the drift and the coupling of rows are wanted too (`token_source`)
    hessians: so are whole Hessians, not their diagonals alone
    sums_drift: so are sums of the drift, where there is any, not its held-out tokens alone
    """
    found = _found(checkpoint, settings, correct, couple)
    if found is None:
        return None
    return dataclasses.replace(found, hessians=hessians, sums_drift=sums_drift)


def _found(
    checkpoint: Checkpoint, settings: SourceSettings, correct: bool, couple: bool
) -> Source | None:
    folders, path = list(settings.activations), settings.calibration
    if settings.imatrix is not None:
        if settings.tokens.given or path is not None or folders:
            raise InputError("--imatrix excludes tokens, --calibration and --activations")
        return imatrix_source(checkpoint, settings.imatrix)
    if settings.bf16 and (settings.tokens.given or path is not None):
        raise InputError("--bf16 is about activations", hint="it needs --activations")
    if settings.tokens.given:
        if path is not None or folders:
            raise InputError("tokens exclude --calibration and --activations")
        tokens = read_tokens(settings.tokens, checkpoint, CALIBRATION_SEQUENCES)
        return token_source(
            checkpoint,
            tokens,
            HELDOUT,
            feedback=settings.in_sequence,
            correct=correct,
            couple=couple,
            min_expert_tokens=settings.min_expert_tokens,
        )
    if path is not None and folders:
        raise InputError(
            f"both a calibration ({path}) and activations ({folders[0]}) are given",
            hint="give one of them",
        )
    if path is None and not folders:
        path, folder = beside(checkpoint)
        folders = [folder] if folder is not None and path is None else []
    if path is not None:
        return calibration_of(checkpoint, path)
    if folders:
        return match_activations(checkpoint, folders, settings.bf16)
    if settings.required:
        raise InputError(
            f"{checkpoint.path}: no calibration found",
            hint="--tokens FILE, --calibration FILE or --activations DIR",
        )
    return None


def calibration_of(checkpoint: Checkpoint, path: Path) -> CalibrationFile:
    """A statistics file. Raises InputError where it was made for another model."""
    statistics = open_calibration(path)
    if statistics.model != checkpoint.fingerprint:
        raise InputError(
            f"{path}: these statistics were made for another model than {checkpoint.path}",
            hint="calibrate this one",
        )
    return statistics
