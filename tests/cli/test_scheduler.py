"""One run of the processes that srun or mpirun started."""

import datetime
import os
import subprocess
import sys

import pytest
from ranks import free_port

from fastpref.cli.launch import launch_on_every_gpu
from fastpref.cli.scheduler import first_host, is_first, take_ranks, warn_of_others
from fastpref.errors import ConfigError, RankError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
}


def test_a_task_of_srun_is_a_rank_that_meets_the_others_on_the_first_machine():
    environment = dict(SRUN)
    take_ranks(environment, None)
    taken = {name: environment[name] for name in environment.keys() - SRUN.keys()}
    assert taken == {
        "RANK": "6",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(10_000 + 47_112 % 20_000),
    }
    # it is one of two there
    environment = SRUN | {"SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    take_ranks(environment, None)
    assert environment["LOCAL_WORLD_SIZE"] == "2"


def test_one_task_a_machine_is_so_only_where_it_is_on_all_of_them():
    # alone on the fourth machine, and one of seven ranks
    assert not take_ranks(dict(SRUN), None)
    one_each = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
    assert take_ranks(SRUN | one_each | {"SLURM_PROCID": "3"}, None)


def test_steps_meet_at_ports_of_their_own_and_where_they_are_told():
    other = SRUN | {"SLURM_STEP_ID": "3"}
    take_ranks(other, None)
    here = SRUN | {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    take_ranks(here, None)
    assert other["MASTER_PORT"] == "17113"
    assert (here["MASTER_ADDR"], here["MASTER_PORT"]) == ("elsewhere", "1")
    take_ranks(told := SRUN | {"MASTER_PORT": "1"}, 29_000)
    assert told["MASTER_PORT"] == "29000"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3,5-9],m", "n3"),
        ("r[01-02]n[10-19]-ib,x", "r01n10-ib"),
        ("login-a.site.org,n[1-2]", "login-a.site.org"),
    ],
)
def test_the_first_machine_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_ranks_that_torchrun_or_nobody_started_stay_as_they_are():
    for given in (SRUN | {"RANK": "1"}, {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, {}):
        environment = dict(given)
        assert not take_ranks(environment, None)
        assert environment == given


def test_a_size_that_a_job_script_exports_is_not_that_of_torchrun():
    environment = SRUN | {"WORLD_SIZE": "8"}
    take_ranks(environment, None)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("6", "7")


def test_what_mpirun_starts_by_daemons_of_srun_has_the_ranks_of_mpirun():
    of_mpirun = {
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    environment = SRUN | of_mpirun
    take_ranks(environment, None)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("5", "8")
    # srun with PMI-2 tells its tasks their ranks in these two as well
    environment = SRUN | {"PMI_SIZE": "7", "PMI_RANK": "6"}
    take_ranks(environment, None)
    assert environment["RANK"] == "6"


@pytest.mark.parametrize(("is_task", "taken"), [(True, "6"), (False, None)])
def test_a_command_typed_at_a_shell_of_srun_is_none_of_its_tasks(is_task, taken):
    typed = (
        "import os\n"
        "from fastpref.cli.scheduler import take_ranks\n"
        f"task = os.getpid() if {is_task} else os.getppid()\n"
        f"environment = {SRUN} | {{'SLURM_TASK_PID': str(task)}}\n"
        "take_ranks(environment, None)\n"
        "print(environment.get('RANK'))\n"
    )
    # at a terminal of its own, in a group of its own
    at_terminal = f"import pty, sys; pty.spawn([sys.executable, '-c', {typed!r}])"
    result = subprocess.run([sys.executable, "-c", at_terminal], capture_output=True, text=True)
    assert result.stdout.strip() == str(taken)


def test_mpirun_does_not_say_where_ranks_meet():
    of_mpirun = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR and MASTER_PORT must be set .* mpirun"):
        take_ranks(dict(of_mpirun), None)
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR must be set"):
        take_ranks(dict(of_mpirun), 29_000)
    environment = of_mpirun | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert not take_ranks(environment, None)
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("1", "1")
    with pytest.raises(ConfigError, match=r"mpiexec started .* without setting PMI_RANK, MPI_L"):
        take_ranks({"PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, None)


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        (SRUN, False),
        (SRUN | {"SLURM_PROCID": "0"}, True),
        # no place to meet is needed
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
    ],
)
def test_of_several_processes_one_is_the_first(environment, first):
    assert is_first(environment) == first


def test_runs_that_stay_apart_are_told_so(caplog):
    warn_of_others({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"})
    assert not caplog.messages
    warn_of_others({"SLURM_STEP_NUM_TASKS": "4"})
    [message] = caplog.messages
    assert message.startswith("srun started 4 of this command, and each runs by itself")


def test_launchers_on_two_machines_start_the_ranks_of_one_run(tmp_path, monkeypatch):
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, pathlib, sys\n"
        f"place = pathlib.Path({str(tmp_path)!r}, os.environ['RANK'])\n"
        "place.write_text(os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'])\n"
        "sys.exit(75)\n"
    )
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import sys\n"
        "from fastpref.cli.launch import launch_on_every_gpu\n"
        "sys.argv[:] = sys.argv[1:]\n"
        "sys.exit(launch_on_every_gpu(1, None))\n"
    )
    with subprocess.Popen(
        [sys.executable, launcher, rank], env=os.environ | meeting | {"RANK": "1"}
    ) as other:
        for name, value in (meeting | {"RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [str(rank)])
        assert launch_on_every_gpu(1, None) == 75
        assert other.wait(60) == 75
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["20", "20"]


def test_a_machine_that_does_not_come_is_waited_for_as_long_as_ranks_are(monkeypatch):
    monkeypatch.setattr("fastpref.cli.launch.SHORTEST_MEETING", datetime.timedelta(seconds=1))
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for name, value in (meeting | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="rank 1 did not come in 1 s"):
        launch_on_every_gpu(1, None, timeout=datetime.timedelta(seconds=0.5))
