"""Token ids of a source's rows as the two models read them, under every template."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import datasets

from fastpref.batch import EncodedRow
from fastpref.data.counts import JOINED_ROWS, AuditCounts, check_counts
from fastpref.data.encode import SCORED_COLUMNS, as_split, encode_batch, encoded_features
from fastpref.data.encode_row import EncodeOptions
from fastpref.data.layouts.row_values import json_text
from fastpref.data.layouts.rows import MALFORMED
from fastpref.data.places import place_of
from fastpref.data.source import Rows
from fastpref.data.tokenizer_checks import ID_COLUMNS
from fastpref.errors import DataError
from fastpref.tisdpo.templates import apply_to_messages, apply_to_text

ROWS_AT_ONCE = 1000
Columns = dict[str, list[Any]]
"""Encoded rows, see `encoded_features`."""


class SourceTokens(NamedTuple):
    """The tokens of a source under every template."""

    rows: Rows
    """The rows that were not dropped."""
    by_template: dict[str, list[EncodedRow]]
    """Tokens of these rows, by the template's text."""
    counts: AuditCounts


def encode_under_templates(
    rows: Rows,
    templates: Sequence[str],
    tokenizer: Any,
    options: EncodeOptions,
    *,
    include_eos: bool,
    max_dropped: float,
) -> SourceTokens:
    """Encode a source's rows as training would, once per template.

    Args:
        templates: Texts added to each prompt; the first is "", for none.
        tokenizer: The tokenizer of both models.
        options: Encoding options of training on whole pairs, without truncation.
        include_eos: Keep EOS at the end of both responses.
        max_dropped: See `check_counts`.

    Raises:
        DataError: a row cannot be encoded under a template, or too many are dropped.
        ConfigError: the chat template cannot render any conversation.
    """
    assert templates[0] == ""
    by_template: dict[str, list[EncodedRow]] = {text: [] for text in templates}
    parts, kept = [], list[int]()
    for start in range(0, len(rows.dataset), ROWS_AT_ONCE):
        batch = rows.dataset[start : start + ROWS_AT_ONCE]
        plain = encode_batch(batch, [start], tokenizer, options, rows.location.files)
        encoded = {"": plain}
        for text in templates[1:]:
            encoded[text] = _encode_beside(text, batch, plain, tokenizer, options, rows)
        places = [i for i, reason in enumerate(plain["drop"]) if not reason]
        kept += [start + i for i in places]
        scored = _scored_responses(plain, include_eos=include_eos)
        for text, columns in encoded.items():
            if not include_eos:
                for name in ID_COLUMNS[1:]:
                    columns[name] = [ids[:-1] for ids in columns[name]]
            # arrays take an eighth of the memory of lists
            by_template[text] += [
                EncodedRow(*(array("i", columns[name][i]) for name in ID_COLUMNS), **scored[i])
                for i in places
            ]
        parts.append(datasets.Dataset.from_dict(plain, features=encoded_features(options)))
    counts = as_split(rows, rows.dataset, datasets.concatenate_datasets(parts), tokenizer).audit
    check_counts(counts, max_dropped=max_dropped)
    if len(kept) < len(rows.dataset):
        rows = replace(rows, dataset=rows.dataset.select(kept))
    return SourceTokens(rows, by_template, counts)


def _scored_responses(columns: Columns, *, include_eos: bool) -> list[dict[str, Any]]:
    """Per row, masks of the response tokens that are in the loss: others get a weight of 0."""
    end = None if include_eos else -1
    rows = zip(*(columns[name] for name in SCORED_COLUMNS), strict=True)
    return [
        {
            name: None if marks is None else array("b", marks[:end])
            for name, marks in zip(SCORED_COLUMNS, row, strict=True)
        }
        for row in rows
    ]


def _encode_beside(
    text: str, batch: Columns, plain: Columns, tokenizer: Any, options: EncodeOptions, rows: Rows
) -> Columns:
    """Encode a batch of rows under a template. Rows that fail, or whose responses get other tokens
    than in `plain`, the same batch without the template, are marked as dropped there."""
    forms = zip(batch["form"], batch["prompt"], strict=True)
    encoded = encode_batch(
        batch | {"prompt": [prompt_under(text, form, prompt) for form, prompt in forms]},
        [JOINED_ROWS],
        tokenizer,
        replace(options, on_error="skip"),
        rows.location.files,
    )
    for i, number in enumerate(batch["row"]):
        drop, note = encoded["drop"][i], encoded["note"][i]
        if plain["drop"][i]:
            continue
        if drop == MALFORMED:
            note += f" (beside the template {text!r:.60})"
        elif not drop and any(encoded[name][i] != plain[name][i] for name in ID_COLUMNS[1:]):
            drop = MALFORMED
            note = (
                f"{place_of(rows.location.files, number)}: beside the template {text!r:.60} the "
                "responses are other tokens than without it, so there is no weight for each of them"
            )
        if drop == MALFORMED and options.on_error == "raise":
            raise DataError(note)
        if drop:
            plain["drop"][i], plain["note"][i] = drop, note
    return encoded


def prompt_under(text: str, form: str, prompt: str) -> str:
    """The prompt of a checked row under a template's text."""
    if form != "chat":
        return apply_to_text(text, prompt)
    return json_text(apply_to_messages(text, json.loads(prompt)))
