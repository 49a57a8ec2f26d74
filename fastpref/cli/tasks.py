"""Table of tasks: the checks before anything is loaded, and the function that every rank runs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastpref.config import Config

if TYPE_CHECKING:
    from fastpref.distributed import World


def check_task(config: Config, num_ranks: int) -> None:
    """Refuse, before anything is loaded, a task that cannot run on this machine.

    Raises:
        ConfigError: an output folder, `resume` or the optimizer cannot be used.
    """
    from fastpref.cli.resume_names import check_resume
    from fastpref.train.optim import check_optimizer
    from fastpref.train.resume.origin import run_to_go_on_with
    from fastpref.train.run_folder import check_cache, check_writable, run_place

    if config.task == "estimate_weights":
        assert config.weights.output_dir
        check_writable("weights.output_dir", Path(config.weights.output_dir))
        return
    place = run_place(config)
    if config.task == "train":
        check_resume(config.resume, run_to_go_on_with(config.resume.path, place))
        place.check(may_go_on=config.resume.path != "never")
        if config.caches_reference:
            check_cache(place.references(config.reference.cache_dir))
    else:
        from fastpref.tisdpo.recipe_folder import check_run_folder, find_place

        place = find_place(place, config.resume.path, config.stages)
        check_resume(config.resume, place.run_dir)
        check_run_folder(place, config.to_yaml(), allow=config.resume.allow)
    check_optimizer(config.optimizer, config.optim.arguments(), num_ranks)


def run_task(config: Config, world: "World") -> None:
    """Run `task=train`, `estimate_weights` or `tisdpo` on this rank.

    Raises:
        FastprefError: the task failed, or the ranks were started with different options.
    """
    from fastpref.train.resume.differences import check_same_options

    world.compare_on_main(asdict(config), check_same_options)
    if config.task == "estimate_weights":
        from fastpref.tisdpo.estimate import estimate_weights

        estimate_weights(config, world)
        return
    from fastpref.train.logs.trackers import check_trackers

    world.on_main(lambda: check_trackers(config.trackers))
    if config.task == "tisdpo":
        from fastpref.tisdpo.recipe import run_tisdpo

        run_tisdpo(config, world)
    else:
        from fastpref.train.task import train

        train(config, world)
