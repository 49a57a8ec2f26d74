"""`task=estimate_weights`: token weights for TIS-DPO from a positive and a negative model.

A file's weight of response token y is log π⁻(y | …) - log π⁺(y | …), the TIS-DPO repository's sign
on both sides; the loader turns it into the weight that the loss takes (`token_weights`).

One model after the other scores all rows, shard by shard (`weight_shards`); the weights are written
once both are done.
"""

import logging

from fastpref.config import Config
from fastpref.data.announce import read_files
from fastpref.data.counts import log_counts
from fastpref.data.options import data_options
from fastpref.distributed import World, main_first
from fastpref.scoring.score import score_sides
from fastpref.signals import say_if_stopped
from fastpref.tisdpo.jobs import JobOptions, open_job
from fastpref.tisdpo.report import WeightsReport
from fastpref.tisdpo.report_files import report_on
from fastpref.tisdpo.sides import build_sides, shared_tokenizer
from fastpref.tisdpo.weight_rows import write_weights

logger = logging.getLogger("fastpref")


@say_if_stopped("shards that are complete are kept; the same command goes on there")
def estimate_weights(config: Config, world: World) -> list[WeightsReport]:
    """Score every split of every dataset and write `<output_dir>/<name><suffix>/<split>.jsonl`.

    A run that was stopped goes on where it was; one whose file is there already does nothing.

    Returns:
        On rank 0 a report on each dataset, which is also written as `weights.html` and
        `weights.png` beside its files; on the others nothing.

    Raises:
        DataError: no split of a dataset is there, or a row breaks a rule.
        CheckpointError: a model is missing, the two do not share a vocabulary, or one of them
            gives numbers that are not finite.
        InterruptionError, PreemptionError: a signal came; complete shards stay.
    """
    sides = build_sides(config.weights, config.model, config.adapter, world)
    tokenizer = shared_tokenizer(sides)
    options = JobOptions(weights=config.weights, data=config.data, packing=config.packing)
    sources = main_first(world, lambda: read_files(data_options(config), quiet=not world.is_main))
    jobs = [open_job(options, sides, rows, tokenizer, world) for rows in sources]
    if world.is_main:
        log_counts([job.counts for job in jobs], tokenizer)
    finished = world.on_main(lambda: [job.is_finished() for job in jobs])
    unfinished = [job for job, is_done in zip(jobs, finished, strict=True) if not is_done]

    def begin() -> None:
        for job, is_done in zip(jobs, finished, strict=True):
            if is_done:
                logger.info("%s is there already, with these models and settings", job.path)
            else:
                job.keep_date()

    def write() -> list[WeightsReport]:
        for job in unfinished:
            write_weights(job, config.weights.round)
            logger.info("wrote %s: %d rows", job.path, len(job.rows.dataset))
        # the first split of each dataset, the one to train on where it is there
        first_jobs = {job.path.parent: job for job in reversed(jobs)}
        return [report_on(first_jobs[folder], tokenizer) for folder in reversed(first_jobs)]

    world.on_main(begin)
    score_sides(
        sides,
        [(job.rows, job.shards) for job in unfinished],
        world,
        tokenizer=tokenizer,
        packing=config.packing,
        batch_size=config.weights.batch_size,
        deadline_seconds=config.checkpoint.deadline_seconds(),
    )
    return world.only_on_main(write) or []
