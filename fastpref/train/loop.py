"""The training run: one loop over optimizer steps, over objects that were built before it."""

import logging
import random
import time
from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpref.batches.loader import StepBatches
from fastpref.config import Config
from fastpref.distributed import World
from fastpref.errors import NON_FINITE, NonFiniteError
from fastpref.progress import Progress
from fastpref.signals import StopRequest, say_if_stopped
from fastpref.train.advice import advise
from fastpref.train.build import build_run
from fastpref.train.export import export_model
from fastpref.train.metrics import (
    PendingStep,
    Record,
    format_metrics,
    name_for_split,
    sum_over_examples,
)
from fastpref.train.report import show_results
from fastpref.train.run import Run
from fastpref.train.sampling import sample_responses, write_samples

logger = logging.getLogger("fastpref")


def train(config: Config, world: World) -> None:
    """`task=train`: from rows and a model to a trained model.

    Raises:
        FastprefError: with the exit code of what went wrong; InterruptionError, PreemptionError
            and the CheckpointError of a file that cannot be written after the model was saved.
    """
    seed_everything(config.seed)
    run = build_run(config, world)
    for line in advise(run):
        logger.warning(line)
    started = time.perf_counter()
    # the log is closed last: a tracker may wait for its service, and a model is not to wait for it
    with (
        say_if_stopped(f"what there is lies in {run.run_dir}"),
        closing(run.log),
        StopRequest() as stop,
    ):
        run_loop(run, stop)
        with stop.if_unwritable():
            run.log.flush()
        export_model(run.policy, run.export, run.run_dir, world)
        if world.is_main:
            show_results(run.log.records, run.run_dir, time.perf_counter() - started)
        stop.raise_if_requested(run.run_dir, world)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random. The order of the data depends on its own generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_loop(run: Run, stop: StopRequest) -> None:
    """Every optimizer step, with evaluations before, between and after; ends early on a signal."""
    config, world, order = run.config, run.world, run.train.order
    eval_steps = steps_between_evals(config.eval_every, config.batch_size)
    examples = 0
    progress = Progress(total=order.num_steps, visible=world.is_main)
    with progress, run.train.steps(world) as steps:
        for step, batches in enumerate(steps):
            if step % eval_steps == 0 and (step > 0 or config.do_first_eval):
                evaluate(run, step, examples, stop)
            if stop.agreed(world):
                return
            examples += batches.num_examples
            lr = float(run.scheduler.get_last_lr()[0])
            names, values = train_step(run, batches, step)
            run.scheduler.step()
            due = run.log.add_step(
                PendingStep(
                    step=step + 1,
                    examples=examples,
                    num_examples=batches.num_examples,
                    num_tokens=batches.num_tokens,
                    num_computed=batches.num_computed,
                    lr=lr,
                    names=names,
                    values=values,
                )
            )
            if due:
                with stop.if_unwritable():
                    show_step(progress, run.log.flush(), visible=world.is_main)
            progress.advance()
    evaluate(run, order.num_steps, examples, stop)


def show_step(progress: Progress, record: Record | None, *, visible: bool) -> None:
    """The latest training record: beside the bar in short, or as a log line in full."""
    if record is None or not visible:
        return
    if not progress.on_terminal:
        logger.info("train stats after %d examples: %s", record["examples"], format_metrics(record))
        return
    numbers = f"loss {record['loss/train']:.3f}"
    if "rewards_train/accuracies" in record:
        numbers += f"  accuracy {record['rewards_train/accuracies']:.2f}"
    progress.show(f"{numbers}  {record['tokens_per_second']:,.0f} tokens/s")


def steps_between_evals(eval_every: int, batch_size: int) -> int:
    """`eval_every` examples as whole optimizer steps, at least one; says so where it rounds."""
    steps = max(1, eval_every // batch_size)
    if steps * batch_size != eval_every:
        logger.warning(
            "eval_every=%d is no multiple of batch_size=%d: evaluating every %d examples",
            eval_every,
            batch_size,
            steps * batch_size,
        )
    return steps


def train_step(run: Run, step_batches: StepBatches, step: int) -> tuple[list[str], Tensor]:
    """One optimizer step on a global batch.

    The loss is summed over pairs and divided by their global number, whatever the split into
    micro-batches and ranks; gradients are summed over ranks.

    Returns:
        Metric names, and their means over the batch before the update (K,), on the device.
    """
    run.optimizer.zero_grad()
    metrics = []
    for host_batch in step_batches.batches:
        batch = host_batch.to(run.world.device)
        losses, values = run.step_loss.compute(batch, step)
        (losses.sum() / step_batches.num_examples).backward()
        run.step_loss.done()
        metrics.append(values)
    grad_norm = clip_gradients(run, step)
    run.optimizer.step()
    names, sums = sum_over_examples(metrics)
    means = run.world.sum(sums) / step_batches.num_examples
    names = [name_for_split(name, "train") for name in names]
    return [*names, "grad_norm"], torch.cat([means, grad_norm[None]])


def clip_gradients(run: Run, step: int) -> Tensor:
    """Clip the global gradient norm; a norm that is not finite stops the run before the update.

    On a GPU the check runs on the device, so nothing waits for it.

    Returns:
        The norm before clipping, a float32 scalar on the device.
    """
    parameters = list(run.policy.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if run.world.device.type == "cuda":
        torch._assert_async(torch.isfinite(norm), f"{NON_FINITE} {step + 1}")
    elif not torch.isfinite(norm):
        raise NonFiniteError(
            f"{NON_FINITE} {step + 1}: {norm.item()}; the weights are those after step {step}"
        )
    return norm.float()


def evaluate(run: Run, step: int, examples: int, stop: StopRequest) -> None:
    """Held-out means (and samples) of the policy as it stands; one line of metrics.jsonl."""
    if run.eval is None:
        return
    with stop.if_unwritable():
        run.log.flush()
    started = time.perf_counter()
    metrics, count, num_tokens = [], 0, 0
    run.policy.eval()
    with torch.no_grad(), run.eval.steps(run.world) as steps:
        for step_batches in steps:
            if stop.agreed(run.world):
                # a mean over part of the split would look like one over all of it
                run.policy.train()
                return
            for host_batch in step_batches.batches:
                batch = host_batch.to(run.world.device)
                _, values = run.step_loss.compute(batch, None)
                run.step_loss.done()
                metrics.append(values)
            count += step_batches.num_examples
            num_tokens += step_batches.num_tokens
    run.policy.train()
    names, sums = sum_over_examples(metrics)
    means = (run.world.sum(sums) / count).tolist()
    seconds = time.perf_counter() - started
    record: Record = {"step": step, "examples": examples, "split": "eval"}
    record |= {name_for_split(name, "eval"): mean for name, mean in zip(names, means, strict=True)}
    record |= {"examples_per_second": count / seconds, "tokens_per_second": num_tokens / seconds}
    if run.world.is_main:
        with stop.if_unwritable():
            run.log.write(record)
        logger.info("eval after %d: %s", examples, format_metrics(record))
    if run.config.sample_during_eval:
        sample(run, step, examples, stop)
    run.log.restart_clock()


def sample(run: Run, step: int, examples: int, stop: StopRequest) -> None:
    """Samples of the policy and, before the first update, of the reference, to samples.jsonl."""
    assert run.eval is not None
    config, dataset = run.config, run.eval.data.dataset
    rows = dataset[run.eval.order.epoch_rows(0)[: config.n_eval_model_samples].tolist()]
    sources = {"policy": run.policy}
    if run.reference is not None and step == 0:
        sources["reference"] = run.reference
    samples: dict[str, list[str]] = {}
    for name, scorer in sources.items():
        responses = sample_responses(
            scorer,
            rows["prompt_ids"],
            run.tokenizer,
            max_length=min(config.max_length, scorer.num_positions or config.max_length),
            batch_size=config.eval_batch_size,
            seed=config.seed,
            world=run.world,
            stop=stop,
        )
        if responses is None:
            return
        samples[name] = responses
    if not run.world.is_main:
        return
    samples["prompt"] = run.tokenizer.batch_decode(rows["prompt_ids"])
    samples["chosen"] = run.tokenizer.batch_decode(rows["chosen_ids"], skip_special_tokens=True)
    records = [
        dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)
    ]
    with stop.if_unwritable():
        write_samples(run.run_dir / "samples.jsonl", step, examples, records)
    logger.info("a sample of the policy: %r -> %r", records[0]["prompt"], records[0]["policy"])
