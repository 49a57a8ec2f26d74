"""Assembles a run from its parts: loaders, optimizer and state, then the run folder and the log."""

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch

from fastpref.config import AdapterConfig, Config, ModelConfig
from fastpref.distributed import World
from fastpref.model.pair import Pair
from fastpref.train.data import Data, Loaders, build_loaders
from fastpref.train.export.plan import ExportPlan, plan_export
from fastpref.train.known_reference import Origin, know_reference
from fastpref.train.logs.announce import announce_adapters, announce_tokens
from fastpref.train.opening import open_log, open_run_dir
from fastpref.train.resume.start import Start
from fastpref.train.run import Run
from fastpref.train.updates import Updates, build_updates
from fastpref.train.workload import Workload


def place_of(world: World) -> str:
    """Describes the devices of a run."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{world.size} x {name}"


def export_of(
    model: ModelConfig, adapter: AdapterConfig, data: Data, world: World
) -> ExportPlan | None:
    """The plan of the exported model; None on every rank but 0.

    Args:
        model, adapter: The run's options.

    Raises:
        CheckpointError: see `plan_export`.
    """
    plan = partial(
        plan_export,
        model,
        data.twin.model.config,
        *data.texts,
        adapter=adapter if adapter.trained else None,
    )
    return world.only_on_main(plan)


class Parts(NamedTuple):
    """The parts that a run is made of."""

    config: Config
    model: ModelConfig
    """The model options, with dtypes resolved for this device."""
    world: World
    start: Start
    data: Data
    export: ExportPlan | None
    """See `export_of`."""
    pair: Pair
    work: Workload

    def assemble(self, fingerprints: dict[str, str]) -> Run:
        """Build loaders, optimizer and state, then folder and log: an earlier failure leaves no
        folder."""
        config, world, policy = self.config, self.world, self.pair.policy
        limit = config.packing.token_limit
        loaders = build_loaders(
            self.data,
            self.work.layout,
            num_embeddings=policy.num_embeddings,
            # with packing.max_tokens=auto the fitted limit alone divides a step
            min_micro_batches=1 if limit is None else config.gradient_accumulation_steps,
        )
        announce_adapters(policy, config.adapter)
        announce_tokens(loaders.train, world)
        num_steps = loaders.train.order.num_steps
        updates = self.updates(num_steps)
        # scored before the checkpoint is loaded, while the policy still equals the initial model
        loaders = self.with_reference(loaders, fingerprints["model"])
        state = self.start.load(policy, updates, world.device)
        if limit is None:
            state.max_tokens = self.work.layout.max_tokens
        state.chat_date = self.data.chat_date
        state.place = place_of(world)
        run_dir = open_run_dir(self.start, config.to_yaml(), world)
        log = open_log(
            run_dir,
            world,
            followers=config.trackers,
            options=asdict(config),
            min_interval_seconds=config.minimum_log_interval_secs,
            starts_at_log_two=self.work.step_loss.objective.starts_at_log_two,
            exactly=self.pair.starts_equal and not config.caches_reference,
            examples=state.examples,
            work=self.work.useful,
        )
        return Run(
            config=config,
            model=self.model,
            world=world,
            run_dir=run_dir,
            tokenizer=self.data.tokenizer,
            train=loaders.train,
            eval=loaders.eval,
            policy=policy,
            reference=self.pair.beginning if config.caches_reference else self.pair.reference,
            step_loss=self.work.step_loss,
            repetition=self.work.repetition,
            updates=updates,
            log=log,
            state=state,
            start=self.start,
            fingerprints=fingerprints,
            export=self.export,
        )

    def with_reference(self, loaders: Loaders, digest: str) -> Loaders:
        """The loaders, with the reference's log-probabilities if these are cached beforehand."""
        config = self.config
        if not config.caches_reference:
            return loaders
        return know_reference(
            loaders,
            self.world,
            policy=self.pair.policy,
            origin=Origin(self.model, digest, config.adapter.quantized),
            folder=self.start.place.references(config.reference.cache_dir),
            repetition=self.work.repetition,
            deadline_seconds=config.checkpoint.deadline_seconds(),
        )

    def updates(self, num_steps: int) -> Updates:
        """The policy's optimizer and schedule."""
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
