"""The account of a split's rows: kept, dropped and why, truncated, suspicious."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from fastpref.checks import listed, share_of
from fastpref.data.layouts.rows import MALFORMED
from fastpref.data.places import Places
from fastpref.data.remarks import ORDINARY, REMARK_TEXTS, Remark
from fastpref.data.selection import COPY
from fastpref.errors import DataError

logger = logging.getLogger("fastpref")

PROMPT_COLUMNS = (
    *("system", "system_prompt", "history", "context", "input", "image", "images", "tools"),
    "chat_template_kwargs",
)
"""Columns that may belong to the prompt: warned about if not read."""
MAX_IDENTICAL = 0.5
"""Largest share of pairs that may have equal responses."""
JOINED_ROWS = 1000
"""Rows at the start of each source that are checked for `Remark.JOINED_DIFFERS`."""

Key = TypeVar("Key")


@dataclass(kw_only=True)
class AuditCounts:
    """The account of one split. Counts are rows unless the name says tokens."""

    split: str
    sources: list[str]
    """Files or hub ids, in the order of `datasets`."""
    rows: int
    """Rows read."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> place of the first such row, or its error message."""
    kept: int = 0
    """Pairs left to train on, or examples in SFT."""
    prompts: int = 0
    """Distinct prompts of kept rows."""
    remarks: dict[Remark, int] = field(default_factory=dict)
    """Remark -> number of kept rows that have it."""
    first_remarks: dict[Remark, str] = field(default_factory=dict)
    """Remark -> place of the first such row."""
    prompt_tokens: int = 0
    response_tokens: int = 0
    """Sums over kept rows; both responses of a pair count."""
    longest_tokens: int = 0
    """Longest prompt + response in tokens."""
    unknown_tokens: int = 0
    """Unknown tokens of kept rows, see `Remark.UNKNOWN`."""
    text_rows: int = 0
    """Kept rows of plain texts, not messages."""
    joined_rows: int = 0
    """Text rows that were checked for `Remark.JOINED_DIFFERS`."""
    unread: dict[str, list[str]] = field(default_factory=dict)
    """Source -> columns with values that are not read, in the order of their first values."""

    def then(self, later: "AuditCounts") -> "AuditCounts":
        """Combine this account of reading with the later account of encoding the kept rows."""
        return replace(
            later,
            rows=self.rows,
            dropped=_summed(self.dropped, later.dropped),
            first_dropped=later.first_dropped | self.first_dropped,
            unread=self.unread,
        )

    def __add__(self, other: "AuditCounts") -> "AuditCounts":
        """The account of two sources of one split together."""
        return AuditCounts(
            split=self.split,
            sources=self.sources + other.sources,
            rows=self.rows + other.rows,
            dropped=_summed(self.dropped, other.dropped),
            first_dropped=other.first_dropped | self.first_dropped,
            kept=self.kept + other.kept,
            prompts=self.prompts + other.prompts,
            remarks=_summed(self.remarks, other.remarks),
            first_remarks=other.first_remarks | self.first_remarks,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            response_tokens=self.response_tokens + other.response_tokens,
            longest_tokens=max(self.longest_tokens, other.longest_tokens),
            unknown_tokens=self.unknown_tokens + other.unknown_tokens,
            text_rows=self.text_rows + other.text_rows,
            joined_rows=self.joined_rows + other.joined_rows,
            unread=self.unread | other.unread,
        )


def count_rows(
    *,
    split: str,
    source: str,
    drop: list[str],
    note: list[str],
    places: Places,
    group: np.ndarray,
    remarks: np.ndarray,
) -> tuple[AuditCounts, np.ndarray]:
    """Count one source's rows, including those to drop.

    Args:
        split, source: Their names.
        drop: Reason to drop each row, "" to keep it. (rows,)
        note: Error message of a malformed row; of others the field that the chat template does not
            render, or "". (rows,)
        places: File and line of each row.
        group: Number of each row's prompt. (rows,) int64
        remarks: `Remark` bits. (rows,) int32

    Returns:
        The counts, without token counts, and the indices of the rows to keep.
    """
    dropped = Counter(filter(None, drop))
    first_dropped = {}
    for reason in dropped:
        index = drop.index(reason)
        first_dropped[reason] = places.name(index)
        if reason == MALFORMED:
            first_dropped[reason] = note[index]
        elif note[index]:
            first_dropped[reason] += f":{note[index]}, which the chat template leaves out"
    kept = np.flatnonzero([not reason for reason in drop])
    remark_counts, first_remarks = {}, {}
    for remark in Remark:
        rows = kept[(remarks[kept] & remark) != 0]
        if len(rows):
            remark_counts[remark] = len(rows)
            place = places.name(rows[0])
            names_field = remark is Remark.RESPONSE_NOT_RENDERED
            first_remarks[remark] = f"{place}:{note[rows[0]]}" if names_field else place
    counts = AuditCounts(
        split=split,
        sources=[source],
        rows=len(drop),
        dropped=dict(dropped),
        first_dropped=first_dropped,
        kept=len(kept),
        prompts=len(np.unique(group[kept])),
        remarks=remark_counts,
        first_remarks=first_remarks,
    )
    return counts, kept


def check_counts(
    counts: AuditCounts, *, max_dropped: float, has_earlier_rows: bool = False
) -> None:
    """Refuse a split that loses too many or all rows, or has too many pairs of equal responses.

    Args:
        counts: The account of the split.
        max_dropped: Largest share of rows that may be dropped, in [0, 1].
        has_earlier_rows: Rows were left out as copies; then all rows may be gone.

    Raises:
        DataError: naming the rule, the number of rows and the reasons.
    """
    name = f"split {counts.split!r} of {', '.join(counts.sources)}"
    # copies do not count: they are left out on request
    num_dropped = sum(count for reason, count in counts.dropped.items() if reason != COPY)
    is_gone = counts.kept == 0 and not has_earlier_rows
    if is_gone or num_dropped > max_dropped * counts.rows:
        rule = "no row is left" if is_gone else f"data.max_dropped={max_dropped:g}"
        raise DataError(f"{name}: {rule}: {_dropped_text(counts)}")
    num_identical = counts.remarks.get(Remark.IDENTICAL, 0)
    if num_identical > MAX_IDENTICAL * counts.kept:
        raise DataError(
            f"{name}: chosen equals rejected in {share_of(num_identical, counts.kept)} pairs, "
            f"at most {MAX_IDENTICAL:.0%} may: there is nothing to prefer{_why_equal(counts)}"
        )


def format_audit(counts: AuditCounts) -> tuple[list[str], list[str]]:
    """The account as messages of one line each.

    Returns:
        Informative lines, and warnings (dropped or suspicious rows, unread prompt columns).
    """
    per_row = f"{counts.prompt_tokens / max(1, counts.kept):.0f} prompt and "
    per_row += f"{counts.response_tokens / max(1, counts.kept):.0f} response tokens a row"
    facts = [
        f"{counts.split}: {counts.rows:,} rows of {', '.join(counts.sources)}; kept "
        f"{counts.kept:,}, with {counts.prompts:,} different prompts; {per_row}, longest sequence "
        f"{counts.longest_tokens:,}"
    ]
    warnings = []
    if counts.dropped:
        warnings.append(f"{counts.split}: {_dropped_text(counts)}")
    for remark, count in counts.remarks.items():
        lines = facts if remark in ORDINARY else warnings
        rows = f"{share_of(count, counts.kept)} rows"
        if remark is Remark.JOINED_DIFFERS:
            rows = f"{share_of(count, counts.joined_rows)} text rows"
            if counts.joined_rows < counts.text_rows:
                rows += f", of {counts.text_rows:,} only the first {JOINED_ROWS:,} of each source "
                rows += "were looked at"
        if remark is Remark.UNKNOWN:
            num_tokens = counts.prompt_tokens + counts.response_tokens
            rows += f", {share_of(counts.unknown_tokens, num_tokens)} tokens"
        first = counts.first_remarks[remark]
        lines.append(f"{counts.split}: {REMARK_TEXTS[remark]}: {rows} (first: {first})")
    for source, columns in counts.unread.items():
        missed = [column for column in columns if column.lower() in PROMPT_COLUMNS]
        others = [column for column in columns if column not in missed]
        if missed:
            warnings.append(
                f"{counts.split}: columns of {source} that are not read and may belong to the "
                f"prompt: {listed(missed)}; write into it what the model is to read"
            )
        if others:
            facts.append(f"{counts.split}: columns of {source} that are not read: {listed(others)}")
    return facts, warnings


def log_counts(audits: Sequence[AuditCounts], tokenizer: Any, *, about_texts: bool = True) -> None:
    """Log the account of each split and, if `about_texts`, once whether text prompts lack a BOS."""
    for audit in audits:
        facts, warnings = format_audit(audit)
        for line in facts:
            logger.info(line)
        for line in warnings:
            logger.warning(line)
    if about_texts:
        log_missing_bos(audits, tokenizer)


def log_missing_bos(audits: Sequence[AuditCounts], tokenizer: Any) -> None:
    """Log that text prompts get no BOS, if the tokenizer adds one to texts by default."""
    [ids] = tokenizer(["a"], verbose=False)["input_ids"]
    has_texts = any(counts.text_rows for counts in audits)
    if has_texts and ids and ids[0] == tokenizer.bos_token_id:
        logger.info(
            "no %s is put before prompts that are texts, though this tokenizer begins every text "
            "with it: the rule of the seed repositories; a prompt may spell it",
            tokenizer.bos_token,
        )


def _why_equal(counts: AuditCounts) -> str:
    """Possible causes of equal responses, as the end of an error message."""
    return "".join(
        f"; {REMARK_TEXTS[remark]} in {share_of(counts.remarks[remark], counts.kept)} of them "
        f"(first: {counts.first_remarks[remark]})"
        for remark in (Remark.RESPONSE_NOT_RENDERED, Remark.EQUAL_WHEN_CUT)
        if remark in counts.remarks
    )


def _dropped_text(counts: AuditCounts) -> str:
    reasons = ", ".join(
        # a colon after an option's name: the count must not be read as its value
        f"{reason}{':' * reason.endswith('_length')} {count:,} (first: "
        f"{counts.first_dropped[reason]})"
        for reason, count in counts.dropped.items()
    )
    share = share_of(sum(counts.dropped.values()), counts.rows)
    return f"dropped {share} rows" + (f": {reasons}" if reasons else "")


def _summed(one: Mapping[Key, int], other: Mapping[Key, int]) -> dict[Key, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
