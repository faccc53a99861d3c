"""Folding changes no mixture's function: the forward, before and after every site is folded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.models.detect import find_sites
from ptq_cli.models.forward import stages
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.numerics.smoothquant import tied
from tests.folds import fold_site
from tests.models.test_forward import LLAMA, QWEN3_MOE, random_weights

CONFIGS = {
    "mixtral": {
        **LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {**QWEN3_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]},
}  # fmt: skip
# The sites of all blocks: four of an attention and MLP, one more for each expert after the first.
COUNTS = {"mixtral": 2 * 7, "qwen3_moe": 8 + 4 + 8}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_computes_what_it_did(kind: str) -> None:
    config: dict[str, Any] = CONFIGS[kind]
    arch = read_architecture(config)
    before = random_weights(arch)
    specs = {name: TensorSpec(name, "F32", array.shape) for name, array in before.items()}
    sites = find_sites(specs, config).sites
    assert len(sites) == COUNTS[kind]
    rng = np.random.default_rng(3)
    after = dict(before)
    for site in sites:
        assert site.feeder is not None
        factors = np.exp2(rng.integers(-3, 4, site.in_features)).astype(np.float32)
        after |= fold_site(site, after, tied(factors, site.ties))[0]
    routers = [f"{block.experts.router.name}.weight" for block in arch.blocks if block.experts]
    assert not any(np.array_equal(before[name], after[name]) for name in routers)
    packing = pack((2, 9))
    hidden = rng.standard_normal((packing.n_tokens, arch.hidden_size)).astype(np.float32)
    found = [hidden, hidden]
    for index in range(len(arch.blocks)):
        found = [
            stages.forward_block(arch, index, weights, states, packing)
            for weights, states in zip((before, after), found, strict=True)
        ]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
