"""`calibrate` as a command runs it: what is streamed or merged, the job, the statistics file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.calibration.find import AnyPath, SourceSettings, calibration_of
from ptq_cli.calibration.from_activations import find_activations
from ptq_cli.calibration.from_file import beside, open_calibration
from ptq_cli.calibration.from_tokens import token_source
from ptq_cli.calibration.merged import merge_calibrations
from ptq_cli.calibration.sites import match_activations, missing_error
from ptq_cli.calibration.source import HELDOUT, Source
from ptq_cli.calibration.to_imatrix import check_importance, write_importance
from ptq_cli.commands.estimate import Estimate, estimate_calibration
from ptq_cli.core.names import by_number, fold_names
from ptq_cli.errors import InputError
from ptq_cli.plan.units import few_tokens
from ptq_cli.report.report import dead_channels
from ptq_cli.report.weak import weaknesses
from ptq_cli.run.calibrate import calibrate_sites
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.output import Target
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tokens import CALIBRATION_SEQUENCES, read_tokens
from ptq_cli.storage.weights import CALIBRATION_SUFFIX


@dataclass(frozen=True)
class CalibrateJob:
    """A calibration that is planned and ready to run.

    fingerprints: of what the source reads
    imatrix_out: where the statistics go as an importance matrix, too
    """

    checkpoint: Checkpoint
    source: Source
    fingerprints: Sequence[str]
    warnings: tuple[str, ...]
    output: Path
    imatrix_out: Path | None = None

    def target(self, options: RunOptions) -> Target:
        """Where the run works, and what makes another the same."""
        job = {
            "command": "calibrate",
            "version": __version__,
            "model": self.checkpoint.fingerprint,
            "inputs": list(self.fingerprints),
            "heldout": list(self.source.heldout),
        }
        keep = [*self.checkpoint.files, *self.source.files]
        return Target(self.output, job, options.force, options.restart, keep)

    def estimate(self, options: RunOptions) -> Estimate:
        """What `run` would do. Raises InputError, FileError: what it would refuse to begin with."""
        target, resources = self.target(options), options.resources
        return estimate_calibration(self.checkpoint, self.source, target, resources, self.warnings)

    def run(self, options: RunOptions, warn: Callable[[str], None]) -> dict[str, Any]:
        """Do the work, and give the file its name; what it holds. Raises PtqError."""
        target = self.target(options)
        earlier = target.finished()
        if self.imatrix_out is not None:
            check_importance(self.checkpoint, self.imatrix_out, options.force or earlier)
        if earlier:
            sites = dict(open_calibration(self.output).content["sites"])
            bare = [site for site in self.source.sites if site not in sites]
            result: dict[str, Any] = {"sites": sites, "without_tokens": bare, "seconds": 0.0}
        else:
            model = self.checkpoint.fingerprint
            with Staging(target) as staging:
                result = calibrate_sites(
                    self.source, model, staging, options.listen, options.resources
                )
        if self.imatrix_out is not None:
            write_importance(self.output, self.checkpoint, self.imatrix_out, options.force)
        order = by_number(self.source.sites)  # a file has them by letter
        result["sites"] = {site: result["sites"][site] for site in order if site in result["sites"]}
        late = []
        if bare := result.pop("without_tokens"):
            late.append(f"no token reaches {len(bare)} sites: {fold_names(bare)}")
        late += self._weak_inputs(result["sites"])
        for warning in late:
            warn(warning)
        warnings = [*self.warnings, *late]
        return {"output": str(self.output), "warnings": warnings, "earlier": earlier, **result}

    def _weak_inputs(self, sites: Mapping[str, Any]) -> list[str]:
        """What is wrong with the inputs in the file. sites: what its metadata says of them"""
        counts = {
            site: (int((absmax == 0).sum()), len(absmax))
            for site, absmax in open_calibration(self.output).ranges(())
        }
        found = weaknesses([_as_row(*site) for site in sites.items()], "sites")
        return [*dead_channels(counts, "sites"), *found]


def _as_row(site: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata says of a site, as a row of a report."""
    return {"module": site, "calibrated": True, "weak": entry.get("weak", {})}


def prepare_calibration(
    model: AnyPath,
    inputs: SourceSettings,
    *,
    merge: Sequence[Path] = (),
    gradients: Sequence[Path] = (),
    heldout: tuple[int, int] = HELDOUT,
    missing: str = "error",
    output: AnyPath | None = None,
) -> CalibrateJob:
    """Plan a calibration: every mistake that can be known is found here.

    inputs: tokens, or activations; with nothing named at all, those beside the model
    merge: statistics files, instead of inputs; gradients: folders of `<module>.npy`
    heldout: every how many tokens one is held out, how many at most
    missing: what linears without activations are: "error", or left out ("rtn")
    """
    checkpoint = open_float(Path(model))
    target = default_target(checkpoint) if output is None else Path(output)
    if merge:
        merged = merge_calibrations(tuple(calibration_of(checkpoint, path) for path in merge))
        return CalibrateJob(checkpoint, merged, merged.fingerprints, merged.warnings, target)
    if inputs.tokens.given:
        tokens = read_tokens(inputs.tokens, checkpoint, CALIBRATION_SEQUENCES)
        least = inputs.min_expert_tokens
        stream = token_source(checkpoint, tokens, heldout, min_expert_tokens=least)
        prints = [*stream.fingerprints, digest_words(json.dumps(checkpoint.config, sort_keys=True))]
        return CalibrateJob(checkpoint, stream, prints, tokens.warnings, target)
    slopes = find_activations(gradients, inputs.bf16)
    if gradients and not slopes:
        raise InputError(f"{gradients[0]}: no gradients <module>.npy in it")
    folders, (_, found) = list(inputs.activations), beside(checkpoint)
    if not folders and found is not None:
        folders = [found]
    if not folders and not slopes:
        raise InputError(
            f"{checkpoint.path}: no activations given, and no activations/ beside it",
            hint="--activations DIR",
        )
    source = match_activations(checkpoint, folders, inputs.bf16, heldout, slopes)
    lacking = not source.sites or (source.missing and missing == "error")
    if lacking and (folders or not slopes):
        raise missing_error(source)
    warnings = [*source.warnings, *few_tokens(source.sites.values())]
    if source.missing:
        lost = fold_names(source.missing)
        warnings.append(f"no activations for {len(source.missing)} linears: {lost}")
    return CalibrateJob(checkpoint, source, source.fingerprints, tuple(warnings), target)


def default_target(checkpoint: Checkpoint) -> Path:
    """`<model>.calibration.safetensors` beside the model."""
    return checkpoint.folder / (checkpoint.stem + CALIBRATION_SUFFIX)
