"""Where the linears of a checkpoint are in a torch model, by names; without torch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ptq_cli.calibration.torch_modules import find_modules
from ptq_cli.models.linears import module_tree

LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}
QWEN_VL = {"model_type": "qwen2_5_vl"}


class Module:
    """As much of a torch module as is asked for."""

    def __init__(self, **parameters):
        self.__dict__ |= {name: np.zeros(shape) for name, shape in parameters.items()}
        self.own = {name: getattr(self, name) for name in parameters}

    def parameters(self, recurse):
        return self.own.values()

    def named_parameters(self, recurse):
        return self.own.items()


class Experts(Module):
    def act_fn(self, values): ...


def find(linears, modules, config=None):
    return find_modules(linears, modules, module_tree(config or {}))


@pytest.mark.parametrize(
    ("config", "stored", "inside"),
    [
        ({}, "model.layers.0.q_proj", "model.layers.0.q_proj"),
        (LLAVA, "language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        (QWEN_VL, "model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        (QWEN_VL, "model.layers.0.q_proj", "model.layers.0.q_proj"),  # as `named` says
        ({}, "layers.0.block_sparse_moe.experts.0.w1", "layers.0.mlp.experts.0.w1"),
    ],
)
def test_modules_have_their_names_in_transformers(config, stored, inside):
    module = Module(weight=(4, 4))
    found = find([stored], {inside: module}, config)
    assert found.modules == {stored: module}
    assert found.warnings() == []


def test_a_module_with_two_names_is_hooked_once():
    one, two = Module(weight=(4, 4)), Module(weight=(4, 4))
    found = find(["a", "b", "c"], {"a": one, "b": two, "c": one})
    assert found.modules == {"a": one, "b": two}
    assert found.names == {"a": ["a", "c"], "b": ["b"]}


LINEARS = [f"l.block_sparse_moe.experts.{n}.w{own}" for n in range(2) for own in (1, 2, 3)]


@pytest.mark.parametrize("first", ["gate_up_proj", "up_proj"])
def test_experts_in_one_module_are_found_by_their_numbers(first):
    module = Experts(**{first: (2, 8, 4), "down_proj": (2, 4, 4), "down_proj_bias": (2, 4)})
    found = find(LINEARS, {"l.mlp.experts": module})
    (experts,) = found.experts.values()
    a, b, c, d, e, f = LINEARS
    assert experts.before == {0: [a, c], 1: [d, f]}
    assert experts.behind == {0: [b], 1: [e]}
    assert (found.modules, found.warnings()) == ({}, [])
    assert sorted(found.names) == sorted(LINEARS)


@pytest.mark.parametrize(
    "module",
    [
        Experts(w13=(2, 8, 4), w2=(2, 4, 4)),
        Experts(gate_proj=(2, 8, 4), up_proj=(2, 8, 4), down_proj=(2, 4, 4)),
        Module(gate_up_proj=(2, 8, 4), down_proj=(2, 4, 4)),
    ],
)
def test_experts_out_of_reach_are_named_with_what_to_do(module):
    found = find([*LINEARS, "l.q_proj"], {"l.mlp.experts": module, "l.q_proj": SimpleNamespace()})
    (warning,) = found.warnings()
    assert warning == (
        f"6 linears of experts are inside {type(module).__name__}, where no hook reaches them:"
        " l.block_sparse_moe.experts.{0-1}.w{1-3}; for their statistics run ptq calibrate --tokens,"
        " or ptq gptq rounds them to nearest with --fallback rtn"
    )


def test_linears_without_a_module_are_named():
    found = find(["a.q_proj", "a.k_proj", "a.0.fc"], {"a.q_proj": Module(weight=(4, 4))})
    (warning,) = found.warnings()
    assert warning == (
        "2 linears of the checkpoint are no modules of the model: a.{k_proj, 0.fc};"
        " named= maps names"
    )
