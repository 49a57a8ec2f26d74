"""`task=estimate_weights`: token weights for TIS-DPO from a positive and a negative model.

A file's weight of response token y is log π⁻(y | …) - log π⁺(y | …), the TIS-DPO repository's sign
on both sides; the loader turns it into the weight that the loss takes (`token_weights`).

One model after the other scores all rows, shard by shard (`weight_shards`); the weights are written
once both are done.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastpref_kernels.gemm import cpu_multiplies_bfloat16

from fastpref.batch import EncodedRow
from fastpref.config import Config, ModelConfig
from fastpref.data.cache import code_digest
from fastpref.data.chat import (
    ChatFormat,
    check_chat_template,
    prints_date,
    read_chat_template,
)
from fastpref.data.counts import log_audit
from fastpref.data.encode import TOKENIZING_CODE, log_missing_bos, tokenizer_digest
from fastpref.data.source import SPLITS, Rows, find_source, read_rows
from fastpref.data.weights_file import ModelOrigin, WeightsOrigin, read_origin, template_digest
from fastpref.distributed import World, main_first
from fastpref.errors import CheckpointError, DataError
from fastpref.model.identity import model_identity, side_model
from fastpref.model.paths import resolve_model
from fastpref.model.source import load_model_tokenizer, read_vocab_size
from fastpref.scoring.score import Side, score_missing
from fastpref.scoring.shards import Shards
from fastpref.signals import say_if_stopped
from fastpref.tisdpo.report import WeightsReport, read_report
from fastpref.tisdpo.report_html import write_html
from fastpref.tisdpo.report_plot import plot_weights
from fastpref.tisdpo.templates import template_text
from fastpref.tisdpo.weight_rows import (
    SourceJob,
    begin_date,
    encode_source,
    shards_folder,
    write_weights,
    written_date,
)

logger = logging.getLogger("fastpref")

SCORING_CODE = (
    *TOKENIZING_CODE,
    "packing.py",
    "role_templates.py",
    "weight_estimation.py",
    "weight_rows.py",
    "weight_scoring.py",
    "weight_shards.py",
)


def estimate_weights(config: Config, world: World) -> list[WeightsReport]:
    """Score every split of every dataset and write `<output_dir>/<name><suffix>/<split>.jsonl`.

    A run that was stopped goes on where it was; one whose file is there already does nothing.

    Returns:
        On rank 0 a report on each dataset, which is also written as `weights.html` and
        `weights.png` beside its files; on the others nothing.

    Raises:
        DataError: no split of a dataset is there, or a row breaks a rule.
        CheckpointError: a model is missing, the two do not share a vocabulary, or one of them
            gives numbers that are not finite.
        InterruptionError, PreemptionError: a signal came; complete shards stay.
    """
    with say_if_stopped("shards that are complete are kept; the same command goes on there"):
        return _estimate(config, world)


def _estimate(config: Config, world: World) -> list[WeightsReport]:
    sides = build_sides(config, world)
    tokenizer = shared_tokenizer(config, sides)
    splits = available_splits(config)
    quiet = not world.is_main

    def read() -> list[Rows]:
        return [rows for split in splits for rows in read_rows(config, split, quiet=quiet)]

    sources = main_first(world, read)
    jobs = [open_job(config, sides, rows, tokenizer, world) for rows in sources]
    if world.is_main:
        for job in jobs:
            log_audit(job.counts)
        log_missing_bos([job.counts for job in jobs], tokenizer)
    finished = world.on_main(lambda: [is_finished(job) for job in jobs])
    unfinished = [job for job, is_done in zip(jobs, finished, strict=True) if not is_done]
    reports: list[WeightsReport] = []

    def begin() -> None:
        for job, is_done in zip(jobs, finished, strict=True):
            if is_done:
                logger.info("%s is there already, with these models and settings", job.path)
            else:
                job.keep_date()

    def write() -> None:
        for job in unfinished:
            write_weights(job, config.weights.round)
            logger.info("wrote %s: %d rows", job.path, len(job.rows.dataset))
        # the first split of each dataset, the one to train on where it is there
        first_jobs = {job.path.parent: job for job in reversed(jobs)}
        reports.extend(report_on(first_jobs[folder], tokenizer) for folder in reversed(first_jobs))

    world.on_main(begin)
    # one model at a time: half the memory of the two together
    for side in sides:
        shards = [(job.rows, job.shards[side.label]) for job in unfinished]
        score_missing(config, world, side, tokenizer, shards)
    world.on_main(write)
    return reports


def report_on(job: SourceJob, tokenizer: Any) -> WeightsReport:
    """Read a weights file back and write its two pictures."""
    report = read_report(job.path, job.encoded, job.origin, tokenizer)
    write_html(report, job.path.with_name("weights.html"))
    plot_weights(report, job.path.with_name("weights.png"))
    logger.info("wrote %s and weights.png", job.path.with_name("weights.html"))
    return report


def build_sides(config: Config, world: World) -> list[Side]:
    """The positive and the negative model.

    Raises:
        CheckpointError: one of them is missing.
    """
    weights = config.weights
    assert weights.positive and weights.negative and weights.output_dir
    sides = []
    for label, name, template in (
        ("positive", weights.positive, weights.positive_template),
        ("negative", weights.negative, weights.negative_template),
    ):
        model = side_model(scoring_precision(config.model, world), name)
        resolve_model(model.name_or_path, key=f"weights.{label}")
        # gigabytes are read once, not by every rank
        identity = world.on_main(partial(model_identity, model))
        text = template_text(template)
        origin = ModelOrigin(name_or_path=name, identity=identity, template=text)
        sides.append(Side(label=label, model=model, template=text, origin=origin))
    return sides


def scoring_precision(model: ModelConfig, world: World) -> ModelConfig:
    """The model in float32 where bfloat16 is the slower of the two as well as the less exact."""
    on_cpu = world.device.type == "cpu"
    emulated = world.on_main(lambda: on_cpu and not cpu_multiplies_bfloat16())
    if not emulated or model.compute_dtype != "bfloat16":
        return model
    return replace(model, fsdp_policy_mp="float32")


def shared_tokenizer(config: Config, sides: Sequence[Side]) -> Any:
    """The tokenizer of both models.

    Raises:
        CheckpointError: their vocabularies differ, so their tokens cannot be compared.
    """
    positive, negative = (
        load_model_tokenizer(side.model, key=f"weights.{side.label}") for side in sides
    )
    if positive.get_vocab() != negative.get_vocab():
        raise CheckpointError(
            f"weights.negative: the tokenizer of {sides[1].origin.name_or_path} has another "
            f"vocabulary than that of weights.positive ({sides[0].origin.name_or_path})"
        )
    return positive


def available_splits(config: Config) -> list[str]:
    """The splits that every dataset has.

    Raises:
        DataError: none.
    """
    splits, errors = [], []
    for split in SPLITS:
        try:
            for name in config.datasets:
                find_source(name, split, config.base_data_dir)
            splits.append(split)
        except DataError as error:
            errors.append(error)
    if not splits:
        raise errors[0]
    return splits


def open_job(
    config: Config, sides: Sequence[Side], rows: Rows, tokenizer: Any, world: World
) -> SourceJob:
    """What is known of a weights file before a model is loaded, rendered for the day it belongs to.

    Where the chat template prints the date that is the day on which its estimation began: that of
    the file if it is there already, that of the shards of a run that was stopped, else today.

    Raises:
        DataError, ConfigError, CheckpointError: see `build_job`.
    """
    template = read_chat_template(config.data.chat_template)
    if rows.has_chats:
        check_chat_template(tokenizer, template)
    chat = ChatFormat(tokenizer=tokenizer, template=template)
    path = output_path(config, rows)
    if not (rows.has_chats and prints_date(tokenizer, template)):
        return build_job(config, sides, rows, chat, path)
    begun = world.on_main(partial(begin_date, path, chat))
    written = world.on_main(partial(written_date, path))
    job = build_job(config, sides, rows, replace(chat, date=written or begun), path)
    if written in ("", begun) or world.on_main(partial(is_finished, job)):
        return job
    return build_job(config, sides, rows, replace(chat, date=begun), path)


def output_path(config: Config, rows: Rows) -> Path:
    """The weights file of a source."""
    folder = Path(str(config.weights.output_dir)) / f"{rows.name}{config.weights.suffix}"
    return folder / f"{rows.counts.split}.jsonl"


def build_job(
    config: Config, sides: Sequence[Side], rows: Rows, chat: ChatFormat, path: Path
) -> SourceJob:
    """Everything that is known of a weights file before a model is loaded.

    Raises:
        DataError: a row has no prompt token, or the chat template refuses it.
        ConfigError: the chat template cannot render any conversation.
        CheckpointError: a token has no row in a model's embedding.
    """
    weights, data = config.weights, config.data
    rows, encoded, counts = encode_source(
        rows,
        list(dict.fromkeys(["", *(side.template for side in sides)])),
        chat,
        include_eos=weights.include_eos,
        on_error=data.on_error,
        strict=data.strict,
        max_dropped=data.max_dropped,
    )
    settings = scoring_settings(config, sides[0].model, rows, chat)
    prints, shards = {}, {}
    for side in sides:
        check_ids(rows, encoded[side.template], side)
        prints[side.label] = fingerprint([settings, side.origin.identity, side.template])
        folder = shards_folder(path) / f"{side.label}-{prints[side.label][:16]}"
        shards[side.label] = Shards.of(folder, encoded[side.template], weights.shard_rows)
    origin = WeightsOrigin(
        source=rows.source,
        rows=len(rows.dataset),
        tokens=sum(len(row.chosen_ids) + len(row.rejected_ids) for row in encoded[""]),
        includes_eos=weights.include_eos,
        round=weights.round,
        compute_dtype=sides[0].model.compute_dtype,
        tokenizer=settings["tokenizer"],
        positive=sides[0].origin,
        negative=sides[1].origin,
        fingerprint=fingerprint([prints, weights.round]),
        chat_date=chat.date,
        chat_template=template_digest(chat.template),
    )
    return SourceJob(
        rows=rows, path=path, encoded=encoded[""], counts=counts, shards=shards, origin=origin
    )


def scoring_settings(
    config: Config, model: ModelConfig, rows: Rows, chat: ChatFormat
) -> dict[str, Any]:
    """All that log-probabilities depend on beside the model: what a shard's folder is named by.

    Batches belong to it: another padding rounds differently, and one file has one rounding.
    """
    return {
        "rows": rows.fingerprint,
        "tokenizer": tokenizer_digest(chat.tokenizer),
        "chat_template": chat.template,
        "chat_date": chat.date,
        "include_eos": config.weights.include_eos,
        "compute_dtype": model.compute_dtype,
        "attention": model.attention,
        "batch_size": config.weights.batch_size,
        "packing": asdict(config.packing),
        "shard_rows": config.weights.shard_rows,
        "code": code_digest(*SCORING_CODE),
    }


def fingerprint(value: Any) -> str:
    """Digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_finished(job: SourceJob) -> bool:
    """Whether the file is there with exactly these weights."""
    if not job.path.is_file():
        return False
    try:
        origin = read_origin(job.path)
    except DataError:
        # a damaged record: the file is estimated anew
        return False
    return (
        origin is not None
        and origin.fingerprint == job.origin.fingerprint
        and origin.size_bytes == job.path.stat().st_size
    )


def check_ids(rows: Rows, encoded: Sequence[EncodedRow], side: Side) -> None:
    """Refuse tokens that have no row in a model's embedding, before it is loaded.

    Raises:
        CheckpointError: naming the file, the row and the token.
    """
    name = resolve_model(side.model.name_or_path, key=f"weights.{side.label}")
    vocab_size = read_vocab_size(name, side.model.revision)
    for row, ids in zip(rows.dataset["row"], encoded, strict=True):
        highest = max(int(part.max(initial=0)) for part in map(np.asarray, ids[:3]))
        if highest >= vocab_size:
            raise CheckpointError(
                f"weights.{side.label}: {rows.source}:{row} has token id {highest}, the embedding "
                f"of {side.origin.name_or_path} has {vocab_size} rows; the tokenizer belongs to "
                "another model"
            )
