"""Encode checked rows into truncated token ids with token weights, and count the outcome.

Tokenization is in `row_tokens`; EOS, token weights and truncation of a row are in `encode_row`.
"""

import hashlib
import json
import logging
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow.compute as pc
import tokenizers
import transformers

from fastpref.data.cache import (
    cache_errors,
    code_digest,
    made_whole,
    processes_for,
    progress_bars,
    tokenizing_in,
    without_remains,
)
from fastpref.data.chat import check_chat_template, current_date, prints_date
from fastpref.data.counts import JOINED_ROWS, AuditCounts, check_counts, log_counts
from fastpref.data.encode_row import EncodedPair, EncodeOptions, encode_row, named_responses
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import EMPTY_RESPONSE, MALFORMED
from fastpref.data.options import DataOptions
from fastpref.data.places import Places, join_places, place_of, places_of
from fastpref.data.row_tokens import RowTokens, row_texts, tokenize_rows
from fastpref.data.source import Rows, count_dataset, read_rows, sft_targets
from fastpref.data.tokenizer_checks import (
    ID_COLUMNS,
    check_tokenizer,
    check_vocabulary,
    tokenizer_digest,
    unknown_id,
)
from fastpref.errors import DataError

logger = logging.getLogger("fastpref")

WEIGHT_COLUMNS = ("chosen_weights", "rejected_weights")
SCORED_COLUMNS = ("chosen_scored", "rejected_scored")
LIBRARIES = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
BOOKKEEPING = {
    "row": datasets.Value("int64"),
    "group": datasets.Value("int64"),
    "remarks": datasets.Value("int32"),
    "drop": datasets.Value("string"),
    "note": datasets.Value("string"),
    # tokens of the prompt and of each response with its EOS, before truncation
    "lengths": datasets.List(datasets.Value("int32")),
}


@dataclass(frozen=True, kw_only=True)
class PreferenceSplit:
    """An encoded split."""

    name: str
    dataset: datasets.Dataset
    """Columns prompt_ids, chosen_ids, rejected_ids (int32 lists; a response ends in EOS unless it
    was cut; rejected_ids is empty in SFT); for weighted losses chosen_weights, rejected_weights
    (float32 lists, one per response token). If a response of some row contains messages of others
    than the assistant: chosen_scored, rejected_scored (bool lists, whether each response token is
    in the loss; null: all are)."""
    groups: np.ndarray
    """Number of each row's prompt, by first appearance. (rows,) int64."""
    num_prompts: int
    """Prompts numbered, including those of dropped rows, which keep their place in the data order
    of the seed repositories."""
    audit: AuditCounts
    places: Places
    """File and line of each row."""
    sizes: tuple[int, ...]
    """Rows of each dataset; the rows of one are contiguous."""


def load_split(
    options: DataOptions, split: str, tokenizer: Any, *, vocab_size: int, quiet: bool
) -> PreferenceSplit:
    """Read, check and encode all datasets, one after another.

    Args:
        split: train or test.
        tokenizer: A transformers tokenizer.
        vocab_size: Rows of the model's embedding; every token id must be below.
        quiet: No progress bars and no log lines.

    Raises:
        DataError: a source is missing, a row breaks a rule, or too few rows are left.
        ConfigError: the tokenizer has no EOS, or no chat template for rows of messages.
    """
    parts = []
    for rows in read_rows(options, split, quiet=quiet):
        if not (quiet or rows.has_chats):
            for name in ("chat_template", "template_kwargs"):
                if getattr(options.encode, name):
                    logger.warning("data.%s: %s has no conversations to render", name, rows.source)
        num_proc = options.num_proc or processes_for(len(rows.dataset))
        with progress_bars(quiet), cache_errors(options.cache_dir):
            part = encode_rows(
                rows, tokenizer, options.encode, vocab_size=vocab_size, num_proc=num_proc
            )
        check_counts(part.audit, max_dropped=options.read.max_dropped)
        parts.append(part)
    joined = join_splits(parts)
    if not quiet:
        log_counts([joined.audit], tokenizer, about_texts=split == "train")
    return joined


def join_splits(parts: list[PreferenceSplit]) -> PreferenceSplit:
    """Concatenate sources to one split; equal prompts of different sources stay distinct."""
    groups, offset = [], 0
    for part in parts:
        groups.append(part.groups + offset)
        offset += part.num_prompts
    return PreferenceSplit(
        name=parts[0].name,
        dataset=datasets.concatenate_datasets([part.dataset for part in parts]),
        groups=np.concatenate(groups),
        num_prompts=offset,
        audit=reduce(operator.add, (part.audit for part in parts)),
        places=join_places([part.places for part in parts]),
        sizes=tuple(len(part.dataset) for part in parts),
    )


def encode_rows(
    rows: Rows, tokenizer: Any, options: EncodeOptions, *, vocab_size: int, num_proc: int = 1
) -> PreferenceSplit:
    """Encode one source, or take the result from the cache.

    Raises:
        DataError: a row breaks a rule (file:row: field), or a token id is not below `vocab_size`.
        ConfigError: the tokenizer has no EOS, or no chat template for rows of messages.
    """
    dataset, encoded = encode_source(rows, tokenizer, options, num_proc=num_proc)
    # on all rows (dropped ones are empty): a selection would copy gigabytes
    check_vocabulary(encoded, vocab_size, tokenizer)
    return as_split(rows, dataset, encoded, tokenizer)


def encode_source(
    rows: Rows, tokenizer: Any, options: EncodeOptions, *, num_proc: int = 1
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Encode one source, keeping the rows that encoding drops.

    Returns:
        The checked rows (in SFT only the `sft_targets`) and, row for row, the encoded ones;
        columns `FEATURES` and `encoded_features`.

    Raises:
        DataError, ConfigError: see `encode_rows`.
    """
    check_tokenizer(tokenizer)
    options = options_of_source(rows, tokenizer, options)
    dataset = sft_targets(rows.dataset) if options.sft else rows.dataset
    fingerprint = encoding_fingerprint(rows, tokenizer, options)

    def encode() -> datasets.Dataset:
        return dataset.map(
            encode_batch,
            batched=True,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "options": options, "files": rows.location.files},
            features=encoded_features(options),
            remove_columns=dataset.column_names,
            # None: in this process
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=fingerprint,
            desc=f"tokenizing {rows.name} {rows.counts.split}",
        )

    with tokenizing_in(num_proc), without_remains(dataset):
        if not dataset.cache_files:
            # rows in memory: nothing is cached
            return dataset, encode()
        sums = Path(dataset.cache_files[0]["filename"]).with_name(f"cache-{fingerprint}.sums")
        encoded = made_whole(sums, encode, files=f"cache-{fingerprint}*.arrow")
    return dataset, encoded


def options_of_source(rows: Rows, tokenizer: Any, options: EncodeOptions) -> EncodeOptions:
    """Complete the options by what depends on the source: which end of a long prompt is kept, the
    origin of its weights, the date that its chat template prints.

    Raises:
        ConfigError: no chat template for rows of messages.
    """
    if options.truncation_mode == "auto" and rows.name == "hh":
        options = replace(options, truncation_mode="keep_end")
    if options.weighted and rows.origin is not None:
        options = replace(
            options,
            weights_have_eos=rows.origin.includes_eos,
            weights_mismatch=rows.origin.explain_mismatch(
                tokenizer_digest(tokenizer), options.chat_template, options.template_kwargs
            ),
        )
    day, options = options.chat_date, replace(options, chat_date=None)
    if rows.has_chats:
        check_chat_template(tokenizer, options.chat_template, options.template_kwargs)
        if prints_date(tokenizer, options.chat_template):
            estimated = rows.origin.chat_date if rows.origin else None
            options = replace(options, chat_date=estimated or day or current_date(tokenizer))
    return options


def as_split(
    rows: Rows, dataset: datasets.Dataset, encoded: datasets.Dataset, tokenizer: Any
) -> PreferenceSplit:
    """Drop rows as encoding decided, and account for all of them."""
    counts, kept = count_dataset(encoded, rows.location, rows.counts.split)
    is_text = pc.not_equal(dataset.with_format("arrow")["form"][:], "chat").to_numpy()
    counts = replace(
        count_tokens(encoded, rows.counts.then(counts), tokenizer),
        text_rows=int(is_text[kept].sum()),
        joined_rows=int(is_text[kept[kept < JOINED_ROWS]].sum()),
    )
    if len(kept) < len(encoded):
        encoded = encoded.select(kept)
    return PreferenceSplit(
        name=counts.split,
        places=places_of(rows.location.files, encoded.with_format("numpy")["row"][:]),
        groups=encoded.with_format("numpy")["group"][:],
        num_prompts=rows.num_prompts,
        dataset=encoded.remove_columns([*BOOKKEEPING, *unused_columns(encoded)]),
        audit=counts,
        sizes=(len(encoded),),
    )


def unused_columns(encoded: datasets.Dataset) -> list[str]:
    """Those of `SCORED_COLUMNS` that are null in every row."""
    table = encoded.select_columns(list(SCORED_COLUMNS)).with_format("arrow")[:]
    return [name for name in SCORED_COLUMNS if table[name].null_count == len(table)]


def count_tokens(encoded: datasets.Dataset, counts: AuditCounts, tokenizer: Any) -> AuditCounts:
    """`counts` with the tokens of an encoded dataset filled in."""
    table = encoded.with_format("arrow")[:]
    prompt, chosen, rejected = (
        pc.list_value_length(table[column]).to_numpy() for column in ID_COLUMNS
    )
    num_unknown, unknown = 0, unknown_id(tokenizer)
    if unknown is not None:
        ids = (pc.list_flatten(table[column]) for column in ID_COLUMNS)
        num_unknown = sum(pc.sum(pc.equal(x, unknown)).as_py() or 0 for x in ids)
    return replace(
        counts,
        unknown_tokens=num_unknown,
        prompt_tokens=int(prompt.sum()),
        response_tokens=int(chosen.sum() + rejected.sum()),
        longest_tokens=int((prompt + np.maximum(chosen, rejected)).max(initial=0)),
    )


def encoded_features(options: EncodeOptions) -> datasets.Features:
    """Columns of an encoded dataset, including those for the audit."""
    features: dict[str, Any] = {
        column: datasets.List(datasets.Value("int32")) for column in ID_COLUMNS
    }
    if options.weighted:
        features |= {column: datasets.List(datasets.Value("float32")) for column in WEIGHT_COLUMNS}
    features |= {column: datasets.List(datasets.Value("bool")) for column in SCORED_COLUMNS}
    return datasets.Features(features | BOOKKEEPING)


def encoding_fingerprint(rows: Rows, tokenizer: Any, options: EncodeOptions) -> str:
    """Cache key: equal only for equal rows, tokenizer, options, code and library versions."""
    used = asdict(options)
    if not (options.weighted and options.transform_method == "random"):
        del used["seed"]
    if not options.weighted:
        del used["transform_method"], used["transform_params"], used["eos_weight"]
    key = [
        rows.fingerprint,
        tokenizer_digest(tokenizer),
        used,
        code_digest("data"),
        LIBRARIES,
    ]
    # `datasets` allows 64 characters and appends a suffix for each process
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]


def encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: Any,
    options: EncodeOptions,
    files: Sequence[str],
) -> dict[str, list[Any]]:
    """Encode a batch of `datasets.map`. Columns in and out: `FEATURES`, `encoded_features`."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    chat = options.chat(tokenizer)
    texts = [
        row_texts(row, named_responses(row, options), chat, strict=options.strict) for row in rows
    ]
    encoded = []
    tokens_of_rows = tokenize_rows(texts, tokenizer, first=indices[0])
    for row, tokens in zip(rows, tokens_of_rows, strict=True):
        place = place_of(files, row["row"])
        outcome = _encode_or_drop(row, tokens, tokenizer, options, place)
        encoded.append(outcome.columns() | {"row": row["row"], "group": row["group"]})
    return {column: [row[column] for row in encoded] for column in encoded_features(options)}


def _encode_or_drop(
    row: dict[str, Any],
    tokens: RowTokens | RowError,
    tokenizer: Any,
    options: EncodeOptions,
    place: str,
) -> EncodedPair:
    try:
        if isinstance(tokens, RowError):
            raise tokens
        outcome = encode_row(row, tokens, tokenizer, options)
    except RowError as error:
        message = error.at(place)
        if options.on_error == "raise":
            raise DataError(message) from None
        return EncodedPair(drop=MALFORMED, note=message)
    if options.strict and outcome.drop == EMPTY_RESPONSE:
        raise DataError(f"{place}: {outcome.drop} (data.strict=true)")
    return outcome
