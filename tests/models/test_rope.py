"""Rotations of queries and keys, and their frequencies, against the formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ptq_cli.models.forward import rope


def slow_rotation(head: Any, angles: Any, interleaved: bool) -> Any:
    """One head [head_dim], pair by pair."""
    turned = head.astype(float)
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + len(angles))
        turned[a] = head[a] * math.cos(angle) - head[b] * math.sin(angle)
        turned[b] = head[b] * math.cos(angle) + head[a] * math.sin(angle)
    return turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_pairs_of_channels_turn_by_their_angles(interleaved: bool, partial: float) -> None:
    given = {"rope_theta": 100.0, "partial_rotary_factor": partial}
    own = rope.read_rope(given, 12, 64, None, interleaved=interleaved)
    assert own.interleaved == interleaved
    heads = np.random.default_rng(0).standard_normal((5, 3, 12)).astype(np.float32)
    positions = np.array([0, 1, 2, 0, 7])
    found = heads.copy()
    rope.rotate(found, *rope.rotations(own, positions, 8), own.interleaved)
    dims = int(12 * partial)
    angles = [100.0 ** (-2 * i / dims) for i in range(dims // 2)]
    for token, head in np.ndindex(5, 3):
        wanted = slow_rotation(
            heads[token, head], [positions[token] * a for a in angles], interleaved
        )
        np.testing.assert_allclose(found[token, head], wanted, atol=2e-6)


def test_a_part_of_a_head_turns_in_place() -> None:
    """The last channels of a head alone turn where it is given as a view (DeepSeek)."""
    heads = np.random.default_rng(0).standard_normal((5, 3, 12)).astype(np.float32)
    found, part = heads.copy(), heads[..., 8:].copy()
    own = rope.read_rope({"rope_theta": 100.0}, 4, 64, None)
    cosine, sine = rope.rotations(own, np.arange(5), 5)
    rope.rotate(found[..., 8:], cosine, sine, interleaved=True)
    rope.rotate(part, cosine, sine, interleaved=True)
    np.testing.assert_array_equal(found[..., 8:], part)
    np.testing.assert_array_equal(found[..., :8], heads[..., :8])


def test_mrope_is_plain_for_text() -> None:
    plain = {"rope_theta": 1e6}
    sections = {**plain, "type": "mrope", "mrope_section": [2, 1, 1]}
    found, wanted = (rope.read_rope(given, 8, 64, None) for given in (sections, plain))
    for one, other in zip(
        rope.rotations(found, np.arange(9), 9), rope.rotations(wanted, np.arange(9), 9), strict=True
    ):
        np.testing.assert_array_equal(one, other)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("given", "amplitude", "factor"),
    [
        ({"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.3688879**2),
        ({"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, 1.2608038**2),
        (
            {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            1.3688879 / 1.1844440,
            1.1844440**2,
        ),
        ({"factor": 40.0}, 1.3688879, 1.0),
        ({"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.0),
    ],
)
def test_scales_of_yarn(given: Any, amplitude: float, factor: float) -> None:
    """0.1 · mscale · ln 40 + 1 is 1.3688879 for an mscale of 1."""
    found = rope.read_rope({**YARN, **given}, 64, 2560, None)
    np.testing.assert_allclose(found.amplitude, amplitude, rtol=1e-6)
    np.testing.assert_allclose(found.score_factor, factor, rtol=1e-6)


def test_positions_that_are_not_stretched_leave_scores() -> None:
    given = {"rope_theta": 1e4, "mscale_all_dim": 1.0, "factor": 40.0}
    assert rope.read_rope(given, 64, 2560, None).score_factor == 1


def frequencies(kind: str, length: int = 10, **parameters: Any) -> Any:
    settings = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    return rope.KINDS[kind](rope.read_rope(settings, 64, 128, None), length)


def test_stretched_rotations_meet_the_plain_ones_at_their_ends() -> None:
    plain = frequencies("default")
    np.testing.assert_allclose(frequencies("linear", factor=4.0), plain / 4)
    np.testing.assert_allclose(frequencies("dynamic", length=128, factor=4.0), plain)
    longer = frequencies("dynamic", length=256, factor=4.0)
    np.testing.assert_allclose(longer[-1] / plain[-1], 1 / 5)  # factor · 256/128 − (factor − 1)
    bands = {"factor": 8.0, "original_max_position_embeddings": 64}
    llama3 = frequencies("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **bands)
    yarn = frequencies("yarn", **bands)
    for stretched in (llama3, yarn):
        np.testing.assert_allclose(stretched[[0, -1]], plain[[0, -1]] / [1, 8])
        assert np.all(np.diff(stretched) < 0)
