"""What this process may use of the machine: cores and memory, limits of containers included;
and how fast it is."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ptq_cli.errors import InputError

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
}  # fmt: skip
_CGROUP = Path("/sys/fs/cgroup")


def cores(root: Path = _CGROUP) -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *(ceil(quota) for quota in _cpu_quotas(root))]))


def _cpu_quotas(root: Path) -> list[float]:
    quotas = []
    for folder in _own_groups(root):  # version 2: "max 100000" or "150000 100000"
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
    for folder in (root / "cpu", root / "cpu,cpuacct"):  # version 1
        quota, period = (_number(folder / f"cpu.cfs_{word}_us") for word in ("quota", "period"))
        if quota is not None and period and quota > 0:
            quotas.append(quota / period)
    return quotas


def memory_available(root: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be used without swapping: of the machine, and of the control group."""
    text = _text(meminfo)
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    rooms = [int(found[1]) << 10] if found else []
    pairs = [(folder / "memory.max", folder / "memory.current") for folder in _own_groups(root)]
    old = root / "memory"
    pairs.append((old / "memory.limit_in_bytes", old / "memory.usage_in_bytes"))
    for limit_file, usage_file in pairs:
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and limit < 1 << 60:
            # Half of what is in use is taken to be file pages, which the kernel gives back.
            rooms.append(max(limit - (usage or 0), limit // 2))
    return min(rooms, default=4 << 30)


def memory_to_use() -> int:
    """Bytes that a run takes where nothing was asked for."""
    return memory_available() * 3 // 4


def _own_groups(root: Path) -> list[Path]:
    """The process' own group of version 2 and its parents, up to the root that is mounted."""
    own = re.search(r"^0::(.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    parts = [part for part in own[1].split("/") if part not in ("", "..")] if own else []
    return [root.joinpath(*parts[:n]) for n in range(len(parts) + 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    words = _text(path).split()
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None


def parse_size(text: str) -> int:
    """Bytes from words like `4GB`, `2GiB`, `512MiB`, `1000000`.

    Raises:
        InputError: something else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    size = 0.0 if found is None else float(found[1]) * _UNITS.get(found[2].lower(), 0)
    if not 1 <= size < float("inf"):
        raise InputError(f"{text!r}: not a size", hint="write 4GB, 2GiB, 500MB")
    return int(size)


@cache
def multiply_adds(threads: int) -> float:
    """That each of so many threads does in a second, measured for a fifth of one, once a process:
    products of float32 matrices that fit a core's cache."""
    side = 768
    matrix = np.full((side, side), 0.5, np.float32)

    def measured(_: int) -> float:
        result = matrix @ matrix  # warms the caches
        done, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < 0.2:
            np.matmul(matrix, matrix, out=result)
            done += 1
        return done * side**3 / spent

    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(measured, range(threads))) / threads
