"""`task=estimate_weights`: token weights for TIS-DPO from a positive and a negative model.

In the file the weight of response token y is log π⁻(y | …) - log π⁺(y | …), with the sign of the
TIS-DPO repository for chosen and rejected alike; `token_weights` turns it into that of the loss.

One model after the other scores all rows, shard by shard (`scoring/shards.py`); the weights are
written once both are done.
"""

from fastpref.config import Config
from fastpref.data.announce import read_files
from fastpref.data.options import data_options
from fastpref.distributed import World, main_first
from fastpref.scoring.score import KEPT
from fastpref.signals import say_if_stopped
from fastpref.tisdpo.jobs import JobOptions, open_job
from fastpref.tisdpo.report import WeightsReport
from fastpref.tisdpo.run_jobs import run_jobs
from fastpref.tisdpo.sides import build_sides, shared_tokenizer
from fastpref.tisdpo.targets import one_for_each_file
from fastpref.tisdpo.weight_rows import writing_alone


@say_if_stopped(KEPT)
def estimate_weights(config: Config, world: World, *, chat_date: str = "") -> list[WeightsReport]:
    """Score every split of every dataset and write `<output_dir>/<name><suffix>/<split>.jsonl`.

    A stopped estimation resumes after its last complete shard; finished files are not redone.

    Args:
        config: The run's config.
        world: The ranks.
        chat_date: The date that a new file gives to a chat template that prints it; "": today.

    Returns:
        On rank 0 a report on each dataset, which is also written as `weights.html` and
        `weights.png` beside its files; on other ranks an empty list.

    Raises:
        DataError: a dataset has no split, or a row breaks a rule.
        CheckpointError: a model is missing, the two do not share a vocabulary, or one of them
            gives numbers that are not finite.
        ConfigError: another process writes weights of one of the datasets, or a weights file would
            replace another file, see `one_for_each_file`.
        InterruptionError, PreemptionError: a signal came, or the deadline is near; complete shards
            stay.
    """
    data = data_options(config)
    options = JobOptions(
        weights=config.weights, data=data, packing=config.packing, chat_date=chat_date
    )
    files = main_first(world, lambda: read_files(data, quiet=not world.is_main))
    sources = one_for_each_file(files, options)
    sides = build_sides(config.weights, config.model, config.adapter, config.packing, world)
    tokenizer = shared_tokenizer(sides)
    with writing_alone([options.path_of(rows) for rows in sources], world):
        jobs = [open_job(options, sides, rows, tokenizer, world) for rows in sources]
        return run_jobs(
            jobs,
            sides,
            options,
            world,
            tokenizer=tokenizer,
            deadline_seconds=config.checkpoint.deadline_seconds(),
        )
