"""What a job may take of a machine: no more than its control groups leave it; a machine without."""

import os
import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from fastpref import host
from fastpref.cli.launch import keep_to_cores
from fastpref.deadline import seconds_since_start
from fastpref.host import available_cores, available_memory
from fastpref.train.logs.metrics import peak_memory_gib

MIB = 2**20
LINES = {1: "9:name=systemd:/x\n4:cpu,memory:{0}\n5:cpuset:/y\n", 2: "1:freezer:/x\n0::{0}\n"}


class Machine:
    """Files of control groups, in the version of one or the other."""

    def __init__(self, version: int, folder: Path, member_of: str) -> None:
        self.version, self.folder = version, folder
        (folder / "cgroup").write_text(LINES[version].format(member_of))

    def _folder(self, controller: str, group: str) -> Path:
        folder = self.folder / (controller if self.version == 1 else "") / group
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def limit_memory(self, group: str, most: int | None, used: int = 0, read: int = 0) -> None:
        folder = self._folder("memory", group)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        unlimited = str(2**63 - 4096)
        if self.version == 2:
            names, unlimited = ("memory.max", "memory.current", "inactive_file"), "max"
        (folder / names[0]).write_text(f"{unlimited if most is None else most}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {read}\nactive_file 7\n")

    def limit_cores(self, group: str, most: float | None) -> None:
        folder, quota = self._folder("cpu", group), int(100_000 * (most or 0))
        if self.version == 2:
            (folder / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")


@pytest.fixture(params=LINES)
def machine(request, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: range(64))
    return Machine(request.param, tmp_path, "/slurm/job_7/step_0")


def test_without_limits_all_of_the_machine_can_be_had(machine):
    free = available_memory()
    machine.limit_memory("", None)
    machine.limit_cores("", None)
    assert free > MIB and available_memory() == pytest.approx(free, rel=0.2)
    assert available_cores() == 64


def test_the_tightest_of_all_groups_counts_and_what_was_read_from_files_does_not(machine):
    # Slurm limits the job and leaves its steps alone
    machine.limit_memory("slurm/job_7", 64 * MIB, 48 * MIB, read=8 * MIB)
    machine.limit_memory("slurm/job_7/step_0", None)
    assert available_memory() == 24 * MIB
    machine.limit_memory("slurm/job_7/step_0", 9 * MIB, 2 * MIB)
    assert available_memory() == 7 * MIB
    machine.limit_memory("slurm/job_7", MIB, 2 * MIB)
    assert available_memory() == 0


def test_a_part_of_a_core_is_a_core(machine):
    machine.limit_cores("slurm/job_7", 2.5)
    assert available_cores() == 3
    machine.limit_cores("slurm/job_7/step_0", 0.1)
    assert available_cores() == 1


def test_a_container_that_is_told_a_path_outside_of_it_finds_its_limits_at_the_root(machine):
    machine.limit_memory("", 64 * MIB, 60 * MIB)
    machine.limit_cores("", 2)
    assert (available_memory(), available_cores()) == (4 * MIB, 2)


def test_threads_are_no_more_than_cores_unless_they_were_asked_for(machine, monkeypatch):
    machine.limit_cores("", 2)
    set_to = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    keep_to_cores()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    keep_to_cores()
    assert set_to == [2]
    machine.limit_cores("", None)
    keep_to_cores()
    assert set_to == [2]


def test_what_linux_alone_has_is_not_needed_on_macos(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "none")
    for module, name in ((os, "sched_getaffinity"), (time, "CLOCK_BOOTTIME")):
        monkeypatch.delattr(module, name)
    monkeypatch.setattr(sys, "platform", "darwin")
    # its getrusage counts bytes, that of Linux KiB
    monkeypatch.setattr(resource, "getrusage", lambda _: resource.struct_rusage((3 * 2**30,) * 16))
    assert peak_memory_gib(torch.device("cpu")) == 3
    assert available_cores() == os.cpu_count()
    assert available_memory() > MIB
    assert seconds_since_start() > 0
