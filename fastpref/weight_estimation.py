"""`task=estimate_weights`: token weights for TIS-DPO from a positive and a negative model.

A file's weight of response token y is log π⁻(y | …) - log π⁺(y | …), the TIS-DPO repository's sign
on both sides; the loader turns it into the weight that the loss takes (`token_weights`).
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastpref.assembly import load_scorer
from fastpref.batch import EncodedRow, pad_rows
from fastpref.chat import check_chat_template, read_chat_template, render_chat
from fastpref.config import Config
from fastpref.datasets import SPLITS, Rows, find_source, read_rows
from fastpref.distributed import World, main_first
from fastpref.encode import tokenize
from fastpref.encode_row import without_final_eos
from fastpref.errors import CheckpointError, DataError
from fastpref.pretrained import load_tokenizer, pad_token_id, resolve_model
from fastpref.progress import Progress
from fastpref.rows import EMPTY_PROMPT
from fastpref.token_weights import weights_sidecar

logger = logging.getLogger("fastpref")

ROLE_SENTENCES = {
    "normal": "",
    "harmless": "You are a considerate assistant whose answers are helpful and harmless.",
    "harmful": "You are a careless assistant whose answers are unhelpful and harmful.",
}
"""Contrastive prompting (TIS-DPO(P)): what stands before the prompt."""

TokenWeights = tuple[list[float], list[float]]
"""Of one row: chosen, rejected; one value per response token, EOS left out, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSide:
    """One of the two models and the role sentence its prompts begin with."""

    name_or_path: str
    template: str


def estimate_weights(config: Config, world: World) -> None:
    """Score every split of every dataset and write `<output_dir>/<name><suffix>/<split>.jsonl`.

    Raises:
        DataError: no split of a dataset is there, or a row breaks a rule.
        CheckpointError: a model is missing, or the two do not share a vocabulary.
    """
    weights = config.weights
    assert weights.positive and weights.negative and weights.output_dir
    sides = {
        "positive": ModelSide(name_or_path=weights.positive, template=weights.positive_template),
        "negative": ModelSide(name_or_path=weights.negative, template=weights.negative_template),
    }
    tokenizer = shared_tokenizer(config, sides)
    splits = available_splits(config)
    quiet = not world.is_main

    def read() -> list[Rows]:
        return [rows for split in splits for rows in read_rows(config, split, quiet=quiet)]

    sources = main_first(world, "rows", read)
    # one model at a time: half the memory of the two together
    logps = {
        label: score_sources(config, world, label, side, tokenizer, sources)
        for label, side in sides.items()
    }
    if not world.is_main:
        return
    for index, rows in enumerate(sources):
        folder = Path(weights.output_dir) / f"{rows.name}{weights.suffix}"
        path = folder / f"{rows.counts.split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        origin = {
            "source": rows.source,
            "compute_dtype": config.model.compute_dtype,
            **{label: dataclasses.asdict(side) for label, side in sides.items()},
        }
        weights_sidecar(path).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        write_weighted_rows(path, rows, logps["positive"][index], logps["negative"][index])
        logger.info("wrote %s: %d rows", path, len(rows.dataset))


def shared_tokenizer(config: Config, sides: dict[str, ModelSide]) -> Any:
    """The tokenizer of both models.

    Raises:
        CheckpointError: their vocabularies differ, so their tokens cannot be compared.
    """
    positive, negative = (
        load_tokenizer(resolve_model(side.name_or_path, key=f"weights.{label}"))
        for label, side in sides.items()
    )
    if positive.get_vocab() != negative.get_vocab():
        raise CheckpointError(
            f"weights.negative: the tokenizer of {sides['negative'].name_or_path} has another "
            f"vocabulary than that of weights.positive ({sides['positive'].name_or_path})"
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


@torch.no_grad()
def score_sources(
    config: Config,
    world: World,
    label: str,
    side: ModelSide,
    tokenizer: Any,
    sources: Sequence[Rows],
) -> list[list[TokenWeights]]:
    """Per source and row, the log-probabilities of the response tokens under one model, in nats."""
    model = replace(config.model, name_or_path=side.name_or_path, archive=None)
    scorer = load_scorer(model, world, trainable=False)
    encoded = [encode_source(rows, tokenizer, side.template, config) for rows in sources]
    size = config.weights.batch_size * world.size
    num_batches = sum(-(-len(rows) // size) for rows in encoded)
    scored = []
    with Progress(total=num_batches, visible=world.is_main, label=f"{label} model") as progress:
        for rows in encoded:
            scores: list[TokenWeights] = [([], []) for _ in rows]
            # rows of like length share a batch: little padding
            order = np.argsort([sum(map(len, row[:3])) for row in rows], kind="stable")
            for start in range(0, len(rows), size):
                mine = np.array_split(order[start : start + size], world.size)[world.rank]
                batch = pad_rows([rows[i] for i in mine], pad_token_id=pad_token_id(tokenizer))
                logps_N = scorer(batch.to(world.device)).cpu()
                lengths = [len(rows[i].chosen_ids) for i in mine]
                lengths += [len(rows[i].rejected_ids) for i in mine]
                parts = [part.tolist() for part in logps_N.split(lengths)]
                for place, i in enumerate(mine):
                    scores[i] = (parts[place], parts[place + len(mine)])
                progress.advance()
            scored.append(gather_scores(scores, world))
    return scored


def gather_scores(scores: list[TokenWeights], world: World) -> list[TokenWeights]:
    """Every rank's rows together: a row was scored by one rank and is empty on the others."""
    if world.size == 1:
        return scores
    gathered: list[list[TokenWeights]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, scores)
    return [
        max(candidates, key=lambda row: len(row[0])) for candidates in zip(*gathered, strict=True)
    ]


def encode_source(rows: Rows, tokenizer: Any, template: str, config: Config) -> list[EncodedRow]:
    """Token ids of a source's rows as training sees them, without EOS and without truncation."""
    sentence = ROLE_SENTENCES[template]
    chat_template = read_chat_template(config.data.chat_template)
    texts: list[str] = []
    for row in rows.dataset:
        prompt, responses = row["prompt"], [row["chosen"], row["rejected"]]
        if row["form"] == "chat":
            check_chat_template(tokenizer, chat_template)
            messages = json.loads(prompt)
            if sentence:
                messages = [{"role": "system", "content": sentence}, *messages]
            prompt, responses, _ = render_chat(
                json.dumps(messages), responses, tokenizer, chat_template
            )
        elif sentence:
            prompt = f"{sentence}\n\n{prompt}"
        texts += [prompt, *responses]
    ids = tokenize(tokenizer, texts)
    encoded = []
    for row, start in zip(rows.dataset, range(0, len(ids), 3), strict=True):
        prompt_ids, *responses_ids = ids[start : start + 3]
        if not prompt_ids:
            raise DataError(f"{rows.source}:{row['row']}:prompt: {EMPTY_PROMPT}")
        responses_ids = [without_final_eos(part, tokenizer.eos_token_id) for part in responses_ids]
        encoded.append(EncodedRow(prompt_ids, *responses_ids))
    return encoded


def write_weighted_rows(
    path: Path, rows: Rows, positive: list[TokenWeights], negative: list[TokenWeights]
) -> None:
    """Write the rows with their weights; the file appears under its name when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for row, good, bad in zip(rows.dataset, positive, negative, strict=True):
            chosen_weight, rejected_weight = (
                (np.array(bad[i]) - np.array(good[i])).tolist() for i in range(2)
            )
            record = restore_row(row)
            record |= {"rejected_weight": rejected_weight, "chosen_weight": chosen_weight}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.rename(path)


def restore_row(row: dict[str, Any]) -> dict[str, Any]:
    """A checked row in the form its file had: texts, whole dialogues, or messages."""
    fields = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    if row["form"] == "chat":
        return {name: json.loads(value) for name, value in fields.items()}
    if row["form"] == "hh":
        return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    return fields
