"""Rank variables from srun or MPI: processes of a scheduler form one run without torchrun."""

import logging
import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from fastpref.errors import ConfigError

logger = logging.getLogger("fastpref")


class Starter(NamedTuple):
    """A launcher of parallel processes, and its environment variables for the number of processes
    and this one's rank, over all machines and on this machine (local)."""

    name: str
    size: str
    rank: str
    local_size: str
    local_rank: str
    others: tuple[str, ...] = ()
    """Further required variables."""

    def started(self, environment: Mapping[str, str]) -> bool:
        """Whether it started this process as one of several, without torchrun in between."""
        return environment.get(self.size, "1") not in ("0", "1") and "RANK" not in environment

    def missing(self, environment: Mapping[str, str]) -> list[str]:
        """Its required variables that are unset."""
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
    # last: under Slurm, mpirun starts a daemon per machine through srun, and its ranks inherit the
    # daemon's Slurm variables
    SRUN,
)
FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Range of rendezvous ports for Slurm steps, below the ephemeral ports of outgoing connections."""


def take_ranks(environment: MutableMapping[str, str], port: int | None) -> bool:
    """Translate a scheduler's rank variables into torchrun's.

    Args:
        environment: Of this process. If a scheduler started several processes and torchrun none,
            RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set, and under srun MASTER_ADDR
            and MASTER_PORT too, unless they are set already.
        port: Rendezvous port, replacing MASTER_PORT; None: MASTER_PORT, or under srun one derived
            from the ids of the job and the step.

    Returns:
        Whether the scheduler started one process per machine, which is to use all GPUs there; of
        MPI only the number of processes on this machine is known.

    Raises:
        ConfigError: a required variable is unset.
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
    # a process alone on its machine takes one GPU if another machine has several processes (srun)
    return set(tasks) == {"1"}


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process is rank 0 of torchrun or a scheduler, or the only process."""
    starter = _find(environment)
    return environment.get("RANK" if starter is None else starter.rank, "0") == "0"


def warn_of_others(environment: Mapping[str, str]) -> None:
    """Warn if a scheduler started several processes that each do a run of their own."""
    starter = _find(environment)
    if starter is not None:
        logger.warning(
            "%s started %s of this command, and each runs by itself; trainer=FSDPTrainer makes one "
            "run of them",
            starter.name,
            environment[starter.size],
        )


def first_host(hosts: str) -> str:
    """First host of a Slurm node list: node07 for `node[07-09,12],login1`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert found is not None
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", found.group())


def _find(environment: Mapping[str, str]) -> Starter | None:
    """The launcher that started this process as one of several; None: none did."""
    started = [starter for starter in STARTERS if starter.started(environment)]
    # prefer a complete set of variables: srun sets some of mpiexec's
    complete = [starter for starter in started if not starter.missing(environment)]
    found = next(iter(complete or started), None)
    return None if found is SRUN and _is_typed(environment) else found


def _is_typed(environment: Mapping[str, str]) -> bool:
    """Whether the command was typed at a shell started by `srun --pty`, whose Slurm variables it
    inherits although no other task runs. Such a shell has a terminal, and puts each command into a
    process group of its own."""
    task = environment.get("SLURM_TASK_PID", "")
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return task.isdecimal() and os.getpgid(int(task)) != os.getpgrp()
    except OSError:
        return False


def _tasks_of_nodes(tasks_per_node: str) -> list[str]:
    """Tasks of each node: 2, 2, 2 and 1 for `2(x3),1`."""
    counts: list[str] = []
    for group in tasks_per_node.split(","):
        count, _, nodes = group.rstrip(")").partition("(x")
        counts += [count] * int(nodes or 1)
    return counts


def _port_of_step(environment: Mapping[str, str]) -> int:
    """Rendezvous port: equal for all tasks of a step, different for steps and jobs of a machine."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (10 * job + step) % NUM_PORTS
