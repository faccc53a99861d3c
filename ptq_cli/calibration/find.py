"""Where a command's statistics come from: as named, else what lies beside the model, or the model
itself, run on tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ptq_cli.calibration.from_activations import Activations, find_activations
from ptq_cli.calibration.from_file import CalibrationFile, beside, open_calibration
from ptq_cli.calibration.from_tokens import TokenSource
from ptq_cli.calibration.gradients import GradientSite
from ptq_cli.calibration.match import Match, match_activations, match_warnings
from ptq_cli.calibration.source import Source
from ptq_cli.calibration.streams import Forward
from ptq_cli.errors import InputError
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.npy import InputsFile
from ptq_cli.storage.tokens import TokenSettings, read_tokens

AnyPath = str | PathLike[str]
Paths = AnyPath | Iterable[AnyPath]
HELDOUT = (HELDOUT_EVERY, HELDOUT_LIMIT)


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """What statistics come from; with nothing named, what lies beside the model.

    calibration: a statistics file; activations: folders of `<module>.npy`, bf16: uint16 is bfloat16
    tokens: run the model on these, layers in sequence; with `parallel_layers` the float model only
    required: none at all is an error
    """

    calibration: Path | None = None
    activations: tuple[Path, ...] = ()
    bf16: bool = False
    tokens: TokenSettings = dataclasses.field(default_factory=TokenSettings)
    parallel_layers: bool = False
    required: bool = False

    @property
    def in_sequence(self) -> bool:
        """Whether each layer is calibrated on what the rounded layers before it produce."""
        return self.tokens.given and not self.parallel_layers


BESIDE = SourceSettings()


@dataclasses.dataclass(frozen=True)
class FoundSource:
    """Statistics for a command: where from, fingerprint, warnings of the matching."""

    statistics: Source | None
    warnings: tuple[str, ...] = ()
    fingerprint: str | None = None


def as_paths(paths: Paths) -> tuple[Path, ...]:
    """Several paths, or one alone."""
    return (Path(paths),) if isinstance(paths, str | PathLike) else tuple(map(Path, paths))


def take_source(options: dict[str, Any]) -> SourceSettings:
    """Take the fields of `SourceSettings` and `TokenSettings` out of `options`; paths may be
    strings.

    Raises:
        InputError: as `take_tokens`; --parallel-layers without tokens.
    """
    calibration = options.pop("calibration", None)
    settings = SourceSettings(
        None if calibration is None else Path(calibration),
        as_paths(options.pop("activations", None) or ()),
        bool(options.pop("bf16", False)),
        take_tokens(options),
        bool(options.pop("parallel_layers", False)),
        bool(options.pop("require_calibration", False)),
    )
    if settings.parallel_layers and not settings.tokens.given:
        raise InputError("--parallel-layers needs --tokens or --text")
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
    for name in ("tokens", "text", "mask"):
        if name in values:
            values[name] = Path(values[name])
    settings = TokenSettings(**values)
    idle = [name for name in ("seq_len", "nsamples", "mask") if name in values]
    if idle and not settings.given:
        raise InputError(f"--{idle[0].replace('_', '-')} needs --tokens or --text")
    if "seed" in values and settings.nsamples is None:
        raise InputError("--seed needs --nsamples")
    return settings


def find_source(
    checkpoint: Checkpoint, settings: SourceSettings, *, correct: bool = False
) -> FoundSource:
    """Statistics for a model: as named, else the file beside it, else `activations/` beside it.

    Linears that they lack are the plan's business: it knows which are quantized.
    correct: with tokens, the drift is wanted too (`TokenSource`)
    """
    folders, path = list(settings.activations), settings.calibration
    if settings.bf16 and (settings.tokens.given or path is not None):
        raise InputError("--bf16 is about activations", hint="it needs --activations")
    if settings.tokens.given:
        if path is not None or folders:
            raise InputError("tokens exclude --calibration and --activations")
        return _token_source(checkpoint, settings, correct)
    if path is not None and folders:
        raise InputError(
            f"both a calibration ({path}) and activations ({folders[0]}) are given",
            hint="give one of them",
        )
    if path is None and not folders:
        path, folder = beside(checkpoint)
        folders = [folder] if folder is not None and path is None else []
    if path is not None:
        statistics = calibration_of(checkpoint, path)
        return FoundSource(statistics, (), statistics.checkpoint.fingerprint)
    if not folders and settings.required:
        raise InputError(
            f"{checkpoint.path}: no calibration found",
            hint="--tokens FILE, --calibration FILE or --activations DIR",
        )
    if not folders:
        return FoundSource(None)
    match = match_activations(checkpoint, find_activations(folders, settings.bf16))
    name = ", ".join(map(str, folders))
    fingerprint = " ".join(activations_fingerprint(match))
    streamed = Activations(name, match.entries, HELDOUT, match.surplus)
    return FoundSource(streamed, match_warnings(match), fingerprint)


def _token_source(checkpoint: Checkpoint, settings: SourceSettings, correct: bool) -> FoundSource:
    tokens = read_tokens(settings.tokens, checkpoint)
    feedback = not settings.parallel_layers
    statistics = TokenSource(Forward(checkpoint, tokens, HELDOUT), feedback, correct)
    return FoundSource(statistics, tokens.warnings, statistics.fingerprint)


def calibration_of(checkpoint: Checkpoint, path: Path) -> CalibrationFile:
    """A statistics file. Raises InputError where it was made for another model."""
    statistics = open_calibration(path)
    if statistics.model != checkpoint.fingerprint:
        raise InputError(
            f"{path}: these statistics were made for another model than {checkpoint.path}",
            hint="calibrate this one",
        )
    return statistics


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
    digest = hashlib.sha256(repr(key).encode())
    for file in files:
        digest.update(repr((file.npy.shape, file.npy.dtype.str, file.npy.fortran)).encode())
        for start in {0, file.n_tokens // 2, max(0, file.n_tokens - 1)}:
            digest.update(file.read(start, min(start + 1, file.n_tokens)).tobytes())
    return digest.hexdigest()
