"""Schemas of the groups `checkpoint`, `resume` and `parallel`: surviving kills and lost ranks."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from fastpref.checks import check_choice, check_number, expand_home
from fastpref.deadline import seconds_of_job

MODES = ("auto", "async", "sync")
RESUME_WORDS = ("never", "auto")
LONGEST_WAIT = 366 * 24 * 3600


@dataclass(kw_only=True)
class CheckpointConfig:
    """The whole state of the training, in the run folder's checkpoints/, to resume from.

    Master weights, optimizer, schedule, random states and the run's place in its data: about 12
    bytes a trained parameter with AdamW in float32.
    """

    every: int = 200
    """Optimizer steps between two checkpoints, >= 0. One is also written at the end and before a
    signal ends the run; 0: no others."""
    keep: int = 2
    """How many of the newest are kept, >= 1; older ones are there in case the newest is damaged."""
    keep_best: str | None = None
    """A held-out metric as metrics.jsonl names it, such as loss/eval or rewards_eval/accuracies:
    after each evaluation that is the best so far a checkpoint is written too, and the best is kept.
    Lower is better for names that begin with loss or kl."""
    deadline: str | None = "auto"
    """HH:MM:SS since the start of the command, whatever its task. Before then everything computed
    is saved, and the command ends with exit code 75, as if a signal had come. auto: the end of the
    Slurm job, if there is one; null: never."""
    mode: str = "auto"
    """async: copy the state to the host's memory and write while training goes on. sync: write
    while training waits. auto: async if there is memory for the copy."""

    def __post_init__(self) -> None:
        check_number("checkpoint.every", self.every, ge=0)
        check_number("checkpoint.keep", self.keep, ge=1)
        check_choice("checkpoint.mode", self.mode, MODES)
        if self.keep_best is not None and "eval" not in self.keep_best:
            raise ValueError(
                "checkpoint.keep_best must name a held-out metric, such as loss/eval or "
                f"rewards_eval/accuracies, got {self.keep_best!r}"
            )
        self.deadline_seconds()

    def check_best(self, n_eval_examples: int, loss: str, metrics: Collection[str]) -> None:
        """Refuse a `keep_best` that no evaluation of the run computes.

        Args:
            n_eval_examples: Examples of each evaluation.
            loss: Name of the loss.
            metrics: Names of the metrics of its evaluations.
        """
        if self.keep_best is None:
            return
        if not n_eval_examples:
            raise ValueError(
                f"checkpoint.keep_best={self.keep_best} needs evaluations, got n_eval_examples=0"
            )
        check_choice(f"checkpoint.keep_best with loss={loss}", self.keep_best, metrics)

    def deadline_seconds(self) -> int | None:
        """`deadline` in seconds; None: there is none."""
        if self.deadline is None:
            return None
        if self.deadline == "auto":
            return seconds_of_job()
        match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", self.deadline)
        if match is None:
            raise ValueError(
                f"checkpoint.deadline must be HH:MM:SS, got {self.deadline!r}; auto is the end of "
                "a Slurm job"
            )
        hours, minutes, seconds = map(int, match.groups())
        check_number("checkpoint.deadline in hours", hours, le=LONGEST_WAIT // 3600)
        return 3600 * hours + 60 * minutes + seconds


@dataclass(kw_only=True)
class ResumeConfig:
    """Resuming from a checkpoint. `resume=VALUE` is short for `resume.path=VALUE`."""

    path: str = "never"
    """never; auto: from the newest whole checkpoint of run_dir, or without run_dir of the newest
    run folder of this name in output_dir, or a new start if there is none; or the path of a run
    folder or of one checkpoint: with another run_dir that starts a branch, which the same command
    later continues. With the same options, data and model the run gives the bits of one that never
    stopped. task=tisdpo takes no path, and with run_dir it continues there also if this is
    never."""
    allow: list[str] = field(default_factory=list)
    """Options, groups of options, or data, model or tokenizer, that may differ from the
    checkpoint's although the results depend on them; a run without a checkpoint begins anew with
    such options."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("resume.path must be never, auto or a path, got ''")
        expand_home(self, "path")

    def check_task(self, task: str) -> None:
        """Refuse a path for a task that finds its own place."""
        if task != "train" and self.path not in RESUME_WORDS:
            key = "run_dir" if task == "tisdpo" else "weights.output_dir"
            raise ValueError(
                f"resume.path: task={task} goes on by itself with what is in its own folder, "
                f"got {self.path!r}; name that with {key}"
            )


@dataclass(kw_only=True)
class ParallelConfig:
    """Several processes."""

    timeout: int = 1800
    """Seconds that processes wait for one another before the run ends with exit code 7, >= 1. It
    must exceed any time that one of them keeps the others waiting, such as for writing a
    checkpoint."""

    def __post_init__(self) -> None:
        check_number("parallel.timeout", self.timeout, ge=1, le=LONGEST_WAIT)
