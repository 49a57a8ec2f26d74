"""A run put together: data, models, what trains them, the checkpoint to go on from, and the log."""

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.objectives.objective import build_objective
from fastpref.train.announce import announce, announce_tokens
from fastpref.train.data import Data, build_loaders, load_data
from fastpref.train.export import plan_export
from fastpref.train.fingerprints import take_fingerprints
from fastpref.train.models import Models, build_models
from fastpref.train.opening import open_log, open_run_dir
from fastpref.train.run import Run
from fastpref.train.start import Start
from fastpref.train.updates import Updates, build_updates


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
    announce(objective, world, config.model, config.datasets, config.transform)
    data = load_data(config, world)
    fingerprints: dict[str, str] = {}
    if start.checkpoint is not None:
        # before models are loaded for nothing
        fingerprints = take_fingerprints(config.model, data, world)
        start.check(asdict(config), fingerprints, allow=config.resume.allow)
    models = build_models(config, world, objective, longest=data.longest)
    fingerprints = fingerprints or take_fingerprints(config.model, data, world)
    return _Parts(config, world, start, data, models).assemble(fingerprints)


class _Parts(NamedTuple):
    """What a run is made of."""

    config: Config
    world: World
    start: Start
    data: Data
    models: Models

    def assemble(self, fingerprints: dict[str, str]) -> Run:
        """Loaders, updates and state, then folder and log: what fails until then leaves none."""
        config, world, policy = self.config, self.world, self.models.policy
        train, held_out = build_loaders(
            self.data,
            self.models.layout,
            num_embeddings=policy.num_embeddings,
            min_micro_batches=config.gradient_accumulation_steps,
        )
        announce_tokens(train, world)
        updates = self.updates(train.order.num_steps)
        plan = partial(plan_export, config.model, policy.model.config, *self.data.texts)
        export = world.only_on_main(plan)
        state = self.start.load(policy, updates, world.device, num_steps=train.order.num_steps)
        run_dir = open_run_dir(self.start, config.to_yaml(), world)
        log = open_log(
            run_dir,
            world,
            followers=config.trackers,
            options=asdict(config),
            min_interval_seconds=config.minimum_log_interval_secs,
            starts_at_log_two=self.models.step_loss.objective.starts_at_log_two,
            exactly=self.models.starts_equal,
            examples=state.examples,
        )
        return Run(
            config=config,
            world=world,
            run_dir=run_dir,
            tokenizer=self.data.tokenizer,
            train=train,
            eval=held_out,
            policy=policy,
            reference=self.models.reference,
            step_loss=self.models.step_loss,
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
            self.models.policy,
            self.world,
            optimizer=config.optimizer,
            lr=config.lr,
            options=config.optim,
            warmup_steps=config.warmup_steps,
            num_steps=num_steps,
            max_grad_norm=config.max_grad_norm,
            skip_nonfinite=config.on_nonfinite == "skip",
        )
