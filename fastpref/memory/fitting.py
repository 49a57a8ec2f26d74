"""Chooses the number of tokens per micro-batch that fits on a device, before the first step."""

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
"""Share of a CPU's memory that a plan may use, as it is not confirmed by a measurement: plans are
within a tenth of a step's actual memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """Finds the number of tokens per micro-batch that fits on a device."""

    policy: TokenScorer
    step_loss: StepLoss
    training: TrainingOptions
    measured: Measured
    replicated: bool
    """Whether every rank holds the whole frozen model, unsharded."""
    world: World

    def fit(self, limit: int | None) -> int:
        """Tokens per micro-batch; logs the plan and the measurement.

        Args:
            limit: Limit set by the user; None to choose one.
        """
        world, device = self.world, self.world.device
        plan = world.on_main(self._plan)
        available = -world.agree_max(-available_bytes(device))
        num_tokens = self.measured.rows.layout.max_tokens if limit is None else limit
        on_gpu = device.type == "cuda"
        if limit is None and plan is not None:
            if on_gpu:
                num_tokens = auto_tokens(plan, available)
            else:
                # more than the layout's default limit would not be faster on a CPU
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
        """Run the largest micro-batch once, forward and backward; a single rank halves it on OOM.

        Returns:
            Tokens per micro-batch that fit beside the optimizer state and the gradients to come.
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
        """Peak bytes allocated while the rows run as one micro-batch; None if memory ran out."""
        world, device = self.world, self.world.device
        # padded as with this token limit
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
            # raises, instead of waiting forever, if another rank has run out of memory and ended
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
    """Tokens per micro-batch that fit on every rank; the same number on all ranks.

    Args:
        world: The ranks; each plans every step by itself, from this number.
        num_tokens: Result if the measured peak fits.
        tried: Tokens of the micro-batch that was measured.
        room: Bytes available for models and activations, on the rank with the fewest.
        loaded: Bytes of the loaded models on this rank.
        peak: Peak bytes during the measurement on this rank.
    """
    if peak > room:
        num_tokens = int(tried * (room - loaded) / (peak - loaded))
    return rounded(-world.agree_max(-num_tokens))
