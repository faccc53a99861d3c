"""Slow twins of the engine, each written from its formula.

They share no code with `ptq_cli.numerics` and make no attempt at speed: float64 throughout, nothing
kept up to date that can be computed anew. Matrices are [out_features, in_features] as in the
papers; scales and zeros of a twin in progress are spread over columns, [out_features, in_features].
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ptq_cli.core.grid import Grid

# Binary digits of a stored scale, exponent of its finest step, smallest value it may take.
STORED = {
    "float16": (11, -24, 2.0**-24),
    "bfloat16": (8, -133, 2.0**-126),
    "float32": (24, -149, 2.0**-126),
    "e8m0": (1, -126, 2.0**-126),
    "e4m3": (4, -9, 2.0**-9),
}

# The levels of small floats that are not negative, in the order of their codes.
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
E4M3 = tuple(
    (mantissa + 8 * (exponent > 0)) * 2.0 ** (max(exponent, 1) - 10)
    for exponent in range(16)
    for mantissa in range(8)
)[:-1]  # the last one is NaN
LEVELS = {"e2m1": E2M1, "e4m3": E4M3}


class Rounded(NamedTuple):
    """codes [out_features, in_features]; scales, zeros [out_features, n_groups] or [1, 1].

    Of small floats codes are the levels themselves, and zeros 0.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray  # of each column, [in_features]

    @property
    def weight(self) -> np.ndarray:
        """`scales · (codes − zeros)`."""
        return self.scales[:, self.groups] * (self.codes - self.zeros[:, self.groups])


def loss(weight, dequantized, hessian):
    """`tr(E H Eᵀ)`."""
    error = np.asarray(weight, np.float64) - dequantized
    return float(np.trace(error @ hessian @ error.T))


def stored(scales, grid: Grid):
    """The nearest value that `grid.scale_dtype` holds; zero becomes 1. E4M3 hold the scale times
    the global scale, 448 at most; and they lift zeros too."""
    digits, finest, smallest = STORED[grid.scale_dtype]
    if grid.scale_dtype == "e4m3":
        local = np.clip(scales * grid.global_scale, smallest, 448)
        step = np.ldexp(1.0, np.maximum(np.frexp(local)[1] - digits, finest))
        return np.float32(np.rint(local / step) * step) / np.float32(grid.global_scale)
    exponent = np.frexp(scales)[1]
    step = np.ldexp(1.0, np.maximum(exponent - digits, finest))
    return np.where(scales == 0, 1.0, np.maximum(np.rint(scales / step) * step, smallest))


def range_grid(group, grid: Grid, ratio=1.0):
    """Scale and zero of each row of `group`, for `ratio` times its range."""
    low, high = ratio * group.min(axis=1), ratio * group.max(axis=1)
    if grid.levels != "integer":
        absmax, largest = np.maximum(abs(low), abs(high)), max(LEVELS[grid.levels])
        if grid.scale_dtype == "e8m0":
            whole = 2.0 ** (np.floor(np.log2(absmax / ratio)) - np.floor(np.log2(largest)))
            return stored(ratio * whole, grid), np.zeros(len(low))
        return stored(absmax / largest, grid), np.zeros(len(low))
    levels = 2**grid.bits
    if grid.mirrored:
        absmax = np.maximum(abs(low), abs(high))
        return stored(absmax / (levels / 2), grid), levels // 2 - np.where(high == absmax, 1, 0)
    if grid.sym:
        half = levels / 2 - 1 if grid.narrow_range else (levels - 1) / 2
        return stored(np.maximum(abs(low), abs(high)) / half, grid), np.full(len(low), levels // 2)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = stored((high - low) / (levels - 1), grid)
    return scale, np.clip(np.rint(-low / scale), 0, levels - 1)


def nearest(column, scale, zero, grid: Grid):
    """The code of the grid point nearest to each value; ties as IST-DASLab/gptq breaks them
    (`round(x / scale) + zero`: half to even before the zero is added). The nearest small float; of
    two that are as near, the one whose code is even."""
    if grid.levels != "integer":
        return nearest_level(column / scale, grid.levels)
    return np.clip(np.rint(column / scale) + zero, int(grid.narrow_range), 2**grid.bits - 1)


def nearest_level(steps, name):
    """The nearest of all levels, ties to the even code."""
    positive = np.array(LEVELS[name])
    distance = abs(abs(np.asarray(steps))[..., None] - positive)
    order = np.argsort(np.arange(len(positive)) % 2, kind="stable")  # even codes are met first
    return np.sign(steps) * positive[order][distance[..., order].argmin(axis=-1)]


def search_grid(group, importance, grid: Grid, ratios):
    """Scale and zero of the candidate with the least `Σ importance · (weight − dequantized)²`."""
    scale, zero = range_grid(group, grid)
    least = np.full(len(group), np.inf)
    for s, z in candidates(group, grid, ratios):
        codes = nearest(group, s[:, None], z[:, None], grid)
        cost = (importance * (group - s[:, None] * (codes - z[:, None])) ** 2).sum(axis=1)
        scale, zero = np.where(cost < least, s, scale), np.where(cost < least, z, zero)
        least = np.minimum(cost, least)
    return scale, zero


def candidates(group, grid: Grid, ratios):
    """The scales and zeros that a search tries. One ratio is no search: the range as it is."""
    if len(ratios) == 1:
        return [range_grid(group, grid, ratios[0])]
    found = []
    if grid.levels != "integer":
        return [range_grid(group, grid, ratio) for ratio in ratios]
    middle = np.full(len(group), 2 ** (grid.bits - 1))
    if grid.mirrored:
        scale, _ = range_grid(group, grid)
        found += [(scale, middle), (scale, middle - 1)]
    for ratio in ratios:
        scale, zero = range_grid(group, replace(grid, mirrored=False), ratio)
        if grid.mirrored:
            found += [(scale, middle), (scale, middle - 1)]
        elif grid.sym:
            found += [(scale, zero)]
        else:
            found += [(scale, np.clip(zero + d, 0, 2**grid.bits - 1)) for d in (0, -1, 1)]
    return found


def round_to_nearest(weight, grid: Grid, importance=None, ratios=(1.0,)) -> Rounded:
    """Every group on its own grid (searched over `ratios`), every weight on the nearest point."""
    weight = np.asarray(weight, np.float64)
    importance = np.ones(weight.shape[1]) if importance is None else importance
    if grid.group_size == 0:
        scale, zero = whole_tensor_grid(weight, importance, grid, ratios)
        groups = np.zeros(weight.shape[1], int)
        return Rounded(nearest(weight, scale, zero, grid), scale[None], zero[None], groups)
    codes, scales, zeros = np.zeros(weight.shape), [], []
    for columns in consecutive_groups(weight.shape[1], grid):
        scale, zero = search_grid(weight[:, columns], importance[columns], grid, ratios)
        codes[:, columns] = nearest(weight[:, columns], scale[:, None], zero[:, None], grid)
        scales.append(scale)
        zeros.append(zero)
    return Rounded(codes, np.stack(scales, 1), np.stack(zeros, 1), group_numbers(weight, grid))


def whole_tensor_grid(weight, importance, grid: Grid, ratios):
    """One scale and one zero, shape [1] each, for the weight read as a single row."""
    return search_grid(weight.reshape(1, -1), np.tile(importance, len(weight)), grid, ratios)


def group_numbers(weight, grid: Grid):
    """Group of each column, columns as they stand."""
    numbers = np.empty(weight.shape[1], int)
    for number, columns in enumerate(consecutive_groups(weight.shape[1], grid)):
        numbers[columns] = number
    return numbers


def consecutive_groups(n, grid: Grid):
    """Columns of each group, as they stand; the last group may be short."""
    size = grid.group_size if grid.group_size > 0 else n
    return [np.arange(start, min(n, start + size)) for start in range(0, n, size)]


def visited_groups(hessian, act_order, grid: Grid):
    """(number, columns) of each group in the order of the visit, columns in theirs."""
    importance = hessian.diagonal()
    groups = consecutive_groups(len(importance), grid)
    if act_order == "desc":
        falling = np.argsort(-importance, kind="stable")
        groups = [falling[columns] for columns in groups]
    visits = list(enumerate(groups))
    if act_order == "static":
        visits.sort(key=lambda visit: -importance[visit[1]].sum())
        visits = [(g, c[np.argsort(-importance[c], kind="stable")]) for g, c in visits]
    return visits


def gptq(
    weight, hessian, grid: Grid, *, damp, act_order="none", ratios=(1.0,), refine=0, sweeps=0
) -> Rounded:
    """The loop of Frantar et al. as IST-DASLab/gptq writes it, with `refine` passes of coordinate
    descent after each group and `sweeps` of it over all groups at the end; from the second on, one
    that lowers the loss by less than 0.2 % is the last.

    Columns with no inputs are not zeroed: nothing pulls them, so they round to nearest.
    """
    visits = visited_groups(hessian, act_order, grid)
    order = np.concatenate([columns for _, columns in visits])
    target = np.array(weight, np.float64)[:, order]
    H = np.asarray(hessian, np.float64)[np.ix_(order, order)]
    H = H + damp * H.diagonal().mean() * np.eye(len(H))
    Hinv = np.linalg.cholesky(np.linalg.inv(H)).T
    W = target.copy()
    codes, scale, zero = np.zeros(W.shape), np.zeros(W.shape), np.zeros(W.shape)
    if grid.group_size == 0:
        fixed = whole_tensor_grid(target, np.ones(len(H)), grid, ratios)
    start, runs = 0, []
    for number, columns in visits:
        stop = start + len(columns)
        g = slice(start, stop)
        pivots = 1 / Hinv.diagonal()[g] ** 2
        s, z = search_grid(W[:, g], pivots, grid, ratios) if grid.group_size else fixed
        scale[:, g], zero[:, g] = s[:, None], z[:, None]
        for j in range(start, stop):
            codes[:, j] = nearest(W[:, j], s, z, grid)
            err = (W[:, j] - s * (codes[:, j] - z)) / Hinv[j, j]
            W[:, j:] -= np.outer(err, Hinv[j, j:])
        seen, free = slice(0, stop), slice(stop, None)
        answer = H[seen, free] @ np.linalg.inv(H[free, free])  # later columns follow the errors
        parts = target[:, seen], codes[:, seen], scale[:, seen], zero[:, seen]
        for _ in range(refine):
            descend(*parts, H[seen, seen] - answer @ H[free, seen], g, grid)
        if refine:
            error = target[:, seen] - scale[:, seen] * (codes[:, seen] - zero[:, seen])
            W[:, free] = target[:, free] + error @ answer
        runs.append((number, g))
        start = stop
    for sweep in range(sweeps):
        before = loss(target, scale * (codes - zero), H)
        for _, g in runs:
            descend(target, codes, scale, zero, H, g, grid)
        gain = before - loss(target, scale * (codes - zero), H)
        if sweep > 0 and gain < 0.002 * before:
            break
    return _in_place(codes, scale, zero, order, runs, grid, act_order)


def descend(target, codes, scale, zero, quadratic, group, grid: Grid):
    """One pass over the columns of `group`, lowering `tr(E Q Eᵀ)`: the scale that is best for the
    codes, then for each column the code that is best for the others. Changes codes and scale."""

    def error():
        return target - scale * (codes - zero)

    def cost():
        return ((error() @ quadratic) * error()).sum(axis=1)

    before = cost()
    if grid.group_size != 0:
        refit(error, cost, codes, scale, zero, quadratic, group, grid)
    for k in range(group.start, group.stop):
        pull = error() @ quadratic[:, k] / quadratic[k, k]
        value = scale[:, k] * (codes[:, k] - zero[:, k]) + pull
        codes[:, k] = nearest(value, scale[:, k], zero[:, k], grid)
    assert np.all(cost() <= before * (1 + 1e-9) + 1e-30), "coordinate descent raised the cost"


def refit(error, cost, codes, scale, zero, quadratic, group, grid: Grid):
    """`Δs = Σ_k c_k (E Q)_k / (c Q cᵀ)`, stored as scales are, kept in rows whose cost it lowers.

    Of two scales with the same cost the old one stays.
    """
    c = codes[:, group] - zero[:, group]
    curvature = ((c @ quadratic[group, group]) * c).sum(axis=1)
    slope = (c * (error() @ quadratic[:, group])).sum(axis=1)
    old, before = scale[:, group].copy(), cost()
    best = old[:, 0] + slope / np.where(curvature > 0, curvature, np.inf)
    scale[:, group] = np.where(best > 0, stored(abs(best), grid), old[:, 0])[:, None]
    worse = cost() >= before
    scale[:, group] = np.where(worse[:, None], old, scale[:, group])


def _in_place(codes, scale, zero, order, runs, grid: Grid, act_order) -> Rounded:
    """Columns back where they stand, one scale and zero per group."""
    back = np.argsort(order)
    groups = np.empty(len(order), int)
    scales, zeros = np.empty((2, len(codes), len(runs)))
    for number, g in runs:
        groups[order[g]] = number
        scales[:, number], zeros[:, number] = scale[:, g.start], zero[:, g.start]
    if grid.group_size == 0:
        scales, zeros = scales[:1], zeros[:1]
    return Rounded(codes[:, back], scales, zeros, groups)


def packed_row(codes, bits) -> bytes:
    """Code i in bits [i·b, i·b + b) of one long integer, written little-endian."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


def packed_groups(codes, bits, width) -> bytes:
    """Each group of `width` codes from a byte of its own; a short last group filled with zeros."""
    row = list(codes) + [0] * (-len(codes) % width)
    return b"".join(
        packed_row(row[start : start + width], bits) for start in range(0, len(row), width)
    )
