"""Experts that a format could hold, but that no runtime would read from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ptq_cli.core.layer import Layer, Misfit
from ptq_cli.core.plugins import Format
from ptq_cli.formats.runtimes import RUNTIMES
from ptq_cli.models.experts import every_expert_is_linear, is_expert
from ptq_cli.models.families import family_of
from ptq_cli.models.family import Config

_FUSING = "compressed-tensors"  # whose experts transformers and vLLM fuse


def expert_misfits(
    layers: Sequence[Layer], fmt: Format, config: Config, fused: Collection[str] = ()
) -> dict[str, Misfit]:
    """Modules of experts that no runtime reads from this format, and what would help.

    fused: tensors that the checkpoint stores as parts of one tensor of all experts
    """
    experts = [layer for layer in layers if is_expert(layer.module)]
    read = {name for formats in RUNTIMES.values() for name in formats} - {"gguf"}  # has its own
    if fmt.name not in read or every_expert_is_linear(config, fmt.name) or not experts:
        return {}
    family = family_of(config)
    kind = config.get("model_type") if family is None else family.name
    names = None if family is None else family.names.experts
    if names is not None and names.fused_by_loaders:
        if fmt.name != _FUSING:
            return {}
        why = f"transformers and vLLM fuse the experts of {kind} without their zero points"
        return {x.module: Misfit(why, "--sym") for x in experts if not x.grid.sym}
    if names is None:
        experts = [layer for layer in experts if layer.tensor in fused]
        why = f"it is not known that a runtime reads the experts of {kind} one by one"
    elif fmt.name == _FUSING:
        why = f"transformers reads the experts of {kind} only fused and in floating point"
    else:
        why = f"no runtime that reads {fmt.name} takes the experts of {kind} one by one"
    return {layer.module: Misfit(why, "--format ptq") for layer in experts}
