"""Evaluation of the current policy on held-out rows: mean metrics and samples."""

import logging
import time
from typing import Any

import torch

from fastpref.batches.loader import StepBatches
from fastpref.heartbeat import await_device
from fastpref.memory.repetition import Repetition
from fastpref.model.own_reference import OwnReference
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import Metrics
from fastpref.signals import StopRequest
from fastpref.train.logs.metrics import (
    Record,
    format_metrics,
    name_for_split,
    peak_memory_gib,
    sum_over_examples,
)
from fastpref.train.non_finite import stop_if_not_finite
from fastpref.train.run import Run
from fastpref.train.sampling import sample_responses, write_samples
from fastpref.train.step import within_memory

logger = logging.getLogger("fastpref")


@torch.no_grad()
def evaluate(run: Run, stop: StopRequest) -> Record | None:
    """Evaluate the current policy on the held-out rows: one line of metrics.jsonl, and samples.

    Returns:
        The record of that line, on every rank; None if there are no held-out rows, the run was
        asked to stop before the end, or the samples could not be written.
    """
    if run.eval is None:
        return None
    step, examples = run.state.step, run.state.examples
    stop_if_not_finite(run, stop)
    with stop.if_unwritable():
        run.log.flush()
    started = time.perf_counter()
    metrics = list[Metrics]()
    count, num_tokens = 0, 0
    with run.eval.steps(run.world) as steps:
        for step_batches in steps:
            if stop.agreed(run.world):
                # a mean over part of the split would look like one over all of it
                return None
            of_step, _ = within_memory(
                run, run.eval, step_batches, lambda batches: held_out_metrics(run, batches)
            )
            metrics += of_step
            count += step_batches.num_examples
            num_tokens += step_batches.num_tokens
    names, sums = sum_over_examples(metrics)
    run.world.sum(sums)
    await_device(run.world)
    means = (sums / count).tolist()
    seconds = time.perf_counter() - started
    record: Record = {"step": step, "examples": examples, "split": "eval"}
    record |= {name_for_split(name, "eval"): mean for name, mean in zip(names, means, strict=True)}
    # lr is that of the next update, peak memory that of the run so far
    record |= {"lr": run.updates.lr, "peak_memory_gib": peak_memory_gib(run.world.device)}
    record |= {"examples_per_second": count / seconds, "tokens_per_second": num_tokens / seconds}
    if run.world.is_main:
        with stop.if_unwritable():
            run.log.write(record)
        logger.info("eval after %d: %s", examples, format_metrics(record))
    if run.config.sample_during_eval and not sample(run, stop):
        return None
    run.log.restart_clock()
    run.state.evaluated = step
    return record


def held_out_metrics(run: Run, step_batches: StepBatches) -> list[Metrics]:
    """Metrics of each micro-batch of held-out rows."""
    metrics = []
    for host_batch in step_batches.batches:
        batch = host_batch.to(run.world.device)
        _, values = run.step_loss.compute(batch, None)
        run.step_loss.done()
        metrics.append(values)
    return metrics


def sample(run: Run, stop: StopRequest) -> bool:
    """Sample from the policy and, before the first update, the reference, into samples.jsonl.

    Returns:
        False if the run was asked to stop before the end, or the file could not be written: the
        next start samples again.
    """
    assert run.eval is not None
    config, dataset = run.config, run.eval.data.dataset
    rows = dataset[run.eval.order.epoch_rows(0)[: config.n_eval_model_samples].tolist()]
    sources: dict[str, TokenScorer | OwnReference] = {"policy": run.policy}
    if run.reference is not None and run.state.step == 0:
        sources["reference"] = run.reference
    samples: dict[str, list[str]] = {}
    for name, scorer in sources.items():
        responses = sample_responses(
            scorer,
            rows["prompt_ids"],
            run.tokenizer,
            max_length=min(config.max_length, run.policy.num_positions or config.max_length),
            batch_size=config.eval_batch_size,
            seed=config.seed,
            world=run.world,
            stop=stop,
            repetition=Repetition(num_ranks=run.world.size, remedy="a smaller eval_batch_size"),
        )
        if responses is None:
            return False
        samples[name] = responses
    if run.world.is_main:
        with stop.if_unwritable():
            keep_samples(run, samples, rows)
    return not stop.agreed(run.world)


def keep_samples(run: Run, samples: dict[str, list[str]], rows: dict[str, Any]) -> None:
    """Write samples with the prompts and chosen responses of their rows, and log the first.

    Raises:
        CheckpointError: they cannot be written.
    """
    samples["prompt"] = run.tokenizer.batch_decode(rows["prompt_ids"])
    samples["chosen"] = run.tokenizer.batch_decode(rows["chosen_ids"], skip_special_tokens=True)
    records = [
        dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)
    ]
    write_samples(run.run_dir / "samples.jsonl", run.state.step, run.state.examples, records)
    logger.info("a sample of the policy: %r -> %r", records[0]["prompt"], records[0]["policy"])
