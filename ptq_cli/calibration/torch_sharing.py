"""Which linears of a torch model see the same input, by the memory that it is in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from importlib import import_module
from typing import Any


class Sharing:
    """Linears share their input where the same memory, not written to in between, was shown to them
    in every call: the first, the second, and so on."""

    def __init__(self) -> None:
        # A weak reference keeps the place of a storage from being used for another, not its memory.
        self._weak = import_module("torch.multiprocessing.reductions").StorageWeakRef
        self._numbers: dict[tuple[Any, Hashable], int] = {}  # of inputs, by storage and view of it
        self._calls: dict[str, list[int]] = defaultdict(list)
        self._count = 0

    def see(self, linear: str, inputs: Any) -> None:
        """Take in what a call of a linear is shown, a tensor."""
        key = self._weak(inputs.untyped_storage()), _view(inputs)
        if key not in self._numbers:
            self._numbers = {k: n for k, n in self._numbers.items() if not k[0].expired()}
            self._numbers[key] = self._count = self._count + 1
        self._calls[linear].append(self._numbers[key])

    def merged(self, groups: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
        """Groups of linears that share inputs, with those joined that saw the same memory."""
        found: dict[int, tuple[list[str], set[tuple[int, ...]]]] = {}
        holder: dict[tuple[int, ...], int] = {}
        for number, group in enumerate(groups):
            linears = list(group)
            seen = {tuple(self._calls[linear]) for linear in group if linear in self._calls}
            for other in sorted({holder[calls] for calls in seen if calls in holder}):
                before, calls_before = found.pop(other)
                linears, seen = [*before, *linears], seen | calls_before
            found[number] = linears, seen
            holder |= dict.fromkeys(seen, number)
        return [tuple(linears) for linears, _ in found.values()]


def _view(tensor: Any) -> Hashable:
    """What of its storage a tensor shows, and what tells that it was written to."""
    uncounted = tensor.is_inference()  # these do not count how often
    written = tensor.double().sum().item() if uncounted else tensor._version
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, written
