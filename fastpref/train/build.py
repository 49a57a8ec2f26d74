"""A run put together: data, models, what trains them, the checkpoint to go on from, and the log."""

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.model.pair import Pair, build_pair
from fastpref.objectives.objective import build_objective
from fastpref.train.announce import announce, announce_adapters, announce_tokens
from fastpref.train.data import Data, build_loaders, load_data
from fastpref.train.export_plan import plan_export
from fastpref.train.opening import open_log, open_run_dir
from fastpref.train.run import Run
from fastpref.train.start import Start
from fastpref.train.updates import Updates, build_updates
from fastpref.train.workload import Workload, build_workload


def build_run(config: Config, world: World, start: Start) -> Run:
    """Everything a run needs, in the order in which mistakes are cheap to find: data, then models.

    Args:
        config: Of the run.
        world: Whoever runs.
        start: What it goes on from.

    Raises:
        FastprefError: whatever is wrong with the config, the data or the model, or does not go
            with the checkpoint.
    """
    objective = build_objective(config.loss)
    announce(
        objective,
        world,
        config.model,
        config.datasets,
        config.transform,
        adapters=config.adapter.trained,
    )
    data = load_data(config, world)
    fingerprints: dict[str, str] = {}
    if start.checkpoint is not None:
        # before models are loaded for nothing
        fingerprints = data.fingerprints(config.model, world)
        start.check(asdict(config), fingerprints, allow=config.resume.allow)
    pair = build_pair(
        config.training,
        config.packing,
        world,
        longest=data.longest,
        num_tokens=data.num_tokens,
    )
    fingerprints = fingerprints or data.fingerprints(config.model, world)
    place = place_of(world, recomputes=config.activation_checkpointing)
    work = build_workload(
        objective,
        pair,
        config.training,
        world,
        limit=config.packing.token_limit or start.state.tokens_found(place),
        longest=data.longest,
    )
    return _Parts(config, world, start, data, pair, work).assemble(fingerprints)


def place_of(world: World, *, recomputes: bool) -> str:
    """What the memory that a token takes, and that there is, depends on between two starts."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    keeps = "block inputs" if recomputes else "activations"
    return f"{world.size} x {name}, {keeps} kept"


class _Parts(NamedTuple):
    """What a run is made of."""

    config: Config
    world: World
    start: Start
    data: Data
    pair: Pair
    work: Workload

    def assemble(self, fingerprints: dict[str, str]) -> Run:
        """Loaders, updates and state, then folder and log: what fails until then leaves none."""
        config, world, policy = self.config, self.world, self.pair.policy
        train, held_out = build_loaders(
            self.data,
            self.work.layout,
            num_embeddings=policy.num_embeddings,
            # auto decides by itself how a step is divided
            min_micro_batches=1
            if config.packing.token_limit is None
            else config.gradient_accumulation_steps,
        )
        announce_adapters(policy, config.adapter, world)
        announce_tokens(train, world)
        updates = self.updates(train.order.num_steps)
        plan = partial(
            plan_export,
            config.model,
            policy.model.config,
            *self.data.texts,
            adapter=config.adapter if config.adapter.trained else None,
        )
        export = world.only_on_main(plan)
        state = self.start.load(policy, updates, world.device, num_steps=train.order.num_steps)
        if config.packing.token_limit is None:
            state.max_tokens = self.work.layout.max_tokens
        state.place = place_of(world, recomputes=config.activation_checkpointing)
        run_dir = open_run_dir(self.start, config.to_yaml(), world)
        log = open_log(
            run_dir,
            world,
            followers=config.trackers,
            options=asdict(config),
            min_interval_seconds=config.minimum_log_interval_secs,
            starts_at_log_two=self.work.step_loss.objective.starts_at_log_two,
            exactly=self.pair.starts_equal,
            examples=state.examples,
            work=self.work.useful,
        )
        return Run(
            config=config,
            world=world,
            run_dir=run_dir,
            tokenizer=self.data.tokenizer,
            train=train,
            eval=held_out,
            policy=policy,
            reference=self.pair.reference,
            step_loss=self.work.step_loss,
            repetition=self.work.repetition,
            updates=updates,
            log=log,
            state=state,
            start=self.start,
            fingerprints=fingerprints,
            export=export,
        )

    def updates(self, num_steps: int) -> Updates:
        """What trains the policy."""
        config = self.config
        return build_updates(
            self.pair.policy,
            self.world,
            optimizer=config.optimizer,
            lr=config.lr,
            options=config.optim,
            warmup_steps=config.warmup_steps,
            num_steps=num_steps,
            max_grad_norm=config.max_grad_norm,
            skip_nonfinite=config.on_nonfinite == "skip",
        )
