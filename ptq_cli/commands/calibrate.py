"""`calibrate` as a command runs it: what is streamed or merged, the job, the statistics file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import AnyPath, calibration_of
from ptq_cli.calibration.from_activations import find_activations
from ptq_cli.calibration.from_file import beside, merge_calibrations, open_calibration
from ptq_cli.calibration.from_tokens import token_source
from ptq_cli.calibration.sites import match_activations, missing_error
from ptq_cli.calibration.source import Source
from ptq_cli.commands.estimate import Estimate, estimate_calibration
from ptq_cli.core.names import by_number, fold_names
from ptq_cli.core.progress import Listener
from ptq_cli.errors import InputError
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.plan.units import few_tokens
from ptq_cli.run.calibrate import calibrate_sites
from ptq_cli.run.schedule import Resources
from ptq_cli.storage.checkpoint import CALIBRATION_SUFFIX, Checkpoint
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.folder import open_float
from ptq_cli.storage.output import Target
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tokens import TokenSettings, read_tokens


@dataclass(frozen=True)
class CalibrateJob:
    """A calibration that is planned and ready to run.

    fingerprints: of what the source reads
    """

    checkpoint: Checkpoint
    source: Source
    fingerprints: Sequence[str]
    warnings: tuple[str, ...]
    output: Path

    def target(self, *, force: bool, restart: bool) -> Target:
        """Where the run works, and what makes another the same."""
        job = {
            "command": "calibrate",
            "version": __version__,
            "model": self.checkpoint.fingerprint,
            "inputs": list(self.fingerprints),
            "heldout": list(self.source.heldout),
        }
        keep = [*self.checkpoint.files, *self.source.files]
        return Target(self.output, job, force, restart, keep)

    def estimate(self, *, force: bool, restart: bool, resources: Resources) -> Estimate:
        """What `run` would do. Raises InputError, FileError: what it would refuse to begin with."""
        target = self.target(force=force, restart=restart)
        return estimate_calibration(self.checkpoint, self.source, target, resources, self.warnings)

    def run(
        self,
        *,
        force: bool,
        restart: bool,
        resources: Resources,
        listen: Listener,
        warn: Callable[[str], None],
    ) -> dict[str, Any]:
        """Do the work, and give the file its name; what it holds. Raises PtqError."""
        target = self.target(force=force, restart=restart)
        earlier = target.finished()
        if earlier:
            sites = dict(open_calibration(self.output).content["sites"])
            bare = [site for site in self.source.sites if site not in sites]
            result: dict[str, Any] = {"sites": sites, "without_tokens": bare, "seconds": 0.0}
        else:
            model = self.checkpoint.fingerprint
            with Staging(target) as staging:
                result = calibrate_sites(self.source, model, staging, listen, resources)
        order = by_number(self.source.sites)  # a file has them by letter
        result["sites"] = {site: result["sites"][site] for site in order if site in result["sites"]}
        warnings = list(self.warnings)
        if bare := result.pop("without_tokens"):
            warnings.append(f"no token reaches {len(bare)} sites: {fold_names(bare)}")
            warn(warnings[-1])
        return {"output": str(self.output), "warnings": warnings, "earlier": earlier, **result}


NO_TOKENS = TokenSettings()


@dataclass(frozen=True)
class CalibrationSettings:
    """What statistics are made from: statistics files, or tokens, or activations and gradients
    (with nothing named, the activations beside the model).

    activations, gradients: folders of `<module>.npy`, bf16: uint16 is bfloat16
    heldout: every how many tokens one is held out, how many at most
    missing: what linears without activations are: "error", or left out ("rtn")
    """

    activations: tuple[Path, ...] = ()
    gradients: tuple[Path, ...] = ()
    bf16: bool = False
    tokens: TokenSettings = NO_TOKENS
    merge: tuple[Path, ...] = ()
    heldout: tuple[int, int] = (HELDOUT_EVERY, HELDOUT_LIMIT)
    missing: str = "error"


def prepare_calibration(
    model: AnyPath, settings: CalibrationSettings, output: AnyPath | None = None
) -> CalibrateJob:
    """Plan a calibration: every mistake that can be known is found here."""
    checkpoint = open_float(Path(model))
    target = default_target(checkpoint) if output is None else Path(output)
    if settings.merge:
        return prepare_merge(checkpoint, settings.merge, target)
    if settings.tokens.given:
        return prepare_tokens(checkpoint, settings.tokens, settings.heldout, target)
    return prepare_activations(checkpoint, settings, target)


def default_target(checkpoint: Checkpoint) -> Path:
    """`<model>.calibration.safetensors` beside the model."""
    return checkpoint.folder / (checkpoint.stem + CALIBRATION_SUFFIX)


def prepare_merge(checkpoint: Checkpoint, paths: Sequence[Path], output: Path) -> CalibrateJob:
    """Statistics files into one; tokens were held out as the first of them says."""
    source = merge_calibrations(tuple(calibration_of(checkpoint, path) for path in paths))
    return CalibrateJob(checkpoint, source, source.fingerprints, (), output)


def prepare_tokens(
    checkpoint: Checkpoint, settings: TokenSettings, heldout: tuple[int, int], output: Path
) -> CalibrateJob:
    """What the float model computes on tokens."""
    tokens = read_tokens(settings, checkpoint)
    source = token_source(checkpoint, tokens, heldout)
    prints = [*source.fingerprints, digest_words(json.dumps(checkpoint.config, sort_keys=True))]
    return CalibrateJob(checkpoint, source, prints, tokens.warnings, output)


def prepare_activations(
    checkpoint: Checkpoint, settings: CalibrationSettings, output: Path
) -> CalibrateJob:
    """Activations, as named or beside the model, and gradients."""
    slopes = find_activations(settings.gradients, settings.bf16)
    if settings.gradients and not slopes:
        raise InputError(f"{settings.gradients[0]}: no gradients <module>.npy in it")
    folders = list(settings.activations)
    if not folders and (not slopes or beside(checkpoint)[1] is not None):
        folders = [_activations_beside(checkpoint)]
    source = match_activations(checkpoint, folders, settings.bf16, settings.heldout, slopes)
    alone = bool(slopes) and not folders
    if ((source.missing and settings.missing == "error") or not source.sites) and not alone:
        raise missing_error(source)
    infos = source.sites.values()
    few = few_tokens([(info.site, info.n_tokens, info.in_features) for info in infos])
    warnings = [*source.warnings, *few]
    if source.missing:
        warnings.append(
            f"no activations for {len(source.missing)} linears: {fold_names(source.missing)}"
        )
    return CalibrateJob(checkpoint, source, source.fingerprints, tuple(warnings), output)


def _activations_beside(checkpoint: Checkpoint) -> Path:
    _, folder = beside(checkpoint)
    if folder is None:
        raise InputError(
            f"{checkpoint.path}: no activations given, and no activations/ beside it",
            hint="--activations DIR",
        )
    return folder
