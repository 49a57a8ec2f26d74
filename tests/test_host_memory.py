"""What a job may take of a machine's memory: no more than its control groups leave it."""

from pathlib import Path

import pytest

from fastpref.host_memory import available_memory

MIB = 2**20
FREE = available_memory(Path("/nowhere"))
FILES = {
    "1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "2": ("memory.max", "memory.current", "inactive_file"),
}
LINES = {"1": "9:name=systemd:/job\n4:cpu,memory:{}\n", "2": "1:freezer:/other\n0::{}\n"}


def limit(group: Path, version: str, most: str, used: int = 0, read: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES[version], (most, str(used)), strict=False):
        (group / name).write_text(f"{text}\n")
    stat = f"anon 5\n{FILES[version][2]} {read}\nactive_file 7\n"
    (group / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", FILES)
def test_the_tightest_of_all_groups_counts_and_what_files_left_does_not(tmp_path, version):
    member, hierarchy = tmp_path / "cgroup", tmp_path / "memory" if version == "1" else tmp_path
    member.write_text(LINES[version].format("/slurm/job_7/step_0"))
    assert available_memory(member, tmp_path) == pytest.approx(FREE, rel=0.2)
    limit(hierarchy, version, "max" if version == "2" else str(2**63 - 4096))
    limit(hierarchy / "slurm" / "job_7", version, str(64 * MIB), 48 * MIB, read=8 * MIB)
    # Slurm limits the job and leaves the step alone
    limit(hierarchy / "slurm" / "job_7" / "step_0", version, "max")
    assert available_memory(member, tmp_path) == 24 * MIB
    limit(hierarchy / "slurm" / "job_7" / "step_0", version, str(9 * MIB), 2 * MIB)
    assert available_memory(member, tmp_path) == 7 * MIB
    # what is over its limit has nothing left
    limit(hierarchy / "slurm" / "job_7", version, str(MIB), 2 * MIB)
    assert available_memory(member, tmp_path) == 0


@pytest.mark.parametrize("version", FILES)
def test_a_container_whose_group_is_the_root_finds_its_limit_there(tmp_path, version):
    member, hierarchy = tmp_path / "cgroup", tmp_path / "memory" if version == "1" else tmp_path
    member.write_text(LINES[version].format("/docker/0123"))
    limit(hierarchy, version, str(64 * MIB), 60 * MIB)
    assert available_memory(member, tmp_path) == 4 * MIB
