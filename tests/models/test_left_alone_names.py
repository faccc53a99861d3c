"""Which tensors stay dense, by names alone: a family that is not known."""

from __future__ import annotations

import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models.linears import left_alone

BLOCK = "model.layers.0."


def reasons(*modules):
    names = [f"{BLOCK}{module}.weight" for module in modules]
    found = left_alone({n: TensorSpec(n, "F32", (8, 8)) for n in names}, {"model_type": "new"})
    return {name.removeprefix(BLOCK).removesuffix(".weight"): why for name, why in found.items()}


@pytest.mark.parametrize("name", ["gate", "gating", "gate_network", "expert_selector", "wg"])
def test_what_stands_beside_experts_weighs_them(name):
    experts = [f"mlp.experts.{n}.{part}" for n in range(2) for part in ("up", "down")]
    assert reasons(f"mlp.{name}", "mlp.shared_expert.up", *experts) == {f"mlp.{name}": "router"}


def test_a_gate_beside_up_and_down_is_a_linear():
    assert reasons("mlp.gate", "mlp.up", "mlp.down", "self_attn.q") == {}


def test_a_gate_of_whole_branches_is_none():
    assert reasons("mlp.shared_gate", "self_attn.q") == {"mlp.shared_gate": "router"}
