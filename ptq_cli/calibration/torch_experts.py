"""What each expert sees where a torch module holds all of them as 3-D parameters and calls no
Linear: modules of transformers 5.

    gate_up_proj  [experts, 2 · inter, hidden], or transposed [experts, hidden, 2 · inter];
                  without gates up_proj, of half of that
    down_proj     [experts, hidden, inter], or transposed [experts, inter, hidden]

Biases are `gate_up_proj_bias` and so on, [experts, outputs]. Such a module is called with the
hidden states and the numbers of each token's experts; Llama 4's with all tokens once for each
expert, those that are not its own multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.errors import InputError


def is_fused(module: Any) -> bool:
    """Whether a torch module holds several experts."""
    return any(values.ndim == 3 for values in module.parameters(recurse=False))


def is_readable(module: Any) -> bool:
    """Whether its layout is one of the above."""
    names = {name for name, values in module.named_parameters(recurse=False) if values.ndim == 3}
    activates = hasattr(module, "_apply_gate") or hasattr(module, "act_fn")
    return activates and names == {_first(module), "down_proj"}


def _first(module: Any) -> str:
    """What the parameter before the activation is called."""
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def routed_inputs(
    module: Any,
    arguments: Sequence[Any],
    shown: Callable[[int], NDArray[np.bool_] | None] = lambda tokens: None,
) -> Iterator[tuple[int, Any, Any]]:
    """The inputs of each expert that has tokens in this call: its number, what gate and up see and
    what down sees, tensors [n, hidden] and [n, inter].

    arguments: of the call, in their order
    shown: from the number of tokens to those that are no padding, bool [tokens]; None: all

    Raises:
        InputError: the weights, with which the inputs of down are computed, are not in memory.
    """
    weights = getattr(module, _first(module))
    if weights.is_meta:
        raise InputError(
            f"the weights of {type(module).__name__} are not in memory, and inputs of its down_proj"
            " are computed with them",
            hint="load the model without offloading",
        )
    states = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
    repeated = len(arguments) == 1
    if repeated:
        states = states.reshape(len(weights), -1, states.shape[1])
        routed = (states != 0).any(-1)
    else:
        numbers = [n for n in arguments[1:] if "int" in str(getattr(n, "dtype", ""))]
        if not numbers:  # who calls it hears of experts without tokens
            return
        chosen = numbers[0].reshape(len(states), -1)
    kept = shown(states.shape[-2])
    for expert in range(len(weights)):
        own = routed[expert] if repeated else (chosen == expert).any(-1)
        tokens = own.cpu().numpy() if kept is None else own.cpu().numpy() & kept
        places = np.flatnonzero(tokens).tolist()
        if places:
            inputs = states[expert][places] if repeated else states[places]
            yield expert, inputs, _behind_activation(module, expert, inputs)


def _behind_activation(module: Any, expert: int, inputs: Any) -> Any:
    """What an expert's down sees, computed as in the module's own forward."""
    name = _first(module)
    weight = getattr(module, name)[expert].detach()
    transposed = getattr(module, "is_transposed", len(weight) == inputs.shape[1])
    outputs = inputs @ (weight if transposed else weight.T)
    bias = getattr(module, f"{name}_bias", None)
    if bias is not None:
        outputs = outputs + bias[expert].detach()
    if name == "up_proj":
        return module.act_fn(outputs)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(outputs)
    gate, up = outputs.chunk(2, dim=-1)
    return up * module.act_fn(gate)
