"""Rows of a source as the two models read them: token ids under every template."""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastpref.batch import EncodedRow
from fastpref.data.chat import ChatFormat
from fastpref.data.counts import JOINED_ROWS, AuditCounts, check_counts, count_rows
from fastpref.data.layouts.row_values import RowError, json_text
from fastpref.data.layouts.rows import EMPTY_RESPONSE, MALFORMED
from fastpref.data.places import places_of
from fastpref.data.row_tokens import RowTokens, row_texts, tokenize_rows
from fastpref.data.source import Rows
from fastpref.errors import DataError
from fastpref.tisdpo.templates import apply_to_messages, apply_to_text

ROWS_AT_ONCE = 1000


class SourceTokens(NamedTuple):
    """The tokens of a source under every template."""

    rows: Rows
    """Those that there are tokens of."""
    by_template: dict[str, list[EncodedRow]]
    counts: AuditCounts


class _RowOutcome(NamedTuple):
    tokens: dict[str, EncodedRow]
    """By text of the template; without any the row is left out."""
    remarks: int = 0
    drop: str = ""
    note: str = ""


def encode_source(
    rows: Rows,
    templates: Sequence[str],
    chat: ChatFormat,
    *,
    include_eos: bool,
    on_error: str,
    strict: bool,
    max_dropped: float,
) -> SourceTokens:
    """Token ids of a source's rows as training sees them, without truncation.

    Args:
        templates: Texts that stand beside each prompt, the first of them "" for none.
        chat: How conversations are rendered; its tokenizer is that of both models.
        include_eos: Append EOS to both responses.
        on_error, strict, max_dropped: Of the options of these names.

    Raises:
        DataError: a row has no tokens under a template, or too many are left out.
        ConfigError: the chat template cannot render any conversation.
    """
    assert templates[0] == ""
    eos = [chat.tokenizer.eos_token_id] if include_eos else []
    outcomes: list[_RowOutcome] = []
    for start in range(0, len(rows.dataset), ROWS_AT_ONCE):
        for row, tokens in _tokenize_batch(rows, start, templates, chat, strict=strict):
            try:
                outcomes.append(_row_outcome(row, tokens, eos))
            except RowError as error:
                message = error.at(rows.place(len(outcomes)))
                if on_error == "raise":
                    raise DataError(message) from None
                outcomes.append(_RowOutcome({}, drop=MALFORMED, note=message))
            if strict and outcomes[-1].drop == EMPTY_RESPONSE:
                place = rows.place(len(outcomes) - 1)
                raise DataError(f"{place}: {EMPTY_RESPONSE} (data.strict=true)")
    counts, kept = _count_outcomes(rows, outcomes)
    check_counts(counts, max_dropped=max_dropped)
    if len(kept) < len(outcomes):
        rows = replace(rows, dataset=rows.dataset.select(kept))
    by_template = {text: [outcomes[i].tokens[text] for i in kept] for text in templates}
    return SourceTokens(rows, by_template, counts)


def _tokenize_batch(
    rows: Rows, start: int, templates: Sequence[str], chat: ChatFormat, *, strict: bool
) -> Iterator[tuple[dict[str, Any], dict[str, RowTokens | RowError]]]:
    """Rows from `start` on, each with its tokens by text of the template."""
    batch = rows.dataset[start : start + ROWS_AT_ONCE]
    records = [
        dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
    ]
    by_template = {}
    for text in templates:
        texts = [
            row_texts(
                row | {"prompt": prompt_under(text, row)},
                {"chosen": row["chosen"], "rejected": row["rejected"]},
                chat,
                strict=strict,
            )
            for row in records
        ]
        first = JOINED_ROWS if text else start
        by_template[text] = tokenize_rows(texts, chat.tokenizer, first=first)
    for i, row in enumerate(records):
        yield row, {text: tokens[i] for text, tokens in by_template.items()}


def prompt_under(text: str, row: dict[str, Any]) -> str:
    """The prompt of a checked row under a template's text."""
    if row["form"] != "chat":
        return apply_to_text(text, row["prompt"])
    return json_text(apply_to_messages(text, json.loads(row["prompt"])))


def _row_outcome(
    row: dict[str, Any], by_template: dict[str, RowTokens | RowError], eos: list[int]
) -> _RowOutcome:
    plain = by_template[""]
    encoded = {}
    for text, tokens in by_template.items():
        if isinstance(tokens, RowError):
            beside = f" (beside the template {text!r:.60})" if text else ""
            raise RowError(f"{tokens}{beside}", tokens.field)
        assert isinstance(plain, RowTokens)
        if tokens.drop:
            return _RowOutcome({}, drop=tokens.drop, note=tokens.note)
        if tokens.responses != plain.responses:
            raise RowError(
                f"beside the template {text!r:.60} the responses are other tokens than without it, "
                "so there is no weight for each of them"
            )
        parts = (tokens.prompt, *(response + eos for response in tokens.responses))
        # arrays: an eighth of the memory of lists
        encoded[text] = EncodedRow(*(array("i", part) for part in parts))
    assert isinstance(plain, RowTokens)
    return _RowOutcome(encoded, int(row["remarks"] | plain.remarks), note=plain.note)


def _count_outcomes(
    rows: Rows, outcomes: Sequence[_RowOutcome]
) -> tuple[AuditCounts, NDArray[np.int64]]:
    columns = rows.dataset.with_format("numpy")
    counts, kept = count_rows(
        split=rows.counts.split,
        source=rows.source,
        drop=[outcome.drop for outcome in outcomes],
        note=[outcome.note for outcome in outcomes],
        places=places_of(rows.location.files, columns["row"][:]),
        group=columns["group"][:],
        remarks=np.array([outcome.remarks for outcome in outcomes], dtype=np.int64),
    )
    lengths = np.array(
        [[len(part) for part in outcomes[i].tokens[""][:3]] for i in kept], dtype=np.int64
    ).reshape(-1, 3)
    is_text = columns["form"][:] != "chat"
    counts = replace(
        rows.counts.then(counts),
        prompt_tokens=int(lengths[:, 0].sum()),
        response_tokens=int(lengths[:, 1:].sum()),
        longest_tokens=int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max(initial=0)),
        text_rows=int(is_text[kept].sum()),
        joined_rows=int(is_text[kept[kept < JOINED_ROWS]].sum()),
    )
    return counts, kept
