"""What the forward needs in memory, so that a caller can choose how many sequences go together."""

from __future__ import annotations

from ptq_cli.models.forward.architecture import Architecture

WORKSPACE = 16 << 20  # scores, chunks of activation functions, rotations of short batches


def block_memory(arch: Architecture, n_tokens: int) -> int:
    """Bytes, at most, that `forward_block` needs for `n_tokens` packed tokens: its input, its
    output and what lies between, in float32, without the block's weights."""
    query, shared = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    attention = 4 * query + 5 * shared
    experts = [block.experts for block in arch.blocks if block.experts]
    routed = max((e.top_k * (e.width + arch.hidden_size) for e in experts), default=0)
    mlp = max(4 * arch.intermediate_size, 3 * routed)
    return 4 * n_tokens * (4 * arch.hidden_size + max(attention, mlp)) + WORKSPACE


def state_memory(arch: Architecture, n_tokens: int) -> int:
    """Bytes of a `State` between two stages, at most: the residual and the next inputs."""
    experts = [block.experts for block in arch.blocks if block.experts]
    routed = max((e.top_k * max(e.width, arch.hidden_size) for e in experts), default=0)
    inputs = max(arch.hidden_size, arch.n_heads * arch.head_dim, arch.intermediate_size, routed)
    return 4 * n_tokens * (arch.hidden_size + inputs)
