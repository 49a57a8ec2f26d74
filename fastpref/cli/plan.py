"""`task=plan`: memory per GPU in training, and the tokens of a micro-batch that fit."""

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fastpref.batches.layouts import PackedRows, PaddedRows
from fastpref.cli.streams import printing_results
from fastpref.config import PackingConfig, PlanConfig, TrainingOptions
from fastpref.errors import ConfigError
from fastpref.memory.plan import GIB, Device, MemoryPlan, communicated_bytes
from fastpref.memory.planning import (
    AUTO_TOKENS,
    Counted,
    Measured,
    auto_tokens,
    count_training,
    most_step_tokens,
)
from fastpref.memory.worst_rows import Rows
from fastpref.model.adapters.lora import Adapters
from fastpref.model.attention.choice import ON_GPU
from fastpref.model.beforehand import check_options
from fastpref.model.replicate import is_replicated
from fastpref.train.optim import check_optimizer, state_bytes


class Step(NamedTuple):
    """Upper bounds on one GPU's share of an optimizer step."""

    num_rows: int
    num_tokens: int
    of_row: int
    """Tokens of one row, which is never split over micro-batches."""


def show_plan(
    training: TrainingOptions, packing: PackingConfig, options: PlanConfig, *, longest: int
) -> None:
    """Print the memory plan with and without activation checkpointing, on one GPU and on all.

    Args:
        packing: Row layout, used if the model's attention supports it.
        longest: Maximum sequence length in tokens.

    Raises:
        FastprefError: the model does not exist.
        ConfigError: the model does not support an option, its family cannot run on the meta device,
            or the optimizer cannot run on that many GPUs.
    """
    check_optimizer(training.optimizer, training.optim.arguments(), options.num_gpus)
    twin = check_options(training.model, training.adapter, packing, trainable=True)
    columns = list(_columns(training, packing, options, longest, twin.adapters))
    table = Table(title=f"{training.model.name_or_path}, GiB of each GPU")
    for i, (title, _) in enumerate([("", []), *columns]):
        table.add_column(title, justify="right" if i else "left")
    for rows in zip(*(cells for _, cells in columns), strict=True):
        names = {name for name, _ in rows}
        table.add_row(names.pop(), *(text for _, text in rows))
    with printing_results():
        Console(file=sys.stdout, width=100).print(table)


def _columns(
    training: TrainingOptions,
    packing: PackingConfig,
    options: PlanConfig,
    longest: int,
    adapters: Adapters | None,
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Title and (name, text) cells of each column."""
    device = Device("cuda", 1, int(options.memory_gib * GIB))
    for recomputes in (False, True):
        counted = _count(
            training._replace(activation_checkpointing=recomputes), packing, device, longest
        )
        replicated = is_replicated(
            training.adapter, num_bytes=counted.stored_bytes, room=device.memory
        )
        if options.num_gpus > 1 and adapters is not None and not replicated:
            adapters.check_shardable()
        for num_gpus in sorted({1, options.num_gpus}):
            title = f"{num_gpus} GPU{'s' * (num_gpus > 1)}"
            title += ",\nrecomputed" if recomputes else ""
            num_rows = math.ceil(training.batch_size / num_gpus)
            num_tokens = most_step_tokens(training, num_gpus, longest=longest)
            of_step = Step(num_rows, num_tokens, num_tokens // num_rows)
            on = device._replace(num=num_gpus, replicated=replicated)
            yield title, _cells(counted, on, packing, of_step)
            _warn_of_rows(title.replace("\n", " "), counted.plan(on), on, of_step)


def _count(
    training: TrainingOptions, packing: PackingConfig, device: Device, longest: int
) -> Counted:
    """Count the model for packed rows if these are enabled and supported, else for padded rows."""
    requested, compute = training.model.attention, training.model.compute_dtype
    # the fastest 16-bit back ends, which auto takes, gather keys
    gathers_keys = requested in ON_GPU or (requested == "auto" and compute != "float32")
    rows = Rows(PaddedRows(), longest, training.loss.needs.pairs, gathers_keys)
    measured = Measured(body=None, rows=rows, state_bytes=state_bytes(training))
    if packing.enabled:
        layout = PackedRows(share_prompt=packing.share_prompt != "false", max_tokens=AUTO_TOKENS)
        try:
            packed = measured._replace(rows=rows._replace(layout=layout))
            return count_training(training, packed, device)
        except ValueError as error:
            print(f"planned for padded rows: {error}", file=sys.stderr)
    try:
        return count_training(training, measured, device)
    except ValueError as error:
        raise ConfigError(
            f"model.name_or_path: {training.model.name_or_path} cannot be planned for: {error}"
        ) from error


def _warn_of_rows(title: str, plan: MemoryPlan, device: Device, step: Step) -> None:
    """Say that the model fits but the longest row that max_length allows does not."""
    most = plan.most_tokens(device.memory)
    if 0 < most < step.of_row:
        print(
            f"{title}: a row may have {step.of_row:,} tokens by max_length and is never divided; "
            f"that many take {plan.peak(step.of_row) / GIB:.2f} of the "
            f"{(device.memory - plan.reserve) / GIB:.2f} GiB beside the reserve. A smaller "
            "max_length, activation_checkpointing=true or more GPUs need less",
            file=sys.stderr,
        )


def _cells(
    counted: Counted, device: Device, packing: PackingConfig, step: Step
) -> list[tuple[str, str]]:
    """(name, text) of each number of a column."""
    plan = counted.plan(device)
    tokens = min(packing.token_limit or auto_tokens(plan, device.memory), step.num_tokens)
    sent = communicated_bytes(
        counted.weights,
        counted.sizes,
        device,
        # a row is never split over micro-batches
        num_micro_batches=min(step.num_rows, math.ceil(step.num_tokens / tokens)),
    )
    fits = plan.most_tokens(device.memory) > 0
    # a row above packing.max_tokens is computed whole
    most = max(tokens, step.of_row) if packing.token_limit else tokens
    return [
        *((name, f"{size / GIB:.2f}") for name, size in plan.parts().items() if name != "process"),
        ("head", f"{plan.head.of(most) / GIB:.2f}"),
        ("reserve", f"{plan.reserve / GIB:.2f}"),
        ("MiB a token", f"{plan.kept_per_token / 2**20:.3f}"),
        ("most tokens at once", f"{plan.most_tokens(device.memory):,}" if fits else "do not fit"),
        ("tokens taken at once", f"{tokens:,}" if fits else ""),
        ("peak", f"{plan.peak(most) / GIB:.2f}"),
        ("sent in a step", f"{sent / GIB:.2f}" if fits else ""),
    ]
