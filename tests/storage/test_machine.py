"""What the machine gives: cores, memory, sizes in words."""

from __future__ import annotations

import os

import pytest

from ptq_cli.errors import InputError
from ptq_cli.storage import machine

ALL = len(os.sched_getaffinity(0))


def test_cores_are_those_of_the_affinity(tmp_path):
    assert machine.cores(tmp_path) == ALL


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", ALL), ("100000 100000", 1)])
def test_a_quota_of_version_2(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert machine.cores(tmp_path) == cores


def test_half_a_core_is_one(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000")
    assert machine.cores(tmp_path) == 1


@pytest.mark.parametrize(("quota", "cores"), [("-1", ALL), ("100000", 1)])
def test_a_quota_of_version_1(tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert machine.cores(tmp_path) == cores


def test_memory_is_the_least_of_machine_and_group(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    assert machine.memory_available(tmp_path, meminfo) == 8 << 30
    (tmp_path / "memory.max").write_text("max")
    assert machine.memory_available(tmp_path, meminfo) == 8 << 30
    (tmp_path / "memory.max").write_text(str(4 << 30))
    (tmp_path / "memory.current").write_text(str(1 << 30))
    assert machine.memory_available(tmp_path, meminfo) == 3 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("1000", 1000), ("5k", 5000)],
)
def test_sizes(text, size):
    assert machine.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4XB", "1e9", "nan"])
def test_no_sizes(text):
    with pytest.raises(InputError, match="not a size"):
        machine.parse_size(text)
