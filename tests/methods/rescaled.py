"""sample_data with a few loud channels: a rescaling that the float model does not feel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ptq_cli.models.detect import find_sites
from ptq_cli.models.sites import Norm
from ptq_cli.storage.checkpoint import open_checkpoint
from tests.builders import copy_sample, write_model

GAIN = 64  # a power of two: exact in BF16


def rescaled_sample(
    target: Path, share: float = 0.01, copy: Callable[[Path], Path] = copy_sample
) -> Path:
    """A copy of sample_data in which `share` of every norm's channels are 64 times as loud, and the
    columns that read them 64 times as small. Its activations follow."""
    folder = copy(target)
    checkpoint = open_checkpoint(folder)
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    rng = np.random.default_rng(64)
    for site in find_sites(specs, checkpoint.config).sites:
        if not isinstance(site.feeder, Norm):
            continue
        count = max(1, round(share * site.in_features))
        loud = rng.choice(site.in_features, count, replace=False)
        dtype = tensors[site.feeder.weight].dtype
        tensors[site.feeder.weight][loud] *= dtype.type(GAIN)
        for linear in site.linears:
            tensors[linear.tensor][:, loud] /= dtype.type(GAIN)
        path = folder / "activations" / f"{site.name}.npy"
        inputs = np.load(path)
        inputs[:, loud] *= inputs.dtype.type(GAIN)
        np.save(path, inputs)
    write_model(folder / "model.safetensors", tensors)
    return folder
