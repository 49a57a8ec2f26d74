"""Ranks of processes that a scheduler started: one run on all of them, without torchrun."""

import logging
import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from fastpref.errors import ConfigError

logger = logging.getLogger("fastpref")


class Starter(NamedTuple):
    """What starts several processes of a command, and the variables in which it tells each of them
    how many there are and which it is, over all machines and on its own."""

    name: str
    size: str
    rank: str
    local_size: str
    local_rank: str
    others: tuple[str, ...] = ()
    """Further variables that are needed."""

    def started(self, environment: Mapping[str, str]) -> bool:
        """Whether it started this process and others, and torchrun none of them since."""
        return environment.get(self.size, "1") not in ("0", "1") and "RANK" not in environment

    def missing(self, environment: Mapping[str, str]) -> list[str]:
        """Those of its variables that are not there."""
        needed = (self.local_rank, self.rank, self.size, self.local_size, *self.others)
        return [name for name in needed if name not in environment]


SRUN = Starter(
    name="srun",
    size="SLURM_STEP_NUM_TASKS",
    rank="SLURM_PROCID",
    local_size="SLURM_STEP_TASKS_PER_NODE",
    local_rank="SLURM_LOCALID",
    others=("SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"),
)
STARTERS = (
    Starter(
        name="mpirun",
        size="OMPI_COMM_WORLD_SIZE",
        rank="OMPI_COMM_WORLD_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    # MPICH and Intel MPI
    Starter(
        name="mpiexec",
        size="PMI_SIZE",
        rank="PMI_RANK",
        local_size="MPI_LOCALNRANKS",
        local_rank="MPI_LOCALRANKID",
    ),
    # last: under Slurm mpirun has srun start a daemon on each machine, and what these start has the
    # daemon's variables too
    SRUN,
)
FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Of those that ranks of Slurm meet at: below the ones that systems give to connections."""


def take_ranks(environment: MutableMapping[str, str], port: int | None) -> bool:
    """Tell a process that a scheduler started its rank, in torchrun's variables.

    Args:
        environment: Of the process. Where a scheduler started several and torchrun none, RANK,
            WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; the last
            two stay if they are there already.
        port: Where the ranks meet; None: MASTER_PORT, or one that the Slurm job's number gives.

    Returns:
        Whether the scheduler started one process on each of several machines: all GPUs there are
        for it.

    Raises:
        ConfigError: the scheduler does not say what is needed.
    """
    starter = _find(environment)
    if starter is None:
        return False
    if missing := starter.missing(environment):
        raise ConfigError(
            f"{starter.name} started this process without setting {', '.join(missing)}"
        )
    environment["LOCAL_RANK"] = environment[starter.local_rank]
    environment["RANK"] = environment[starter.rank]
    environment["WORLD_SIZE"] = environment[starter.size]
    tasks = [environment[starter.local_size]]
    node = 0
    if starter is SRUN:
        tasks = _tasks_of_nodes(environment[SRUN.local_size])
        node = int(environment["SLURM_NODEID"])
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        environment.setdefault("MASTER_PORT", str(_port_of_step(environment)))
    environment["LOCAL_WORLD_SIZE"] = tasks[node]
    if port is not None:
        environment["MASTER_PORT"] = str(port)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be set for the ranks that {starter.name} started to "
            "meet, the same on all machines: the first one's name, and a port that is free there"
        )
    # one that is alone on its machine and has company on another takes one GPU, as they do
    return set(tasks) == {"1"}


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of those that torchrun or a scheduler started, or alone."""
    starter = _find(environment)
    return environment.get("RANK" if starter is None else starter.rank, "0") == "0"


def warn_of_others(environment: Mapping[str, str]) -> None:
    """Say that each of several processes runs by itself."""
    starter = _find(environment)
    if starter is not None:
        logger.warning(
            "%s started %s of this command, and each runs by itself; trainer=FSDPTrainer makes one "
            "run of them",
            starter.name,
            environment[starter.size],
        )


def first_host(hosts: str) -> str:
    """Of a list as Slurm writes it: node07 of `node[07-09,12],login1`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert found is not None
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", found.group())


def _find(environment: Mapping[str, str]) -> Starter | None:
    """What started this process among others, by the variables of each; None: nothing did."""
    started = [starter for starter in STARTERS if starter.started(environment)]
    # srun sets some of mpiexec's
    complete = [starter for starter in started if not starter.missing(environment)]
    found = next(iter(complete or started), None)
    return None if found is SRUN and _is_typed(environment) else found


def _is_typed(environment: Mapping[str, str]) -> bool:
    """Whether the command was typed at a shell that `srun --pty` started: the variables are those
    of the shell, and the tasks beside it have ended. Such a shell has a terminal, and gives each
    command a process group of its own."""
    task = environment.get("SLURM_TASK_PID", "")
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return task.isdecimal() and os.getpgid(int(task)) != os.getpgrp()
    except OSError:
        return False


def _tasks_of_nodes(tasks_per_node: str) -> list[str]:
    """Of `2(x3),1`: two tasks on each of three nodes, and one on a fourth."""
    counts: list[str] = []
    for group in tasks_per_node.split(","):
        count, _, nodes = group.rstrip(")").partition("(x")
        counts += [count] * int(nodes or 1)
    return counts


def _port_of_step(environment: Mapping[str, str]) -> int:
    """The same for all tasks of a step; steps and jobs that share a machine have others."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (10 * job + step) % NUM_PORTS
