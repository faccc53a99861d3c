"""Experts that a checkpoint stores as one tensor of all: where each one's own weights lie in it.

    <experts>.gate_up_proj        [experts, 2 · inter, hidden], or [experts, hidden, 2 · inter]
    <experts>.down_proj           [experts, hidden, inter], or [experts, inter, hidden]
    <experts>.gate_up_proj_bias   [experts, 2 · inter]
    <experts>.down_proj_bias      [experts, hidden]

Which of the two it is follows from the shapes of both. Gate and up are halves of their axis, or
take turns in it, as the family says. Some have gate_proj and up_proj as a tensor each (which axis
is which then follows from config.json's hidden_size), and Granite calls them input_linear and
output_linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ptq_cli.core.tensors import TensorSpec, is_float
from ptq_cli.models.families import family_of
from ptq_cli.models.family import Config, text_config
from ptq_cli.models.names import ExpertNames

_USUAL = ExpertNames("gate", "experts.{}", ("gate_proj", "up_proj"), "down_proj")
_LAYOUTS = (  # names of the tensors before and behind the activation
    (("gate_up_proj",), "down_proj"),
    (("gate_up_proj.weight",), "down_proj.weight"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_proj.weight", "up_proj.weight"), "down_proj.weight"),
    (("input_linear.weight",), "output_linear.weight"),
)
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class Part:
    """A weight or bias of one expert inside a stored tensor of all.

    stored: that tensor's name; offset, strides: of the part, in elements of it
    """

    spec: TensorSpec
    stored: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Fused:
    """One stored tensor: `modules` are what each expert has in it, `transposed` says that inputs
    are before outputs."""

    name: str
    modules: tuple[str, ...]
    transposed: bool
    interleaved: bool


def is_expert(module: str) -> bool:
    """Whether it belongs to one expert, by its name."""
    return _EXPERT.search(module) is not None


def expert_parts(specs: Mapping[str, TensorSpec], config: Config) -> dict[str, list[Part]]:
    """The parts of each tensor that holds the weights, or biases, of several experts.

    Tensors whose shapes do not say which axis is which are no such ones.
    """
    names = _experts(config) or _USUAL
    found = {}
    for name in specs:
        for inputs, output in _LAYOUTS:
            parent = name.removesuffix(output)
            if parent == name or (parent and not parent.endswith(".")):
                continue
            inside = "" if parent.endswith("experts.") else "experts."
            tensors = [f"{parent}{own}" for own in (*inputs, output)]
            transposed = _transposed([specs.get(tensor) for tensor in tensors], config)
            if transposed is None:
                continue
            modules = [names.inputs] if len(inputs) == 1 else [(own,) for own in names.inputs]
            for tensor, own in zip(tensors, [*modules, (names.output,)], strict=True):
                full = tuple(f"{parent}{inside}{{}}.{module}" for module in own)
                fused = _Fused(tensor, full, transposed, names.interleaved)
                found[tensor] = _weights(fused, specs[tensor])
                bias = specs.get(f"{tensor.removesuffix('.weight')}_bias")
                if bias is not None and is_float(bias):
                    found[bias.name] = _biases(fused, specs[tensor], bias)
    return {name: parts for name, parts in found.items() if parts}


def _transposed(specs: list[TensorSpec | None], config: Config) -> bool | None:
    """Whether the tensors before and behind the activation are [experts, in, out], or [experts,
    out, in]; None: they do not fit together."""
    present = [spec for spec in specs if spec is not None and is_float(spec)]
    if len(present) < len(specs) or any(len(spec.shape) != 3 for spec in present):
        return None
    *inputs, (experts, a, b) = (spec.shape for spec in present)
    if len(inputs) == 1 and experts * a * b:
        ways: dict[tuple[int, ...], bool] = {
            (experts, 2 * b, a): False, (experts, b, 2 * a): True
        }  # fmt: skip
        return ways.get(inputs[0])
    if a == b or any(shape != (experts, b, a) for shape in inputs):
        return None
    return {a: False, b: True}.get(text_config(config).get("hidden_size", 0))


def _weights(fused: _Fused, spec: TensorSpec) -> list[Part]:
    experts, rows, columns = spec.shape
    outputs, inputs = (columns, rows) if fused.transposed else (rows, columns)
    step, along = (1, columns) if fused.transposed else (columns, 1)
    own = outputs // len(fused.modules)
    return [
        Part(
            TensorSpec(f"{module.format(expert)}.weight", spec.dtype, (own, inputs)),
            spec.name,
            expert * rows * columns + step * (place if fused.interleaved else place * own),
            (step * (len(fused.modules) if fused.interleaved else 1), along),
        )
        for expert in range(experts)
        for place, module in enumerate(fused.modules)
    ]


def _biases(fused: _Fused, weight: TensorSpec, spec: TensorSpec) -> list[Part]:
    outputs = weight.shape[2 if fused.transposed else 1]
    if spec.shape != (weight.shape[0], outputs):
        return []
    own = outputs // len(fused.modules)
    return [
        Part(
            TensorSpec(f"{module.format(expert)}.bias", spec.dtype, (own,)),
            spec.name,
            expert * outputs + (place if fused.interleaved else place * own),
            (len(fused.modules) if fused.interleaved else 1,),
        )
        for expert in range(weight.shape[0])
        for place, module in enumerate(fused.modules)
    ]


def every_expert_is_linear(config: Config, fmt: str) -> bool:
    """Whether the runtimes of a format have one Linear for each expert, quantized or dense, however
    the checkpoint stores them."""
    experts = _experts(config)
    return experts is not None and fmt in experts.linears_in


def experts_load_alone(config: Config) -> bool:
    """Whether runtimes load the family's experts from tensors of each; true where it has none."""
    experts = _experts(config)
    return experts is None or experts.fused_by_loaders


def experts_to_fuse(config: Config, modules: Iterable[str]) -> list[str]:
    """Of these modules the experts that runtimes fuse when they load them."""
    experts = _experts(config)
    if experts is None or not experts.fused_by_loaders:
        return []
    return [module for module in modules if is_expert(module)]


def _experts(config: Config) -> ExpertNames | None:
    family = family_of(config)
    return None if family is None else family.names.experts
