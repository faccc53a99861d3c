"""Experts of transformers' fused modules: what `ptq_cli.capture` takes for their inputs is what
their own forward multiplies with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptq_cli.calibration.torch_experts import is_readable, routed_inputs
from ptq_cli.errors import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
HIDDEN, INTER, EXPERTS, TOKENS = 16, 24, 4, 12
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": INTER, "moe_intermediate_size": INTER,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
}  # fmt: skip
KINDS = {
    "Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe", "DeepseekV3": "deepseek_v3",
    "GptOss": "gpt_oss", "Qwen3VLMoeText": "qwen3_vl_moe", "NemotronH": "nemotron_h",
    "Llama4Text": "llama4",
}  # fmt: skip


def experts(kind: str) -> Any:
    modeling = getattr(
        __import__(f"transformers.models.{KINDS[kind]}", fromlist=["x"]),
        f"modeling_{KINDS[kind]}",
    )
    config = getattr(modeling, f"{kind}Config", None) or getattr(transformers, f"{kind}Config")
    module = getattr(modeling, f"{kind}Experts")(config(**SIZES, experts_implementation="eager"))
    with torch.no_grad():
        for values in module.parameters():
            values.normal_()
    return module


class Products(torch.overrides.TorchFunctionMode):
    """What is multiplied with a slice of a parameter, by the place of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(call, "__name__", "")
        if name in ("linear", "matmul", "__matmul__"):
            self.seen[args[1].data_ptr()] = args[0].detach()
        if name == "bmm":
            for inputs, weight in zip(args[0], args[1], strict=True):
                self.seen[weight.data_ptr()] = inputs.detach()
        return call(*args, **(kwargs or {}))


def arguments(kind: str, states: Any) -> tuple[Any, ...]:
    scores = torch.randn(TOKENS, EXPERTS)
    scores[:, 2] = -9  # an expert without tokens
    weights, chosen = scores.topk(2 if kind != "Llama4Text" else 1)
    if kind != "Llama4Text":
        return states, chosen, weights.softmax(-1)
    routed = torch.full_like(scores, -torch.inf).scatter(1, chosen, weights).sigmoid()
    return (states.repeat(EXPERTS, 1) * routed.T.reshape(-1, 1),)


def ordered(rows: Any) -> Any:
    """Tokens in an order of their own: theirs in a module depends on how it is run."""
    return rows[rows.sum(1).argsort()].detach()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_those_of_the_forward(kind: str) -> None:
    torch.manual_seed(1)
    module = experts(kind)
    assert is_readable(module)
    given = arguments(kind, torch.randn(TOKENS, HIDDEN))
    with torch.no_grad(), Products() as products:
        module(*given)
    found = {expert: pair for expert, *pair in routed_inputs(module, given)}
    assert sorted(found) == [0, 1, 3]
    first = getattr(module, "gate_up_proj", None)
    first = module.up_proj if first is None else first
    for expert, (before, behind) in found.items():
        for inputs, weights in ((before, first), (behind, module.down_proj)):
            wanted = products.seen[weights[expert].data_ptr()]
            wanted = wanted[(wanted != 0).any(-1)]  # Llama 4's tokens of other experts
            np.testing.assert_allclose(ordered(inputs), ordered(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Mixtral", "Llama4Text"])
def test_padding_is_left_out(kind: str) -> None:
    torch.manual_seed(1)
    module, shown = experts(kind), np.arange(TOKENS) < 7
    given = arguments(kind, torch.randn(TOKENS, HIDDEN))
    asked = []
    found = routed_inputs(module, given, lambda tokens: asked.append(tokens) or shown)
    assert sum(len(before) for _, before, _ in found) == 7 * (2 if kind == "Mixtral" else 1)
    assert asked == [TOKENS]


def test_weights_that_are_not_in_memory() -> None:
    module = experts("Mixtral").to("meta")
    with pytest.raises(InputError, match="the weights of MixtralExperts are not in memory"):
        next(routed_inputs(module, arguments("Mixtral", torch.randn(TOKENS, HIDDEN))))
