"""A run put together: data, models, optimizer and log."""

from dataclasses import asdict
from functools import partial

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.announce import announce, announce_tokens
from fastpref.train.data import build_loaders, load_data
from fastpref.train.export import plan_export
from fastpref.train.log import open_log
from fastpref.train.models import build_models
from fastpref.train.optim import build_optimizer, build_scheduler
from fastpref.train.run import Run
from fastpref.train.run_folder import run_place


def build_run(config: Config, world: World) -> Run:
    """Everything a run needs, in the order in which mistakes are cheap to find: data, then models.

    Raises:
        FastprefError: whatever is wrong with the config, the data or the model.
    """
    objective = build_objective(config.loss)
    announce(objective, world, config.model, config.datasets, config.transform)
    data = load_data(config, world)
    models = build_models(
        config, world, with_reference=objective.needs.reference, longest=data.longest
    )
    policy = models.policy
    train_loader, eval_loader = build_loaders(
        data,
        models.layout,
        num_embeddings=policy.num_embeddings,
        min_micro_batches=config.gradient_accumulation_steps,
    )
    announce_tokens(train_loader, world)
    optimizer = build_optimizer(
        config.optimizer, policy.parameters(), lr=config.lr, options=config.optim.arguments()
    )
    policy.follow(optimizer)
    scheduler = build_scheduler(
        optimizer,
        schedule=config.optim.schedule,
        warmup_steps=config.warmup_steps,
        num_steps=train_loader.order.num_steps,
        min_lr_ratio=config.optim.min_lr_ratio,
    )
    plan = world.only_on_main(partial(plan_export, config.model, policy.model.config, *data.texts))
    # last: what fails until here leaves no folder behind
    run_dir = run_place(config).create(config.to_yaml(), world)
    log = open_log(
        run_dir,
        world,
        followers=config.trackers,
        options=asdict(config),
        min_interval_seconds=config.minimum_log_interval_secs,
        starts_at_log_two=objective.starts_at_log_two,
        exactly=models.starts_equal,
    )
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        tokenizer=data.tokenizer,
        train=train_loader,
        eval=eval_loader,
        policy=policy,
        reference=models.reference,
        step_loss=StepLoss(objective, policy, models.reference),
        optimizer=optimizer,
        scheduler=scheduler,
        log=log,
        export=plan,
    )
