"""One model in transformers and in this package's forward, from the same folder on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.errors import InputError
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.forward.stages import embed, finish, forward_block, logits
from ptq_cli.storage.sources import open_float
from tests.interop.forward_models import ROWS

CONTEXT = 128  # of the models with learned positions, which have no more
LEARNED_POSITIONS = ("gpt2", "opt")

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]


def batch(*rows: tuple[int, int], length: int = 64) -> Batch:
    """Tokens and mask; each row has tokens from its first number on, up to its second."""
    mask = np.array([[start <= i < stop for i in range(length)] for start, stop in rows])
    tokens = np.random.default_rng(0).integers(3, 240, mask.shape)
    return np.where(mask, tokens, 0), mask.astype(np.int64)


# In this order: frequencies that depend on the length stay those of the longest yet there.
BATCHES: dict[str, Callable[[str], Batch]] = {
    "one token": lambda name: batch((0, 1), length=1),
    "left padding": lambda name: batch((0, 64), (9, 64), (34, 64), (63, 64)),
    "right padding": lambda name: batch((0, 64), (0, 50), (5, 60), (0, 1)),
    "long": lambda name: batch((0, long(name)), length=long(name)),
}
PADDED = batch((0, 64), (0, 50), (9, 64), (5, 60))


def long(name: str) -> int:
    """More tokens than any window or context of the rows has."""
    return CONTEXT if name.startswith(LEARNED_POSITIONS) else 200


@dataclass(frozen=True)
class Saved:
    """A row's model in transformers, and the folder that it was saved in."""

    model: Any
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text()))

    def beside(self, config: dict[str, Any], folder: Path) -> Path:
        """The same weights beside another config.json."""
        os.link(self.folder / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def read_again(self, config: dict[str, Any], folder: Path) -> Saved:
        """The same weights as transformers reads them beside another config.json."""
        self.beside(config, folder)
        model = type(self.model).from_pretrained(folder, attn_implementation="eager")
        return Saved(model.eval(), folder)


def saved(name: str, folder: Path) -> Saved:
    """The model of a row, saved in `folder`."""
    import torch

    torch.manual_seed(0)
    model = ROWS[name]().eval()
    fill(model)
    model.set_attn_implementation("eager")
    model.save_pretrained(folder)
    return Saved(model, folder)


def fill(model: Any) -> None:
    """Random weights and buffers, none of them as initialised: norms and biases are 1 and 0 then,
    routers choose by little, and a recurrent state forgets at once."""
    import torch

    drawn = torch.Generator().manual_seed(1)
    corrections = [pair for pair in model.named_buffers() if pair[0].endswith("correction_bias")]
    with torch.no_grad():
        for name, values in (*model.named_parameters(), *corrections):
            noise = torch.randn(values.shape, generator=drawn)
            if name.endswith("A_log"):
                values.copy_(noise - 2)
            elif values.ndim == 1:
                values.add_(0.2 * noise)
            elif name.endswith(("gate.weight", "router.weight")):
                values.copy_(noise)
            else:
                values.copy_(1.2 * noise / values.shape[-1] ** 0.5)


def has_forward(saved: Saved) -> bool:
    try:
        read_architecture(saved.config)
    except InputError as error:
        if "no forward for model_type" not in str(error):
            raise
        return False
    return True


def theirs(saved: Saved, tokens: Any, mask: Any) -> Any:
    import torch

    with torch.no_grad():
        output = saved.model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
    return output.logits.numpy()


def ours(folder: Path, tokens: Any, mask: Any) -> Any:
    source = open_float(folder)
    arch, packing = read_architecture(source.config, source.tensors), pack(tokens.shape, mask)
    hidden = embed(arch, source.read, tokens, packing)
    for index in range(len(arch.blocks)):
        hidden = forward_block(arch, index, source.read, hidden, packing)
    scores = logits(arch, source.read, finish(arch, source.read, hidden))
    padded = np.zeros((*packing.mask.shape, scores.shape[1]), scores.dtype)
    padded[packing.mask] = scores
    return padded


def relative_error(saved: Saved, tokens: Any, mask: Any) -> float:
    """The largest difference of logits at real tokens, relative to the largest logit."""
    expected, found = theirs(saved, tokens, mask), ours(saved.folder, tokens, mask)
    real = mask == 1
    return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())
