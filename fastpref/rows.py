"""The rules a row must keep, and the one form that every kind of row is brought to."""

import json
import re
from typing import Any, TypedDict

from fastpref.checks import hint, nearest

ASSISTANT_TURN = "\n\nAssistant:"
TEXT_FIELDS = ("prompt", "chosen", "rejected")
WEIGHT_FIELDS = ("chosen_weight", "rejected_weight")
DIGEST_FIELD = "weights_digest"
PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool")
RESPONSE_ROLES = ("assistant", "tool")
MAX_WEIGHT = 1e30

EMPTY_RESPONSE = "empty response"
NO_SHARED_PROMPT = "no shared prompt"
EMPTY_PROMPT = "prompt is empty: at least one token must come before the response"


class RowError(ValueError):
    """A row breaks a rule.

    Args:
        message: A sentence that names what is wrong.
        field: The field it is wrong in, "" where it is the row as a whole.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def at(self, source: str, number: int) -> str:
        """The message behind its place, "train.jsonl:8:chosen: chosen is null"."""
        place = f"{source}:{number}:{self.field}" if self.field else f"{source}:{number}"
        return f"{place}: {self}"


class Row(TypedDict):
    """A checked row. In form `chat` the three texts are JSON lists of messages.

    `drop` is the reason to leave the pair out, empty for a pair to train on.
    """

    form: str  # text, hh (prompt found in the dialogues), chat
    prompt: str
    chosen: str
    rejected: str
    chosen_weights: list[float] | None
    rejected_weights: list[float] | None
    weights_digest: str | None  # `token_digest` of the tokens the weights were estimated for
    drop: str


def parse_row(record: Any, *, weighted: bool, allow_roles: bool, zero_weights: bool = False) -> Row:
    """Check one row as it came from a file and bring it to one form.

    Accepted: texts `prompt`, `chosen`, `rejected`; texts `chosen` and `rejected` that are whole
    dialogues with "\\n\\nAssistant:" turns (the prompt ends with the last such turn of `chosen`);
    lists of messages, with `prompt` or with the prompt at the start of both conversations.

    Args:
        record: The row; other fields than the named ones are ignored.
        weighted: Read `chosen_weight` and `rejected_weight`: finite numbers, not all zero, both or
            neither. Else they are ignored.
        allow_roles: Take any role in any place.
        zero_weights: Take a response whose weights are all zero: two models that agree on it give
            that, while in a file made by hand it silences the response.

    Raises:
        RowError: the row breaks a rule.
    """
    if not isinstance(record, dict):
        raise RowError(f"a row must be an object with chosen and rejected, got {kind(record)}")
    check_columns(list(record))
    fields = [field for field in TEXT_FIELDS if field in record]
    kinds = {field: kind(record[field]) for field in fields}
    for field in fields:
        if record[field] is None:
            raise RowError(f"{field} is null", field)
        if kinds[field] not in ("text", "list"):
            raise RowError(f"{field} must be text or a list of messages, got {kinds[field]}", field)
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{field} is {kinds[field]}" for field in fields)
        odd_one = min(fields, key=lambda field: list(kinds.values()).count(kinds[field]))
        raise RowError(
            f"{found}: they must be all text or all lists of messages; where chosen and rejected "
            "are whole conversations, leave prompt out",
            odd_one,
        )
    if kinds["chosen"] == "list":
        row = _parse_chat({field: record[field] for field in fields}, allow_roles)
    else:
        row = _parse_text(record)
    if weighted and not row["drop"]:
        row["chosen_weights"], row["rejected_weights"] = _parse_weights(record, zero_weights)
        row["weights_digest"] = _parse_digest(record)
    return row


def check_columns(columns: list[str]) -> None:
    """Refuse rows without `chosen` or `rejected`: columns found, needed, nearest name."""
    missing = [field for field in ("chosen", "rejected") if field not in columns]
    if missing:
        raise RowError(
            f"no column {missing[0]!r}; columns found: {', '.join(sorted(columns)) or 'none'}; "
            f"needed: prompt, chosen, rejected{_rename_hint(missing[0], columns)}",
            missing[0],
        )


def kind(value: Any) -> str:
    """The type of a JSON value in a reader's words."""
    if value is None:
        return "null"
    names = {str: "text", list: "list", dict: "object", bool: "boolean", int: "number"}
    return names.get(type(value), "number" if isinstance(value, float) else type(value).__name__)


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Prompt and responses of two HH dialogues; None where rejected does not share the prompt.

    The prompt is `chosen` up to and including its last "\\n\\nAssistant:".

    Raises:
        RowError: `chosen` has no such turn.
    """
    turn = chosen.rfind(ASSISTANT_TURN)
    if turn < 0:
        raise RowError(
            "no prompt: columns found: chosen, rejected; needed: prompt, chosen, rejected, or "
            r"dialogues in chosen and rejected with '\n\nAssistant:' turns"
        )
    prompt = chosen[: turn + len(ASSISTANT_TURN)]
    if not rejected.startswith(prompt):
        return None
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _parse_text(record: dict[str, Any]) -> Row:
    chosen, rejected = record["chosen"], record["rejected"]
    for field in TEXT_FIELDS:
        _check_unicode(field, record.get(field, ""))
    if "prompt" in record:
        if not record["prompt"]:
            raise RowError(EMPTY_PROMPT, "prompt")
        return _row("text", record["prompt"], chosen, rejected)
    try:
        parts = split_dialogues(chosen, rejected)
    except RowError as error:
        raise RowError(f"{error}{_rename_hint('prompt', list(record))}") from None
    if parts is None:
        return _row("hh", "", chosen, rejected, drop=NO_SHARED_PROMPT)
    return _row("hh", *parts)


def _parse_chat(messages: dict[str, list[Any]], allow_roles: bool) -> Row:
    for field in messages:
        _check_messages(field, messages[field])
    chosen, rejected = messages["chosen"], messages["rejected"]
    if "prompt" in messages:
        prompt = messages["prompt"]
    else:
        num_shared = _num_shared_messages(chosen, rejected)
        prompt, chosen, rejected = chosen[:num_shared], chosen[num_shared:], rejected[num_shared:]
        if not prompt and chosen and rejected:
            return _chat_row(prompt, chosen, rejected, drop=NO_SHARED_PROMPT)
    if not allow_roles:
        _check_roles("prompt", prompt, PROMPT_ROLES)
        _check_roles("chosen", chosen, RESPONSE_ROLES)
        _check_roles("rejected", rejected, RESPONSE_ROLES)
    return _chat_row(prompt, chosen, rejected)


def _num_shared_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """Messages at the start of both, leaving at least one message to each response."""
    longest = min(len(chosen), len(rejected)) - 1
    for index in range(longest):
        if chosen[index] != rejected[index]:
            return index
    return max(longest, 0)


def _check_messages(field: str, messages: list[Any]) -> None:
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise RowError(
                f"{place} must be a message with role and content, got {kind(message)}", field
            )
        for key in ("role", "content"):
            if key not in message:
                found = ", ".join(sorted(message)) or "none"
                raise RowError(f"{place} has no {key}; keys found: {found}", field)
            if message[key] is None:
                raise RowError(f"{place}.{key} is null", field)
            if not isinstance(message[key], str):
                raise RowError(f"{place}.{key} must be text, got {kind(message[key])}", field)
            _check_unicode(f"{place}.{key}", message[key])


def _check_roles(field: str, messages: list[Any], roles: tuple[str, ...]) -> None:
    for message in messages:
        if message["role"] not in roles:
            raise RowError(
                f"{field} has a message of role {message['role']!r}; roles allowed there: "
                f"{', '.join(roles)} (any with data.allow_roles=true)"
                f"{hint(message['role'], roles)}",
                field,
            )


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{field} holds half a surrogate pair at character {error.start}"
        raise RowError(message, re.split(r"\W", field)[0]) from None


def _parse_weights(
    record: dict[str, Any], zero_weights: bool
) -> tuple[list[float] | None, list[float] | None]:
    chosen, rejected = (record.get(field) for field in WEIGHT_FIELDS)
    if chosen is None and rejected is None:
        return None, None
    if chosen is None or rejected is None:
        present, absent = WEIGHT_FIELDS if rejected is None else WEIGHT_FIELDS[::-1]
        raise RowError(f"{present} without {absent}: give both or neither", present)
    return (
        _checked_weights("chosen_weight", chosen, zero_weights),
        _checked_weights("rejected_weight", rejected, zero_weights),
    )


def _checked_weights(field: str, weights: Any, zero_weights: bool) -> list[float]:
    if not isinstance(weights, list):
        raise RowError(
            f"{field} must be a list of numbers, one per token, got {kind(weights)}", field
        )
    for index, weight in enumerate(weights):
        # type() and not isinstance(): a boolean is no weight; nan fails every comparison
        if type(weight) not in (float, int) or not abs(weight) < MAX_WEIGHT:
            raise RowError(f"{field}[{index}] must be a finite number, got {weight!r:.40}", field)
    if weights and not any(weights) and not zero_weights:
        raise RowError(f"{field}: all {len(weights)} weights are zero", field)
    return [float(weight) for weight in weights]


def _parse_digest(record: dict[str, Any]) -> str | None:
    digest = record.get(DIGEST_FIELD)
    if digest is not None and not isinstance(digest, str):
        raise RowError(f"{DIGEST_FIELD} must be text, got {kind(digest)}", DIGEST_FIELD)
    return digest


def _row(form: str, prompt: str, chosen: str, rejected: str, *, drop: str = "") -> Row:
    if not drop and not (chosen.strip() and rejected.strip()):
        drop = EMPTY_RESPONSE
    return Row(
        form=form,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_weights=None,
        rejected_weights=None,
        weights_digest=None,
        drop=drop,
    )


def _chat_row(prompt: list[Any], chosen: list[Any], rejected: list[Any], *, drop: str = "") -> Row:
    if not drop and not (_has_content(chosen) and _has_content(rejected)):
        drop = EMPTY_RESPONSE
    texts = [_messages_json(messages) for messages in (prompt, chosen, rejected)]
    return _row("chat", *texts, drop=drop)


def _messages_json(messages: list[Any]) -> str:
    # parquet fills the keys that a message lacks with null; sorted keys make equal prompts equal
    present = [{key: value for key, value in m.items() if value is not None} for m in messages]
    return json.dumps(present, ensure_ascii=False, sort_keys=True, default=str)


def _has_content(messages: list[Any]) -> bool:
    return any(message["content"].strip() for message in messages)


def _rename_hint(wanted: str, columns: list[str]) -> str:
    near = nearest(wanted, [column for column in columns if column not in TEXT_FIELDS])
    return f"; nearest: {near}, rename it to {wanted}" if near else ""
