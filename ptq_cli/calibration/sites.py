"""The sites of a checkpoint, and which activations and gradients belong to which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ptq_cli.calibration.from_activations import Activations, InputsFiles, find_activations
from ptq_cli.calibration.source import HELDOUT, FisherInfo
from ptq_cli.core.names import first_and_others, fold_names
from ptq_cli.core.statistics import SiteInfo
from ptq_cli.core.tensors import TensorSpec, is_float
from ptq_cli.errors import InputError
from ptq_cli.models.detect import Sites, find_sites
from ptq_cli.models.linears import group_modules, is_cross_attention, left_alone
from ptq_cli.models.recipe import merge_sites, recipe_sites
from ptq_cli.models.sites import Site
from ptq_cli.numerics.statistics import calibration_tokens
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.npy import InputsFile


def model_sites(
    checkpoint: Checkpoint, family: str = "", named: Sequence[Mapping[str, Any]] = ()
) -> Sites:
    """The sites of a model: those a recipe names, and those its family's table tells.

    Raises:
        InputError: a recipe's family or sites do not fit the checkpoint.
    """
    found = find_sites(checkpoint.specs, checkpoint.config or None, family or None)
    if not named:
        return found
    return replace(found, sites=merge_sites(found.sites, recipe_sites(named, checkpoint.specs)))


def transposed_tensors(sites: Sequence[Site]) -> frozenset[str]:
    """Tensors that are stored [in_features, out_features]."""
    linears = (linear for site in sites for linear in site.linears)
    return frozenset(linear.tensor for linear in linears if linear.transposed)


def match_activations(
    checkpoint: Checkpoint,
    folders: Sequence[Path],
    bf16: bool,
    heldout: tuple[int, int] = HELDOUT,
    gradients: Mapping[str, InputsFiles] = {},
) -> Activations:
    """The activations of `find_activations`, matched to the linears of a model, and gradients.

    A linear has its own file, or shares that of a sibling that sees the same input (q, k, v); in a
    cross attention each has its own.

    Raises:
        InputError: activations of the wrong width, or without tokens; all such are listed; as
            for gradients that fit no weight.
    """
    fisher = _match_gradients(checkpoint, gradients)
    found = find_activations(folders, bf16)
    weights = {
        name.removesuffix(".weight"): spec
        for name, spec in checkpoint.specs.items()
        if name.endswith(".weight") and is_float(spec) and len(spec.shape) == 2
    }
    known = model_sites(checkpoint).sites
    sites, bare = _match(found, weights, known)
    reasons = left_alone(checkpoint.specs, checkpoint.config)
    missing = [module for module in bare if weights[module].name not in reasons]
    inputs = {site: found[site] for site in sites}
    surplus = [name for name in found if name not in weights]
    warnings = [*_assumed(sites.values(), known)]
    if surplus:
        warnings.append(
            f"{len(surplus)} activations fit no linear of the model: {fold_names(surplus)}"
        )
    return Activations(
        inputs,
        missing,
        gradients,
        name=", ".join(map(str, folders)),
        sites={
            site: replace(info, n_tokens=calibration_tokens(info.n_tokens, heldout))
            for site, info in sites.items()
        },
        heldout=heldout,
        files=[
            file.npy.path for files in (*inputs.values(), *gradients.values()) for file in files
        ],
        surplus=surplus,
        warnings=tuple(warnings),
        fisher=fisher,
    )


def _match(
    found: Mapping[str, InputsFiles], weights: Mapping[str, TensorSpec], sites: Sequence[Site]
) -> tuple[dict[str, SiteInfo], list[str]]:
    """The sites that have activations, with all their tokens, and the linears without any."""
    result: dict[str, SiteInfo] = {}
    missing: list[str] = []
    wrong: dict[str, str] = {}
    turned = transposed_tensors(sites)
    for group in _alike(weights, sites):
        named = [module for module in group if module in found]
        rest = [module for module in group if module not in found]
        if not named:
            missing += rest
        for module in named:
            linears = (module, *(rest if module == named[0] else ()))
            files = found[module]
            info = SiteInfo(module, linears, files[0].in_features, sum(f.n_tokens for f in files))
            wrong |= _mistakes(info, files[0], weights, turned)
            result[module] = info
    if wrong:
        raise InputError(first_and_others(wrong))
    return result, missing


def _assumed(found: Iterable[SiteInfo], sites: Sequence[Site]) -> Iterator[str]:
    """A warning of linears that take the activations of another, where that they see the same is
    derived from more than the names of known families."""
    likely = {x.module for site in sites if site.certainty == "likely" for x in site.linears}
    borrowing = [x for info in found for x in info.linears if x != info.site and x in likely]
    if borrowing:
        yield (
            f"{len(borrowing)} linears have no activations of their own and likely see those of"
            f" their siblings: {fold_names(borrowing)}; ptq inspect --sites says why"
        )


def _alike(weights: Iterable[str], sites: Sequence[Site]) -> Iterator[tuple[str, ...]]:
    """Linears that see the same inputs, as far as their names can tell."""
    for group in group_modules(weights, sites):
        if is_cross_attention(group[0]):
            yield from ((module,) for module in group)
        else:
            yield group


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
        hint="capture them too, or go on without them with --fallback rtn"
        + files_needed(source.missing),
    )


def files_needed(missing: Iterable[str]) -> str:
    """What to add to a hint where linears without activations might be thought to share some."""
    crosses = any(map(is_cross_attention, missing))
    return "; in a cross attention q, k and v need a file each" if crosses else ""


def _match_gradients(
    checkpoint: Checkpoint, found: Mapping[str, InputsFiles]
) -> dict[str, FisherInfo]:
    """What gradients tell, by module.

    Raises:
        InputError: gradients that fit no weight; all such are listed.
    """
    result: dict[str, FisherInfo] = {}
    wrong: dict[str, str] = {}
    for module, files in found.items():
        stored = checkpoint.tensors.get(f"{module}.weight")
        if stored is None or not is_float(stored.spec):
            wrong[module] = f"{files[0].npy.path}: the model has no weight {module + '.weight'!r}"
            continue
        shape = stored.spec.shape
        misfits = [file for file in files if not _fits(file.npy.shape, shape)]
        n = sum(file.npy.shape[0] for file in files)
        if misfits:
            wrong[module] = (
                f"{misfits[0].npy.path}: gradients {list(misfits[0].npy.shape)} are neither [n,"
                f" {', '.join(map(str, shape))}] nor [n, {prod(shape)}]"
            )
        elif n == 0:
            wrong[module] = f"{files[0].npy.path}: gradients of no samples"
        result[module] = FisherInfo(module, shape, n)
    if wrong:
        raise InputError(first_and_others(wrong))
    return result


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return shape[1:] in (weight, (prod(weight),)) and prod(weight) > 0
