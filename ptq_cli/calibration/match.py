"""Which activations belong to which linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq_cli.calibration.from_activations import ActivationSite
from ptq_cli.calibration.sites import model_sites, transposed_tensors
from ptq_cli.core.names import first_and_others, fold_names
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.core.tensors import is_float
from ptq_cli.errors import InputError
from ptq_cli.models.linears import default_reason, group_modules
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.npy import InputsFile


@dataclass(frozen=True)
class Match:
    """Activations matched to sites, and what did not match."""

    entries: Mapping[str, ActivationSite]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


def match_activations(checkpoint: Checkpoint, found: Mapping[str, tuple[InputsFile, ...]]) -> Match:
    """Match activations to the linears of a model.

    A linear has its own file, or shares that of a sibling that sees the same input (q, k, v).

    Raises:
        InputError: activations of the wrong width, or without tokens; all such are listed.
    """
    weights = {
        name.removesuffix(".weight"): stored
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and is_float(stored.spec) and len(stored.spec.shape) == 2
    }
    entries: dict[str, ActivationSite] = {}
    missing: list[str] = []
    wrong: dict[str, str] = {}
    sites = model_sites(checkpoint).sites
    turned = transposed_tensors(sites)
    widths = {
        module: stored.spec.shape[0 if stored.spec.name in turned else 1]
        for module, stored in weights.items()
    }
    for group in group_modules(weights, sites):
        named = [module for module in group if module in found]
        rest = [module for module in group if module not in found]
        if not named:
            missing += [m for m in rest if default_reason(weights[m].spec) is None]
            continue
        for module in named:
            linears = (module, *(rest if module == named[0] else ()))
            files = found[module]
            info = SiteInfo(module, linears, files[0].in_features, sum(f.n_tokens for f in files))
            wrong |= _mistakes(info, files, weights, widths)
            entries[module] = ActivationSite(info, files)
    if wrong:
        raise InputError(first_and_others(wrong))
    surplus = tuple(name for name in found if name not in weights)
    return Match(entries, tuple(missing), surplus)


def _mistakes(
    info: SiteInfo,
    files: tuple[InputsFile, ...],
    weights: Mapping[str, Any],
    widths: Mapping[str, int],
) -> dict[str, str]:
    if info.n_tokens == 0:
        shape = list(files[0].npy.shape)
        return {info.site: f"{files[0].npy.path}: shape {shape} holds no tokens"}
    found = f"{files[0].npy.path}: {list(files[0].npy.shape)} has in_features {info.in_features}"
    return {
        linear: f"{found}, but tensor {linear + '.weight'!r} {list(weights[linear].spec.shape)} has"
        f" {widths[linear]}"
        for linear in info.linears
        if widths[linear] != info.in_features
    }


def match_warnings(match: Match) -> tuple[str, ...]:
    """A warning about activations that fit no linear."""
    if not match.surplus:
        return ()
    names = fold_names(match.surplus)
    return (f"{len(match.surplus)} activations fit no linear of the model: {names}",)


def missing_error(match: Match, where: str) -> InputError:
    """The error for linears without activations; what is surplus is listed with them."""
    surplus = f"; left over: {fold_names(match.surplus)}" if match.surplus else ""
    return InputError(
        f"{where}: no activations for {len(match.missing)} linears:"
        f" {fold_names(match.missing)}{surplus}",
        hint="capture them too, or go on without them with --fallback rtn",
    )
