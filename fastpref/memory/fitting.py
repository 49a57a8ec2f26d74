"""How many tokens a device holds at once, found out before the first step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastpref.batch import EncodedRow
from fastpref.config import TrainingOptions
from fastpref.distributed import World
from fastpref.errors import MemoryExhaustedError, RankMemoryError, is_out_of_memory
from fastpref.heartbeat import await_device
from fastpref.memory.here import available_bytes, device_here, with_loaded_models
from fastpref.memory.plan import GIB, MemoryPlan
from fastpref.memory.planning import (
    Measured,
    auto_tokens,
    count_training,
    describe_plan,
    most_step_tokens,
    rounded,
)
from fastpref.memory.repetition import release_memory
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.step_loss import StepLoss

logger = logging.getLogger("fastpref")

UNTRIED = 0.9
"""Share of a CPU's memory that a plan may take which nothing confirms: it is within a tenth of what
a step takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """Finds out how many tokens a device holds at once."""

    policy: TokenScorer
    step_loss: StepLoss
    training: TrainingOptions
    measured: Measured
    replicated: bool
    """Every rank has the whole of a frozen model."""
    world: World

    def fit(self, limit: int | None) -> int:
        """Tokens to compute at once; says what was planned and found."""
        world, device = self.world, self.world.device
        plan = world.on_main(self._plan)
        available = -world.agree_max(-available_bytes(device))
        num_tokens = self.measured.rows.layout.max_tokens if limit is None else limit
        on_gpu = device.type == "cuda"
        if limit is None and plan is not None:
            if on_gpu:
                num_tokens = auto_tokens(plan, available)
            else:
                # more than are allowed there anyway would not be faster
                num_tokens = min(num_tokens, auto_tokens(plan, int(UNTRIED * available)))
        if plan is not None:
            self._say(plan, min(num_tokens, self._most_tokens), available)
        if limit is None and on_gpu:
            num_tokens = self._confirm(num_tokens, plan, available)
        if limit is None:
            logger.info("packing.max_tokens=auto: %s", f"{num_tokens:,}")
        return num_tokens

    def _plan(self) -> MemoryPlan | None:
        device = device_here(self.world.device, self.world.size, replicated=self.replicated)
        try:
            counted = count_training(self.training, self.measured, device)
        except ValueError as error:
            logger.info("memory cannot be planned for this model: %s", error)
            return None
        return with_loaded_models(counted.plan(device))

    @property
    def _most_tokens(self) -> int:
        num_ranks, longest = self.world.data_size, self.measured.rows.longest
        return most_step_tokens(self.training, num_ranks, longest=longest)

    def _say(self, plan: MemoryPlan, num_tokens: int, available: int) -> None:
        logger.info(describe_plan(plan, num_tokens, available))
        if plan.peak(num_tokens) > available:
            logger.warning(
                "this is more than there is; activation_checkpointing=true, a smaller "
                "packing.max_tokens or more GPUs need less"
            )

    def _confirm(self, num_tokens: int, plan: MemoryPlan | None, available: int) -> int:
        """Compute the largest micro-batch once, forward and backward, on all ranks.

        Returns:
            Tokens that memory holds at once beside what optimizer and gradients will take.
        """
        world, needs = self.world, self.step_loss.objective.needs
        loaded = torch.cuda.memory_allocated(world.device)
        tried, peak = min(num_tokens, self._most_tokens), None
        while peak is None:
            rows = self.measured.rows.worst(self.policy, tried, weighted=needs.weights)
            peak = self._peak(rows, tried)
            if peak is None:
                num_tokens = tried = tried // 2
        logger.info(
            "memory, measured: %s tokens at once took %.2f GiB before there was an optimizer",
            f"{tried:,}",
            world.agree_max(peak) / GIB,
        )
        later = 0 if plan is None else plan.optimizer + plan.gradients + plan.reserve
        room = available - later
        return agreed_tokens(world, num_tokens, tried, room=room, loaded=loaded, peak=peak)

    def _peak(self, rows: Sequence[EncodedRow], num_tokens: int) -> int | None:
        """Bytes allocated at most while rows are computed at once; None if memory ran out."""
        world, device = self.world, self.world.device
        # filled up as a row of the limit is
        layout = self.measured.rows.layout.limited_to(num_tokens)
        batch = layout.build_rows(rows, pad_token_id=0)
        if self.training.caches_reference:
            batch = replace(batch, reference_logps=torch.zeros(batch.num_scored))
        batch = batch.to(device)
        torch.cuda.reset_peak_memory_stats(device)
        fits = True
        try:
            losses, _ = self.step_loss.compute(batch, 0)
            losses.sum().backward()
            # another rank may have had no memory
            await_device(world)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if world.size > 1:
                raise RankMemoryError(
                    f"out of memory in {num_tokens:,} tokens at once, before the first step; set "
                    f"packing.max_tokens={num_tokens // 2}"
                ) from error
            if len(rows) == 1:
                raise MemoryExhaustedError(
                    "out of memory in a single row, before the first step; a smaller max_length, "
                    "activation_checkpointing=true or more GPUs need less"
                ) from error
            fits = False
        peak = torch.cuda.max_memory_allocated(device)
        self.step_loss.done()
        self.policy.forget_gradients()
        release_memory()
        torch.cuda.reset_peak_memory_stats(device)
        return peak if fits else None


def agreed_tokens(
    world: World, num_tokens: int, tried: int, *, room: int, loaded: int, peak: int
) -> int:
    """Tokens to compute at once on every rank: as many as the memory of each of them holds.

    Args:
        world: Whoever computes; each makes the plan of every step by itself, of the same number.
        num_tokens: To compute at once if what was tried fits.
        tried: Tokens that were computed at once.
        room: Bytes for models and tokens.
        loaded: Bytes of the models, of this rank.
        peak: Bytes while the tokens were computed, of this rank.
    """
    if peak > room:
        num_tokens = int(tried * (room - loaded) / (peak - loaded))
    return rounded(-world.agree_max(-num_tokens))
