"""Builds a run: data, models, optimizer, the checkpoint to resume from, and the log."""

from dataclasses import asdict
from functools import partial

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.model.pair import build_pair
from fastpref.model.precision import precision_here
from fastpref.objectives.objective import build_objective
from fastpref.train.assembly import Parts, export_of, place_of
from fastpref.train.data import load_data
from fastpref.train.logs.announce import announce
from fastpref.train.opening import check_run_dir
from fastpref.train.resume.start import Start
from fastpref.train.run import Run
from fastpref.train.workload import build_workload


def build_run(config: Config, world: World, start: Start, chat_date: str = "") -> Run:
    """Everything a run needs, cheap checks first: options, then data, then models.

    Args:
        chat_date: The date that a new run gives to a chat template that prints it; "": today.

    Raises:
        FastprefError: the config, the data or the model is invalid, or does not match the
            checkpoint.
    """
    start.check(asdict(config), {}, allow=config.resume.allow, quiet=True)
    world.on_main(partial(check_run_dir, start, config.to_yaml()))
    objective = build_objective(config.loss)
    model = precision_here(config.model, world)
    announce(
        objective,
        world,
        model,
        config.datasets,
        config.transform,
        adapters=config.adapter.trained,
    )
    data = load_data(config, world, chat_date=start.state.chat_date or chat_date)
    data.twin.check_longest(data.longest, is_kept=config.caches_reference)
    fingerprints: dict[str, str] = {}
    if start.checkpoint is not None:
        # a mismatch is refused before models are loaded
        fingerprints = data.fingerprints(config.model, world)
        start.check(asdict(config), fingerprints, allow=config.resume.allow)
        start.check_length(data.train_order.num_steps)
    export = export_of(config.model, config.adapter, data, world)
    training = config.training._replace(model=model)
    pair = build_pair(
        training,
        config.packing,
        world,
        longest=data.longest,
        num_tokens=data.num_tokens,
    )
    fingerprints = fingerprints or data.fingerprints(config.model, world)
    work = build_workload(
        objective,
        pair,
        training,
        world,
        limit=config.packing.token_limit or start.tokens_found(place_of(world), asdict(config)),
        longest=data.longest,
    )
    return Parts(config, model, world, start, data, export, pair, work).assemble(fingerprints)
