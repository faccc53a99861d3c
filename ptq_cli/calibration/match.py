"""Which activations belong to which linears."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ptq_cli.calibration.from_activations import Activations, ActivationSite, find_activations
from ptq_cli.calibration.gradients import GradientSite
from ptq_cli.calibration.sites import model_sites, transposed_tensors
from ptq_cli.core.names import first_and_others, fold_names
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.core.tensors import TensorSpec, is_float
from ptq_cli.errors import InputError
from ptq_cli.models.linears import default_reason, group_modules
from ptq_cli.models.sites import Site
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT, calibration_tokens
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.npy import InputsFile

HELDOUT = (HELDOUT_EVERY, HELDOUT_LIMIT)


def match_activations(
    checkpoint: Checkpoint,
    folders: Sequence[Path],
    bf16: bool,
    heldout: tuple[int, int] = HELDOUT,
    gradients: Mapping[str, GradientSite] = {},
) -> Activations:
    """The activations of `find_activations`, matched to the linears of a model.

    A linear has its own file, or shares that of a sibling that sees the same input (q, k, v).

    Raises:
        InputError: activations of the wrong width, or without tokens; all such are listed.
    """
    found = find_activations(folders, bf16)
    weights = {
        name.removesuffix(".weight"): stored.spec
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and is_float(stored.spec) and len(stored.spec.shape) == 2
    }
    entries, missing = _entries(found, weights, model_sites(checkpoint).sites)
    sites = {
        site: replace(entry.info, n_tokens=calibration_tokens(entry.info.n_tokens, heldout))
        for site, entry in entries.items()
    }
    read = [entry.files for entry in entries.values()]
    read += [entry.files for entry in gradients.values()]
    surplus = [name for name in found if name not in weights]
    odd = f"{len(surplus)} activations fit no linear of the model: {fold_names(surplus)}"
    return Activations(
        entries,
        heldout,
        missing,
        gradients,
        name=", ".join(map(str, folders)),
        sites=sites,
        files=[file.npy.path for files in read for file in files],
        surplus=surplus,
        warnings=(odd,) if surplus else (),
        fisher={module: entry.info for module, entry in gradients.items()},
    )


def _entries(
    found: Mapping[str, tuple[InputsFile, ...]],
    weights: Mapping[str, TensorSpec],
    sites: Sequence[Site],
) -> tuple[dict[str, ActivationSite], list[str]]:
    """The files of each site, and the linears that have none."""
    entries: dict[str, ActivationSite] = {}
    missing: list[str] = []
    wrong: dict[str, str] = {}
    turned = transposed_tensors(sites)
    for group in group_modules(weights, sites):
        named = [module for module in group if module in found]
        rest = [module for module in group if module not in found]
        if not named:
            missing += [module for module in rest if default_reason(weights[module]) is None]
        for module in named:
            linears = (module, *(rest if module == named[0] else ()))
            files = found[module]
            info = SiteInfo(module, linears, files[0].in_features, sum(f.n_tokens for f in files))
            wrong |= _mistakes(info, files[0], weights, turned)
            entries[module] = ActivationSite(info, files)
    if wrong:
        raise InputError(first_and_others(wrong))
    return entries, missing


def _mistakes(
    info: SiteInfo, file: InputsFile, weights: Mapping[str, TensorSpec], turned: Collection[str]
) -> dict[str, str]:
    """What is wrong with a site, by linear."""
    path, shape = file.npy.path, list(file.npy.shape)
    if info.n_tokens == 0:
        return {info.site: f"{path}: shape {shape} holds no tokens"}
    wrong = {}
    for linear in info.linears:
        spec = weights[linear]
        width = spec.shape[0 if spec.name in turned else 1]
        if width != info.in_features:
            wrong[linear] = (
                f"{path}: {shape} has in_features {info.in_features}, but tensor {spec.name!r}"
                f" {list(spec.shape)} has {width}"
            )
    return wrong


def missing_error(source: Activations) -> InputError:
    """The error for linears without activations; what is surplus is listed with them."""
    surplus = f"; left over: {fold_names(source.surplus)}" if source.surplus else ""
    return InputError(
        f"{source.name}: no activations for {len(source.missing)} linears:"
        f" {fold_names(source.missing)}{surplus}",
        hint="capture them too, or go on without them with --fallback rtn",
    )
