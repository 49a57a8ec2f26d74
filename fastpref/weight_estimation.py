"""`task=estimate_weights`: token weights for TIS-DPO from a positive and a negative model.

A file's weight of response token y is log π⁻(y | …) - log π⁺(y | …), the TIS-DPO repository's sign
on both sides; the loader turns it into the weight that the loss takes (`token_weights`).

One model after the other scores all rows, shard by shard (`weight_shards`); the weights are written
once both are done.
"""

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastpref_kernels.gemm import cpu_multiplies_bfloat16
from numpy.typing import NDArray

from fastpref.batch import EncodedRow
from fastpref.chat import check_chat_template, read_chat_template, render_chat
from fastpref.complete_files import complete_file
from fastpref.config import Config, ModelConfig
from fastpref.datasets import SPLITS, Rows, find_source, read_rows
from fastpref.distributed import World, main_first
from fastpref.encode import tokenize, tokenizer_digest
from fastpref.encode_row import without_final_eos
from fastpref.errors import CheckpointError, DataError
from fastpref.model_identity import model_identity, side_model
from fastpref.model_paths import resolve_model
from fastpref.pretrained import load_model_tokenizer, read_vocab_size
from fastpref.role_templates import apply_to_messages, apply_to_text, template_text
from fastpref.row_cache import code_digest
from fastpref.rows import EMPTY_PROMPT, RowError
from fastpref.signals import StopRequest
from fastpref.token_weights import token_digest
from fastpref.weight_scoring import Side, score_missing
from fastpref.weight_shards import Shards
from fastpref.weights_file import ModelOrigin, WeightsOrigin, read_origin, write_origin
from fastpref.weights_html import write_html
from fastpref.weights_plot import plot_weights
from fastpref.weights_report import WeightsReport, read_report

logger = logging.getLogger("fastpref")

SCORING_CODE = (
    "packing.py",
    "role_templates.py",
    "weight_estimation.py",
    "weight_scoring.py",
    "weight_shards.py",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceJob:
    """One file of weights to write."""

    rows: Rows
    path: Path
    encoded: Sequence[EncodedRow]
    """Its rows without a template."""
    shards: dict[str, Shards]
    """By label of the side."""
    origin: WeightsOrigin


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
    sides = build_sides(config, world)
    tokenizer = shared_tokenizer(config, sides)
    splits = available_splits(config)
    quiet = not world.is_main

    def read() -> list[Rows]:
        return [rows for split in splits for rows in read_rows(config, split, quiet=quiet)]

    sources = main_first(world, "rows", read)
    jobs = [build_job(config, sides, rows, tokenizer) for rows in sources]
    unfinished = [job for job in jobs if not is_finished(job, world)]
    with StopRequest() as stop:
        # one model at a time: half the memory of the two together
        for side in sides:
            shards = [(job.rows, job.shards[side.label]) for job in unfinished]
            score_missing(config, world, side, tokenizer, shards, stop)
    if not world.is_main:
        return []
    for job in unfinished:
        write_weights(job, config.weights.round)
        logger.info("wrote %s: %d rows", job.path, len(job.rows.dataset))
    # the first split of each dataset, the one to train on where it is there
    first_jobs = {job.path.parent: job for job in reversed(jobs)}
    return [report_on(first_jobs[folder], tokenizer) for folder in reversed(first_jobs)]


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
        identity = world.share_from_main(model_identity(model) if world.is_main else "")
        text = template_text(template)
        origin = ModelOrigin(name_or_path=name, identity=identity, template=text)
        sides.append(Side(label=label, model=model, template=text, origin=origin))
    return sides


def scoring_precision(model: ModelConfig, world: World) -> ModelConfig:
    """The model in float32 where bfloat16 is the slower of the two as well as the less exact."""
    on_main = world.device.type == "cpu" and not cpu_multiplies_bfloat16()
    emulated = bool(world.share_from_main("yes" if on_main else ""))
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


def build_job(config: Config, sides: Sequence[Side], rows: Rows, tokenizer: Any) -> SourceJob:
    """Everything that is known of a weights file before a model is loaded.

    Raises:
        DataError: a row has no prompt token, or the chat template refuses it.
        CheckpointError: a token has no row in a model's embedding.
    """
    weights = config.weights
    chat_template = read_chat_template(config.data.chat_template)
    encoded = {
        text: encode_source(
            rows, tokenizer, text, chat_template=chat_template, include_eos=weights.include_eos
        )
        for text in {"", *(side.template for side in sides)}
    }
    path = Path(str(weights.output_dir)) / f"{rows.name}{weights.suffix}"
    path = path / f"{rows.counts.split}.jsonl"
    settings = scoring_settings(config, sides[0].model, rows, tokenizer, chat_template)
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
    )
    return SourceJob(rows=rows, path=path, encoded=encoded[""], shards=shards, origin=origin)


def scoring_settings(
    config: Config, model: ModelConfig, rows: Rows, tokenizer: Any, chat_template: str | None
) -> dict[str, Any]:
    """All that log-probabilities depend on beside the model: what a shard's folder is named by.

    Batches belong to it: another padding rounds differently, and one file has one rounding.
    """
    return {
        "rows": rows.fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": chat_template,
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


def shards_folder(path: Path) -> Path:
    """Where the shards of a weights file lie until it is written."""
    return path.with_name(f"{path.stem}.shards")


def is_finished(job: SourceJob, world: World) -> bool:
    """Whether the file is there with exactly these weights; said once."""
    finished = ""
    if world.is_main and job.path.is_file():
        try:
            origin = read_origin(job.path)
        except DataError:
            # a damaged record: the file is estimated anew
            origin = None
        if (
            origin is not None
            and origin.fingerprint == job.origin.fingerprint
            and origin.size_bytes == job.path.stat().st_size
        ):
            finished = "yes"
            logger.info("%s is there already, with these models and settings", job.path)
    return bool(world.share_from_main(finished))


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


def encode_source(
    rows: Rows, tokenizer: Any, text: str, *, chat_template: str | None, include_eos: bool
) -> list[EncodedRow]:
    """Token ids of a source's rows as training sees them, without truncation.

    Args:
        rows: The source.
        tokenizer: Of both models.
        text: Of the template that the model reads beside each prompt.
        chat_template: Jinja text, None for the tokenizer's own.
        include_eos: Append EOS to both responses.
    """
    texts: list[str] = []
    for row in rows.dataset:
        prompt, responses = row["prompt"], [row["chosen"], row["rejected"]]
        if row["form"] == "chat":
            check_chat_template(tokenizer, chat_template)
            messages = json.dumps(apply_to_messages(text, json.loads(prompt)))
            try:
                prompt, responses, _ = render_chat(messages, responses, tokenizer, chat_template)
            except RowError as error:
                raise DataError(error.at(rows.source, row["row"])) from None
        else:
            prompt = apply_to_text(text, prompt)
        texts += [prompt, *responses]
    ids = tokenize(tokenizer, texts)
    eos = [tokenizer.eos_token_id] if include_eos else []
    encoded = []
    for number, start in zip(rows.dataset["row"], range(0, len(ids), 3), strict=True):
        prompt_ids, *responses_ids = ids[start : start + 3]
        if not prompt_ids:
            raise DataError(f"{rows.source}:{number}:prompt: {EMPTY_PROMPT}")
        responses_ids = [
            without_final_eos(part, tokenizer.eos_token_id) + eos for part in responses_ids
        ]
        # arrays: an eighth of the memory of lists
        encoded.append(EncodedRow(*(array("i", x) for x in (prompt_ids, *responses_ids))))
    return encoded


def write_weights(job: SourceJob, decimals: int | None) -> None:
    """Write the rows with their weights and the record beside them, then drop the shards.

    The old file goes before the new record comes: no moment has one beside the other's.
    """
    good, bad = (job.shards[label].read() for label in ("positive", "negative"))
    complete = job.path.with_name(f"{job.path.name}.complete")
    with complete_file(complete) as lines:
        for i, row in enumerate(job.rows.dataset):
            chosen, rejected = (weigh(good[i][k], bad[i][k], decimals) for k in range(2))
            record = restore_row(row)
            record |= {"rejected_weight": rejected, "chosen_weight": chosen}
            record["weights_digest"] = digest_of(job.encoded[i], job.origin.includes_eos)
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    job.path.unlink(missing_ok=True)
    write_origin(job.path, replace(job.origin, size_bytes=complete.stat().st_size))
    complete.replace(job.path)
    shutil.rmtree(shards_folder(job.path), ignore_errors=True)


def digest_of(row: EncodedRow, includes_eos: bool) -> str:
    """`token_digest` of the tokens that training sees: without template, without EOS."""
    end = -1 if includes_eos else None
    return token_digest(row.prompt_ids, row.chosen_ids[:end], row.rejected_ids[:end])


def weigh(good: NDArray[np.float32], bad: NDArray[np.float32], decimals: int | None) -> list[float]:
    """log π⁻ - log π⁺ of each token, subtracted in float64, rounded as Python rounds."""
    weights = (bad.astype(np.float64) - good.astype(np.float64)).tolist()
    return weights if decimals is None else [round(weight, decimals) for weight in weights]


def restore_row(row: dict[str, Any]) -> dict[str, Any]:
    """A checked row in the form its file had: texts, whole dialogues, or messages."""
    fields = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    if row["form"] == "chat":
        return {name: json.loads(value) for name, value in fields.items()}
    if row["form"] == "hh":
        return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    return fields
