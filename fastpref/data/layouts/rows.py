"""The common form of all rows, and the rules that a row must satisfy."""

import json
import unicodedata
from typing import Any, TypedDict

from fastpref.checks import listed, nearest
from fastpref.data.layouts.messages import (
    PROMPT_ROLES,
    RESPONSE_ROLES,
    Conversations,
    Messages,
    add_system,
    check_roles,
    divide_conversations,
    is_silent,
    read_messages,
    read_tools,
)
from fastpref.data.layouts.row_values import (
    RowError,
    check_unicode,
    json_text,
    kind,
    map_strings,
    normal_form,
)

ASSISTANT_TURN = "\n\nAssistant:"
SIDES = ("chosen", "rejected")
TEXT_FIELDS = ("prompt", *SIDES)
WEIGHT_FIELDS = ("chosen_weight", "rejected_weight")
DIGEST_FIELD = "weights_digest"
CHAT_FIELDS = ("tools", "system")
"""Further fields of rows of messages, besides `TEXT_FIELDS`."""
SAID_FIELDS = ("role", "content", "tool_calls", "name")
"""Keys of a message that count when prompts are compared."""
MAX_WEIGHT = 1e30

EMPTY_RESPONSE = "empty response"
NO_SHARED_PROMPT = "no shared prompt"
MALFORMED = "malformed row"
SEVERAL = (
    "; response_0, response_1 and better_response_id are two responses and the number of the "
    "better one; of responses with scores or ranks write a row for each pair"
)
EMPTY_PROMPT = "prompt is empty: at least one token must come before the response"


class Row(TypedDict):
    """A checked row. In form `chat` prompt, chosen and rejected are JSON lists of messages.

    `drop` is the reason to leave the row out, empty for a row to keep.
    """

    form: str  # text, hh (prompt found in the dialogues), chat
    prompt: str
    chosen: str
    rejected: str
    tools: str | None  # JSON list of tool schemas, in form chat only
    chosen_weights: list[float] | None
    rejected_weights: list[float] | None
    weights_digest: str | None  # `token_digest` of the tokens the weights were estimated for
    fields: list[str]  # the source's columns of prompt, chosen, rejected, for error messages
    drop: str


def make_row(
    *,
    form: str = "",
    prompt: str = "",
    chosen: str = "",
    rejected: str = "",
    tools: str | None = None,
    drop: str,
) -> Row:
    """A row without token weights."""
    return Row(
        form=form,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=tools,
        chosen_weights=None,
        rejected_weights=None,
        weights_digest=None,
        fields=list(TEXT_FIELDS),
        drop=drop,
    )


def parse_row(record: Any, *, weighted: bool, allow_roles: bool, single: bool = False) -> Row:
    """Check one row with the standard field names, and convert it to the common form.

    Accepted: texts `prompt`, `chosen`, `rejected`; texts `chosen` and `rejected` that are whole
    dialogues with "\\n\\nAssistant:" turns (the prompt ends with the last such turn of `chosen`);
    lists of messages, with `prompt`, with the prompt at the start of both conversations, or with
    both; with messages also `tools`, a list of schemas, and `system`, text of a first message.

    Args:
        record: The row; other fields are ignored. Other layouts are converted to these fields
            before, see `recognition`.
        weighted: Read `chosen_weight` and `rejected_weight`: finite numbers, both or neither.
            Otherwise they are ignored.
        allow_roles: Accept any role in any position.
        single: The row has a prompt and one response, `chosen`.

    Raises:
        RowError: the row breaks a rule.
    """
    if not isinstance(record, dict):
        raise RowError(f"a row must be an object with chosen and rejected, got {kind(record)}")
    row = _parse_texts(record, allow_roles, single)
    if weighted and not row["drop"]:
        row["chosen_weights"], row["rejected_weights"] = _parse_weights(record)
        row["weights_digest"] = _parse_digest(record)
    return row


def comparable(row: Row) -> tuple[str, str, str]:
    """Prompt with its tools, chosen and rejected as texts that are equal for equal rows.

    The key order of messages does not matter.
    """
    texts = (row["prompt"], row["chosen"], row["rejected"])
    if row["form"] != "chat":
        return texts
    prompt, chosen, rejected = (normal_form(json.loads(text)) for text in texts)
    if row["tools"] is not None:
        prompt += normal_form(json.loads(row["tools"]))
    return prompt, chosen, rejected


def prompt_said(row: Row) -> str:
    """The prompt with its tools as a text that is equal for equivalent prompts.

    White space is collapsed and stripped, characters are composed (NFC), and of messages only the
    keys `SAID_FIELDS` count.
    """
    if row["form"] != "chat":
        return _squeezed(row["prompt"])
    said = [
        {field: message[field] for field in SAID_FIELDS if message.get(field) is not None}
        for message in json.loads(row["prompt"])
    ]
    tools = json.loads(row["tools"]) if row["tools"] is not None else []
    return normal_form(map_strings(_squeezed, [said, tools]))


def in_source(path: str, row: Row | dict[str, Any]) -> str:
    """Path in the source, "messages.content", for a path in a checked row, "chosen.content"."""
    field, *keys = path.split(".")
    names = dict(zip(TEXT_FIELDS, row["fields"], strict=False))
    return ".".join([names.get(field, field), *keys])


def check_columns(columns: list[str]) -> None:
    """Refuse rows without `chosen` or `rejected`.

    Raises:
        RowError: naming the missing column, the columns found and the nearest name.
    """
    missing = [field for field in SIDES if field not in columns]
    if missing:
        raise RowError(
            f"no column {missing[0]!r}; columns found: {listed(sorted(columns)) or 'none'}; "
            f"needed: prompt, chosen, rejected{_rename_hint(missing[0], columns)}"
            f"{'' if len(missing) < 2 else SEVERAL}",
            missing[0],
        )


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Prompt and responses of two HH dialogues; None if rejected does not share the prompt.

    The prompt is `chosen` up to and including its last "\\n\\nAssistant:".

    Raises:
        RowError: `chosen` has no such turn.
    """
    turn = chosen.rfind(ASSISTANT_TURN)
    if turn < 0:
        raise RowError(
            "no prompt: needed: prompt, chosen, rejected, or dialogues in chosen and rejected with "
            r"'\n\nAssistant:' turns"
        )
    prompt = chosen[: turn + len(ASSISTANT_TURN)]
    if not rejected.startswith(prompt):
        return None
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _parse_texts(record: dict[str, Any], allow_roles: bool, single: bool) -> Row:
    if not single:
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
        return _parse_chat(record, allow_roles, single)
    return _parse_text(record, single)


def _parse_text(record: dict[str, Any], single: bool) -> Row:
    chosen, rejected = record["chosen"], "" if single else record["rejected"]
    for field in TEXT_FIELDS:
        check_unicode(field, record.get(field, ""))
    if "prompt" in record:
        if not record["prompt"]:
            raise RowError(EMPTY_PROMPT, "prompt")
        return _row("text", record["prompt"], chosen, rejected, single=single)
    try:
        parts = split_dialogues(chosen, rejected)
    except RowError as error:
        raise _no_prompt(str(error), list(record)) from None
    if parts is None:
        # dropped, but its prompt is numbered, which keeps the place in the data order
        prompt = chosen[: chosen.rfind(ASSISTANT_TURN) + len(ASSISTANT_TURN)]
        return _row("hh", prompt, chosen, rejected, drop=NO_SHARED_PROMPT)
    return _row("hh", *parts)


def _parse_chat(record: dict[str, Any], allow_roles: bool, single: bool) -> Row:
    fields = {
        field: read_messages(field, record[field]) for field in TEXT_FIELDS if field in record
    }
    whole = Conversations(fields["prompt"], fields["chosen"], []) if single else None
    conversations = whole or divide_conversations(fields)
    tools = read_tools(record.get("tools"))
    if conversations is None:
        if all(m["role"] in RESPONSE_ROLES for side in SIDES for m in fields[side]):
            raise _no_prompt("no prompt: chosen and rejected are responses", list(record))
        return _chat_row([], fields["chosen"], fields["rejected"], tools, NO_SHARED_PROMPT)
    prompt, chosen, rejected = conversations
    if not allow_roles:
        check_roles("prompt", prompt, PROMPT_ROLES)
        check_roles("chosen", chosen, RESPONSE_ROLES)
        check_roles("rejected", rejected, RESPONSE_ROLES)
    # only responses that no template can render: the others are checked after rendering
    is_empty = is_silent(chosen) or (is_silent(rejected) and not single)
    drop = EMPTY_RESPONSE if is_empty else ""
    prompt = add_system(prompt, record.get("system"))
    if not prompt and not drop:
        # checked before rendering, where a template may add a system message of its own
        raise RowError("prompt has no messages: one must come before the response", "prompt")
    return _chat_row(prompt, chosen, rejected, tools, drop)


def _parse_weights(record: dict[str, Any]) -> tuple[list[float] | None, list[float] | None]:
    chosen, rejected = (record.get(field) for field in WEIGHT_FIELDS)
    if chosen is None and rejected is None:
        return None, None
    if chosen is None or rejected is None:
        present, absent = WEIGHT_FIELDS if rejected is None else WEIGHT_FIELDS[::-1]
        raise RowError(f"{present} without {absent}: give both or neither", present)
    return (
        _checked_weights("chosen_weight", chosen),
        _checked_weights("rejected_weight", rejected),
    )


def _checked_weights(field: str, weights: Any) -> list[float]:
    if not isinstance(weights, list):
        raise RowError(
            f"{field} must be a list of numbers, one per token, got {kind(weights)}", field
        )
    for index, weight in enumerate(weights):
        # type() and not isinstance(): a boolean is no weight; nan fails every comparison
        if type(weight) not in (float, int) or not abs(weight) < MAX_WEIGHT:
            raise RowError(f"{field}[{index}] must be a finite number, got {weight!r:.40}", field)
    return [float(weight) for weight in weights]


def _parse_digest(record: dict[str, Any]) -> str | None:
    digest = record.get(DIGEST_FIELD)
    if digest is not None and not isinstance(digest, str):
        raise RowError(f"{DIGEST_FIELD} must be text, got {kind(digest)}", DIGEST_FIELD)
    return digest


def _row(
    form: str, prompt: str, chosen: str, rejected: str, *, drop: str = "", single: bool = False
) -> Row:
    if not drop and not (chosen.strip() and (single or rejected.strip())):
        drop = EMPTY_RESPONSE
    return make_row(form=form, prompt=prompt, chosen=chosen, rejected=rejected, drop=drop)


def _chat_row(
    prompt: Messages, chosen: Messages, rejected: Messages, tools: Messages | None, drop: str
) -> Row:
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools}
    texts = {field: json_text(part) for field, part in parts.items() if part is not None}
    for field, text in texts.items():
        # for the keys of messages: their values were checked before
        check_unicode(field, text)
    return make_row(form="chat", drop=drop, **texts)


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _no_prompt(message: str, columns: list[str]) -> RowError:
    found = listed(sorted(map(str, columns)))
    return RowError(f"{message}; columns found: {found}{_rename_hint('prompt', columns)}")


def _rename_hint(wanted: str, columns: list[str]) -> str:
    near = nearest(wanted, [column for column in columns if column not in TEXT_FIELDS])
    if near is None:
        # a text named prompt is used without a chat template, one named question with it
        turn = " (question: COLUMN sends it to the chat template)" if wanted == "prompt" else ""
        return f"; data.columns={{{wanted}: COLUMN}} says which column it is{turn}"
    return f"; nearest: {near}, rename it to {wanted} or set data.columns={{{wanted}: {near}}}"
