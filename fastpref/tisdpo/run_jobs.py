"""Scores the rows of unfinished weights files with both models, then writes the files."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastpref.data.counts import log_counts
from fastpref.distributed import World
from fastpref.scoring.score import score_sides
from fastpref.scoring.side import Side
from fastpref.tisdpo.jobs import JobOptions
from fastpref.tisdpo.report import WeightsReport, read_report
from fastpref.tisdpo.report_html import write_html
from fastpref.tisdpo.report_plot import plot_weights
from fastpref.tisdpo.weight_rows import SourceJob, write_weights
from fastpref.train.logs.report import try_to_draw

logger = logging.getLogger("fastpref")


def run_jobs(
    jobs: Sequence[SourceJob],
    sides: Sequence[Side],
    options: JobOptions,
    world: World,
    *,
    tokenizer: Any,
    deadline_seconds: int | None,
) -> list[WeightsReport]:
    """Score and write the weights files that are not finished yet, see `estimate_weights`."""
    log_counts([job.counts for job in jobs], tokenizer)
    finished = world.on_main(lambda: [job.is_finished() for job in jobs])
    unfinished = [job for job, is_done in zip(jobs, finished, strict=True) if not is_done]

    def begin() -> None:
        for job, is_done in zip(jobs, finished, strict=True):
            if is_done:
                logger.info("%s is there already, with these models and settings", job.path)
                job.drop_remains()
            else:
                if job.path.is_file():
                    logger.info(
                        "%s holds weights of other models, settings or rows; it will be replaced",
                        job.path,
                    )
                job.keep_date()

    def write() -> list[WeightsReport]:
        for job in unfinished:
            write_weights(job, options.weights.round)
            logger.info("wrote %s: %d rows", job.path, len(job.rows.dataset))
        # report on the first split of each dataset, which is the training split if there is one
        first_jobs = {job.path.parent: job for job in reversed(jobs)}
        return [report_on(first_jobs[folder], tokenizer) for folder in reversed(first_jobs)]

    world.on_main(begin)
    score_sides(
        sides,
        [(job.rows, job.shards) for job in unfinished],
        world,
        tokenizer=tokenizer,
        packing=options.packing,
        batch_size=options.weights.batch_size,
        deadline_seconds=deadline_seconds,
    )
    return world.only_on_main(write) or []


def report_on(job: SourceJob, tokenizer: Any) -> WeightsReport:
    """Read a weights file back, and write its `weights.html` and `weights.png`; without the picture
    there is only a warning, as the weights are already written."""
    report = read_report(job.path, job.encoded, job.origin, tokenizer)
    page, picture = (job.path.with_name(f"weights.{kind}") for kind in ("html", "png"))
    write_html(report, page)
    is_drawn = try_to_draw(partial(plot_weights, report), picture)
    logger.info("wrote %s%s", page, " and weights.png" if is_drawn else "")
    return report
