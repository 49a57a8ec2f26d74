"""Convert records of a known layout to the fields that `rows` checks: prompt, chosen, rejected."""

from typing import Any

from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import RowError, kind
from fastpref.data.layouts.rows import SIDES, TEXT_FIELDS
from fastpref.data.layouts.turns import (
    divide_at_response,
    is_messages,
    is_response,
    is_sharegpt,
    read_response,
    read_text,
    read_turns,
    user,
    user_says,
)

Record = dict[str, Any]
OPENAI = ("input", "preferred_output", "non_preferred_output")
"""Columns of OpenAI's preference format, in the order of `TEXT_FIELDS`."""


def as_it_is(record: Record) -> Record:
    return record


def as_messages(record: Record) -> Record:
    """Convert messages of any form, and text responses to such a prompt, to lists of messages."""
    read = dict(record)
    has_prompt = is_messages(record.get("prompt"))
    for field in TEXT_FIELDS:
        value = record.get(field)
        if isinstance(value, dict) or is_sharegpt(value):
            read[field] = read_turns(field, value)
        elif field != "prompt" and has_prompt and isinstance(value, str):
            read[field] = read_response(field, value)
    return read


def with_text_prompt(record: Record) -> Record:
    """A text prompt with responses as messages, or with whole conversations that contain it."""
    prompt = read_text("prompt", record["prompt"])
    sides = {side: read_turns(side, record[side]) for side in SIDES}
    whole = [side for side in SIDES if sides[side] and not is_response(sides[side][0])]
    if not whole:
        return record | sides | {"prompt": user(prompt)}
    for side in SIDES:
        if side not in whole or not user_says(sides[side][:-1], prompt.strip()):
            raise RowError(
                f"two readings: whole conversations begin with prompt, and no message of the user "
                f"in {side} says it; responses begin with the assistant, and {whole[0]} does not; "
                "data.columns={prompt: null} leaves prompt out",
                side,
            )
    return {field: value for field, value in (record | sides).items() if field != "prompt"}


def of_openai(record: Record) -> Record:
    """OpenAI's preference format: `input` holds the prompt's messages and tools."""
    given = record["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise RowError(f"input must be an object with messages, got {kind(given)}", "input")
    sides = {
        side: read_response(field, record[field])
        for side, field in zip(SIDES, OPENAI[1:], strict=True)
    }
    prompt = read_turns("input", given["messages"])
    return record | sides | {"prompt": prompt, "tools": given.get("tools") or None}


def with_two_answers(prompt: str, record: Record) -> Record:
    """A user turn or a conversation, with two responses to it."""
    sides = {side: read_response(side, record[side]) for side in SIDES}
    return record | sides | {"prompt": _prompt_turns(prompt, record)}


def with_rejected(field: str, record: Record) -> Record:
    """A conversation that ends with the chosen response, with a rejected one: a text in place of
    the last message, messages in place of all that follow the user, or the whole conversation."""
    turns = read_turns("messages", record["messages"])
    rejected = read_response(field, record[field])
    prompt, chosen = divide_at_response("messages", turns)
    if isinstance(record[field], str):
        prompt, chosen = turns[:-1], turns[-1:]
    elif rejected and not is_response(rejected[0]):
        read = record | {"chosen": turns, "rejected": rejected}
        return {name: value for name, value in read.items() if name != "prompt"}
    return record | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def with_completion(prompt: str, response: str, record: Record) -> Record:
    return {"prompt": record[prompt], "chosen": record[response]}


def with_answer(prompt: str, response: str, record: Record) -> Record:
    turns = _prompt_turns(prompt, record)
    return record | {"prompt": turns, "chosen": read_response(response, record[response])}


def divided(field: str, record: Record) -> Record:
    prompt, response = divide_at_response(field, read_turns(field, record[field]))
    return record | {"prompt": prompt, "chosen": response}


def _prompt_turns(field: str, record: Record) -> Messages:
    """The prompt's messages, read from a column such as question, instruction or conversations."""
    if field in ("conversations", "messages"):
        turns = read_turns(field, record[field])
        if not turns or turns[-1]["role"] == "assistant":
            end = "ends with a message of the assistant" if turns else "has no messages"
            raise RowError(f"{field} {end}: it is the prompt of chosen and rejected", field)
        return turns
    if field == "prompt" and not isinstance(record[field], str):
        return read_turns(field, record[field])
    text = read_text(field, record[field])
    more = record.get("input") if field == "instruction" else None
    if more is not None and not isinstance(more, str):
        raise RowError(f"input must be text, got {kind(more)}", "input")
    return user(f"{text}\n{more}" if more and more.strip() else text)
