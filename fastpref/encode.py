"""Checked rows + tokenizer -> token ids, truncated, with token weights and the audit counts.

Prompt and responses are tokenized separately and without special tokens, EOS is appended to the
responses: the tokenization of the DPO, TDPO and TIS-DPO repositories.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc
import transformers

from fastpref.chat import check_chat_template, read_chat_template
from fastpref.counts import AuditCounts, check_counts, format_audit
from fastpref.datasets import MALFORMED, Rows, count_dataset, read_rows
from fastpref.encode_row import EncodedPair, EncodeOptions, encode_row, row_texts
from fastpref.errors import ConfigError, DataError
from fastpref.row_cache import cache_errors, code_digest, progress_bars
from fastpref.rows import RowError

if TYPE_CHECKING:
    from fastpref.config import Config

logger = logging.getLogger("fastpref")

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
WEIGHT_COLUMNS = ("chosen_weights", "rejected_weights")
ENCODING_CODE = ("chat.py", "encode.py", "encode_row.py", "token_weights.py")
BOOKKEEPING = {
    "row": datasets.Value("int64"),
    "group": datasets.Value("int64"),
    "remarks": datasets.Value("int32"),
    "drop": datasets.Value("string"),
    "note": datasets.Value("string"),
}


@dataclass(frozen=True, kw_only=True)
class PreferenceSplit:
    """An encoded split."""

    name: str
    dataset: datasets.Dataset
    """Columns prompt_ids, chosen_ids, rejected_ids (int32 lists; a response ends in EOS unless it
    was cut; rejected_ids is empty in SFT), and where the loss is weighted chosen_weights,
    rejected_weights (float32 lists, one per response token)."""
    groups: np.ndarray
    """Number of each row's prompt, ascending by first appearance. (rows,) int64."""
    audit: AuditCounts


def load_split(
    config: "Config", split: str, tokenizer: Any, *, vocab_size: int, quiet: bool
) -> PreferenceSplit:
    """Read, check and encode all datasets of a config, one after another.

    Args:
        config: The run's options.
        split: train or test.
        tokenizer: Of transformers.
        vocab_size: Rows of the model's embedding: no token id may reach it.
        quiet: Neither progress bars nor log lines.

    Raises:
        DataError: a source is missing, a row breaks a rule, or too few rows are left.
        ConfigError: the tokenizer has no EOS, or no chat template for rows of messages.
    """
    options = EncodeOptions(
        sft=not config.loss.needs.pairs,
        weighted=config.loss.needs.weights,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.data.truncation,
        truncation_mode=config.data.truncation_mode,
        reverse_dataset=config.reverse_dataset,
        eos_weight=config.data.eos_weight,
        transform_method=config.transform.method,
        transform_params=config.transform.params(),
        seed=config.seed,
        chat_template=read_chat_template(config.data.chat_template),
        on_error=config.data.on_error,
        strict=config.data.strict,
    )
    parts = []
    for rows in read_rows(config, split, quiet=quiet):
        with progress_bars(quiet), cache_errors(config.data.cache_dir):
            part = encode_rows(rows, tokenizer, options, vocab_size=vocab_size)
        check_counts(part.audit, max_dropped=config.data.max_dropped)
        parts.append(part)
    joined = join_splits(parts)
    if not quiet:
        facts, warnings = format_audit(joined.audit)
        for line in facts:
            logger.info(line)
        for line in warnings:
            logger.warning(line)
    return joined


def join_splits(parts: list[PreferenceSplit]) -> PreferenceSplit:
    """Several sources as one split; equal prompts of different sources stay different prompts."""
    groups, audit, offset = [], parts[0].audit, 0
    for index, part in enumerate(parts):
        groups.append(part.groups + offset)
        offset += int(part.groups.max(initial=-1)) + 1
        audit = audit + part.audit if index else audit
    return PreferenceSplit(
        name=parts[0].name,
        dataset=datasets.concatenate_datasets([part.dataset for part in parts]),
        groups=np.concatenate(groups),
        audit=audit,
    )


def encode_rows(
    rows: Rows, tokenizer: Any, options: EncodeOptions, *, vocab_size: int
) -> PreferenceSplit:
    """Encode one source, or take the result of an earlier run from the cache.

    Raises:
        DataError: a row breaks a rule (file:row: field), or a token id reaches `vocab_size`.
        ConfigError: the tokenizer has no EOS, or no chat template for rows of messages.
    """
    check_tokenizer(tokenizer)
    if options.truncation_mode == "auto" and rows.name == "hh":
        options = replace(options, truncation_mode="keep_end")
    if options.weighted and rows.origin is not None:
        options = replace(
            options,
            weights_have_eos=rows.origin.includes_eos,
            weights_mismatch=rows.origin.explain_mismatch(tokenizer_digest(tokenizer)),
        )
    dataset = sft_targets(rows.dataset) if options.sft else rows.dataset
    if pc.any(pc.equal(dataset.with_format("arrow")["form"][:], "chat")).as_py():
        check_chat_template(tokenizer, options.chat_template)
    encoded = dataset.map(
        encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "options": options, "source": rows.source},
        features=encoded_features(options),
        remove_columns=dataset.column_names,
        new_fingerprint=encoding_fingerprint(rows, tokenizer, options),
        desc=f"tokenizing {rows.name} {rows.counts.split}",
    )
    # on all rows, dropped ones being empty: a selection of gigabytes would have to be copied
    check_vocabulary(encoded, vocab_size, tokenizer)
    counts, kept = count_dataset(encoded, rows.source, rows.counts.split)
    counts = count_tokens(encoded, rows.counts.then(counts))
    if len(kept) < len(encoded):
        encoded = encoded.select(kept)
    return PreferenceSplit(
        name=counts.split,
        groups=encoded.with_format("numpy")["group"][:],
        dataset=encoded.remove_columns(list(BOOKKEEPING)),
        audit=counts,
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer without an end-of-sequence token: no response could ever end.

    Raises:
        ConfigError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.tokenizer_name_or_path: the tokenizer has no end-of-sequence token; set "
            "eos_token in its tokenizer_config.json or name another tokenizer"
        )


def check_vocabulary(encoded: datasets.Dataset, vocab_size: int, tokenizer: Any) -> None:
    """Refuse token ids that have no row in the embedding.

    Raises:
        DataError: naming the token.
    """
    table = encoded.with_format("arrow")[:]
    for column in ID_COLUMNS:
        highest = pc.max(pc.list_flatten(table[column])).as_py()
        if highest is not None and highest >= vocab_size:
            raise DataError(
                f"datasets: token id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) is "
                f"not in the model's embedding of {vocab_size} rows; the tokenizer belongs to "
                "another model"
            )


def count_tokens(encoded: datasets.Dataset, counts: AuditCounts) -> AuditCounts:
    """`counts` with the tokens of an encoded dataset filled in."""
    table = encoded.with_format("arrow")[:]
    prompt, chosen, rejected = (
        pc.list_value_length(table[column]).to_numpy() for column in ID_COLUMNS
    )
    return replace(
        counts,
        prompt_tokens=int(prompt.sum()),
        response_tokens=int(chosen.sum() + rejected.sum()),
        longest_tokens=int((prompt + np.maximum(chosen, rejected)).max(initial=0)),
    )


def sft_targets(dataset: datasets.Dataset) -> datasets.Dataset:
    """The last row of each prompt, in the order in which prompts appear first."""
    groups = dataset.with_format("numpy")["group"][:]
    _, index_from_end = np.unique(groups[::-1], return_index=True)
    return dataset.select(len(groups) - 1 - index_from_end)


def encoded_features(options: EncodeOptions) -> datasets.Features:
    """Columns of an encoded dataset, those for the audit included."""
    features: dict[str, Any] = {
        column: datasets.List(datasets.Value("int32")) for column in ID_COLUMNS
    }
    if options.weighted:
        features |= {column: datasets.List(datasets.Value("float32")) for column in WEIGHT_COLUMNS}
    return datasets.Features(features | BOOKKEEPING)


def encoding_fingerprint(rows: Rows, tokenizer: Any, options: EncodeOptions) -> str:
    """Name of the cache entry: equal for equal rows, tokenizer, options and code only."""
    used = asdict(options)
    if not (options.weighted and options.transform_method == "random"):
        del used["seed"]
    if not options.weighted:
        del used["transform_method"], used["transform_params"], used["eos_weight"]
    key = [
        rows.fingerprint,
        tokenizer_digest(tokenizer),
        used,
        code_digest(*ENCODING_CODE),
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of all that a tokenizer's output depends on; calls to it leave no trace in it."""
    if tokenizer.is_fast:
        # before it stand truncation and padding, which the last call has set
        _, _, model = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
        model = json.dumps([type(tokenizer).__name__, tokenizer.name_or_path, vocabulary])
    facts = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], default=str)
    return hashlib.sha256((model + facts).encode()).hexdigest()


def encode_batch(
    batch: dict[str, list[Any]], tokenizer: Any, options: EncodeOptions, source: str
) -> dict[str, list[Any]]:
    """Encode a batch of `datasets.map`. Columns in and out: `FEATURES`, `encoded_features`."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    texts = [row_texts(row, tokenizer, options) for row in rows]
    # one call for all texts: the tokenizer spreads them over its threads
    ids = iter(tokenize(tokenizer, [text for row in texts for text in row.texts]))
    encoded = []
    for row, rendered in zip(rows, texts, strict=True):
        row_ids = [next(ids) for _ in rendered.texts]
        try:
            outcome = encode_row(row, rendered, row_ids, tokenizer, options)
        except RowError as error:
            message = error.at(source, row["row"])
            if options.on_error == "raise":
                raise DataError(message) from None
            outcome = EncodedPair(drop=MALFORMED, note=message)
        encoded.append(outcome.columns() | {"row": row["row"], "group": row["group"]})
    return {column: [row[column] for row in encoded] for column in encoded_features(options)}


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text by itself, special tokens only where the text spells them."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]
