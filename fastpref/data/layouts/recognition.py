"""Recognize the layout of a record from its columns and values.

A layout converts a record to the fields that `rows` checks: `prompt`, `chosen` and `rejected`; for
SFT also a record of one response, which becomes `chosen`. Texts named `prompt` are used without a
chat template; `question` or `instruction` becomes a user turn for the chat template.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from fastpref.checks import listed
from fastpref.data.layouts.readings import (
    OPENAI,
    Record,
    as_it_is,
    as_messages,
    divided,
    of_openai,
    with_answer,
    with_completion,
    with_rejected,
    with_text_prompt,
    with_two_answers,
)
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import (
    ASSISTANT_TURN,
    CHAT_FIELDS,
    SIDES,
    TEXT_FIELDS,
    check_columns,
)
from fastpref.data.layouts.turns import is_messages, is_response, is_sharegpt

PROMPTS = ("question", "instruction", "conversations")
"""Columns that replace a missing `prompt`."""
REJECTED = ("rejected_response", "rejected_messages")
"""Columns of the rejected response where `messages` ends with the chosen one, as in ms-swift."""
NUMBERED = ("response_0", "response_1")
NUMBERS = ("better_response_id", "safer_response_id", "winner")
"""Columns that name the better response by its number."""
WORDS = ("preference", "preferred", "label")
"""Columns whose text may name the better response, and whose numbers are ambiguous."""
RESPONSES = ("messages", "conversations", "completion", "output")
"""Columns that hold the one response of a row for SFT."""
NUMBERS_MEANT: dict[Any, int] = {
    0: 0,
    1: 1,
    "0": 0,
    "1": 1,
    **{name: i for i, name in enumerate(NUMBERED)},
}
PROMPT_WORDS = {
    "prompt": "prompt as a turn of the user or messages",
    "question": "question as a turn of the user",
    "instruction": "instruction and input as a turn of the user",
    "conversations": "conversations as the prompt",
    "messages": "messages as the prompt",
}
"""Descriptions of prompt columns for the log."""


class AmbiguousRowError(RowError):
    """A row can be read in two ways; the user must choose one by `data.columns`."""


class Layout(NamedTuple):
    """The layout of a record."""

    what: str
    """Description for the log, which also identifies the layout."""
    columns: tuple[str, ...]
    """Fields that are read."""
    read: Callable[[Record], Record]
    """Converts a record to the fields of `parse_row`."""
    names: Mapping[str, str] = MappingProxyType({})
    """Field of `parse_row` -> field that it was read from, for error messages."""
    may_mix: bool = False
    """Rows of this layout may be mixed in one source with other layouts that allow it."""
    single: bool = False
    """One response per row, for SFT."""

    def is_beside(self, other: "Layout") -> bool:
        """Whether one source may contain rows of both layouts."""
        return self.what == other.what or (self.may_mix and other.may_mix)


def recognise(record: Record, named: Sequence[str] = (), *, single: bool) -> Layout:
    """Recognize the layout of a record.

    Args:
        record: With `data.columns` applied.
        named: Fields that `data.columns` names: they take precedence over others.
        single: Accept a row with one response.

    Raises:
        RowError: the layout is unknown.
        AmbiguousRowError: the record can be read in two ways.
    """
    # in a pair, a column that may be a prompt or a response is the prompt
    is_pair = any(all(field in record for field in pair) for pair in (SIDES, NUMBERED))
    responses = [field for field in RESPONSES if not (is_pair and field in PROMPTS)]
    if single and any(field in named for field in responses):
        return _recognise_single(record, named)
    if all(side in record for side in SIDES):
        return _recognise_pair(record, named)
    if all(field in record for field in NUMBERED):
        return _recognise_numbered(record, named)
    if all(field in record for field in OPENAI):
        return PREFERRED_OUTPUTS
    rejected = [field for field in REJECTED if field in record]
    if not single and "messages" in record and rejected:
        # the one that is not null, as in the union of two sources' columns
        return _recognise_rejected(max(rejected, key=lambda field: record[field] is not None))
    if any(field in record for field in RESPONSES):
        if single:
            return _recognise_single(record, named)
        found = ", ".join(_present(RESPONSES, record, named))
        raise RowError(
            f"one response a row ({found}) is for loss=sft, not reversed; here a row needs prompt, "
            "chosen and rejected",
            "rejected",
        )
    also = "; or messages, conversations, or prompt and completion" if single else ""
    if single and not any(side in record for side in SIDES):
        raise RowError(
            f"no column 'chosen'; columns found: {listed(sorted(record)) or 'none'}; "
            "data.columns={completion: COLUMN} says which column the response is; needed: prompt, "
            f"chosen, rejected{also}",
            "chosen",
        )
    try:
        check_columns(list(record))
    except RowError as error:
        raise RowError(f"{error}{also}", error.field) from None
    raise AssertionError("a pair has both columns")


def _recognise_pair(record: Record, named: Sequence[str]) -> Layout:
    for field in TEXT_FIELDS:
        if field in record and record[field] is None:
            raise RowError(f"{field} is null", field)
    if "prompt" in record:
        if isinstance(record["prompt"], list | dict):
            return SHAREGPT_MESSAGES if _has_sharegpt(record) else MESSAGES
        if isinstance(record["prompt"], str) and isinstance(record["chosen"], list | dict):
            return TEXT_PROMPT
        return TEXTS
    prompts = _present(PROMPTS, record, named)
    # beside another prompt, messages may repeat it with a response
    if "messages" in named or (not prompts and is_messages(record.get("messages"))):
        prompts = ["messages"]
    if not prompts or (_is_whole(record) and not set(prompts) & set(named)):
        if is_messages(record["chosen"]):
            return SHAREGPT_CONVERSATIONS if _has_sharegpt(record) else CONVERSATIONS
        return DIALOGUES
    prompt = _only(prompts, "the prompt")
    columns = (prompt, *(("input",) if prompt == "instruction" else ()), *SIDES, *CHAT_FIELDS)
    return Layout(
        f"{PROMPT_WORDS[prompt]}, chosen and rejected",
        columns,
        partial(with_two_answers, prompt),
        names={"prompt": prompt},
    )


def _recognise_numbered(record: Record, named: Sequence[str]) -> Layout:
    """The layout of `response_0`, `response_1` and a column that says which is better."""
    labels = _present(NUMBERS, record, named) or _present(WORDS, record, named)
    if not labels:
        raise RowError(
            "response_0 and response_1 without a column that says which is better; columns found: "
            f"{listed(sorted(record))}; data.columns={{better_response_id: COLUMN}} says which "
            "column holds the better one's number",
            "better_response_id",
        )
    if len(labels) > 1:
        one, other = labels[:2]
        raise AmbiguousRowError(
            f"two readings: {one} says which response is chosen, or {other} does; choose by "
            f"data.columns={{better_response_id: {one}}} or "
            f"data.columns={{better_response_id: {other}}}"
        )
    [label] = labels
    better = _number_of(label, record[label])
    names = {"chosen": NUMBERED[better], "rejected": NUMBERED[1 - better]}
    for field in NUMBERED:
        if record[field] is None:
            raise RowError(f"{field} is null", field)
    sides = {side: record[field] for side, field in names.items()}
    pair = _recognise_pair(record | sides, named)
    return Layout(
        f"response_0 and response_1, {label} saying which is chosen, in the layout {pair.what}",
        (*(field for field in pair.columns if field not in SIDES), *NUMBERED, label),
        lambda record: pair.read(record | sides),
        names={**pair.names, **names},
    )


def _recognise_rejected(rejected: str) -> Layout:
    """The layout of `messages`, which ends with the chosen response, and the rejected one."""
    return Layout(
        f"messages, ending with the chosen response, and {rejected}",
        ("messages", rejected, *CHAT_FIELDS),
        partial(with_rejected, rejected),
        names={"prompt": "messages", "chosen": "messages", "rejected": rejected},
    )


def _recognise_single(record: Record, named: Sequence[str]) -> Layout:
    response = _only(_present(RESPONSES, record, named), "the response to imitate")
    # in a CSV file the label is text
    if str(record.get("label")).lower() in ("true", "false") and response not in named:
        raise AmbiguousRowError(
            "two readings: label says which responses are good and which bad, as in KTO's data, or "
            "something else; to imitate good ones only take the rows with label=false out of the "
            f"file, data.columns={{{response}: {response}}} imitates all"
        )
    if response in ("messages", "conversations"):
        return Layout(
            f"{response}, the response being what follows the last message of the user",
            (response, *CHAT_FIELDS),
            partial(divided, response),
            names={"prompt": response, "chosen": response},
            single=True,
        )
    prompts = _present(("prompt", *PROMPTS[:2]), record, named)
    if not prompts:
        raise RowError(
            f"no column 'prompt' beside {response}; columns found: {listed(sorted(record))}; "
            "data.columns={prompt: COLUMN} says which column it is",
            "prompt",
        )
    prompt = _only(prompts, "the prompt")
    texts = prompt == "prompt" and isinstance(record[prompt], str)
    texts = texts and not is_messages(record[response])
    columns = (prompt, *(("input",) if prompt == "instruction" else ()), response)
    words = "prompt" if texts else PROMPT_WORDS[prompt]
    return Layout(
        f"{words} and {response}" + (", texts taken as they stand" if texts else ""),
        columns if texts else (*columns, *CHAT_FIELDS),
        partial(with_completion if texts else with_answer, prompt, response),
        names={"prompt": prompt, "chosen": response},
        single=True,
    )


def _present(fields: Sequence[str], record: Record, named: Sequence[str]) -> list[str]:
    """The fields that a record has; if `data.columns` names some of them, only those."""
    present = [field for field in fields if field in record]
    return [field for field in present if field in named] or present


def _only(fields: Sequence[str], role: str) -> str:
    if len(fields) > 1:
        one, other = fields[:2]
        raise AmbiguousRowError(
            f"two readings: {role} is {one}, or it is {other}; choose by "
            f"data.columns={{{one}: {one}}} or data.columns={{{other}: {other}}}"
        )
    return fields[0]


def _number_of(label: str, value: Any) -> int:
    """Number of the better response, 0 or 1, from the value of a label column."""
    if label in WORDS and value not in NUMBERED:
        if isinstance(value, int | float) and value in (0, 1):
            raise AmbiguousRowError(
                f"two readings of {label}={value:g}: the number of the chosen response, or whether "
                "response_0 is chosen; choose by "
                f"'data.columns={{better_response_id: {label}}}' or 'data.columns={{response_0: "
                f"response_1, response_1: response_0, better_response_id: {label}}}'"
            )
        raise RowError(f"{label} must be response_0 or response_1, got {value!r:.40}", label)
    # True == 1, and lists are not hashable
    usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not usable or value not in NUMBERS_MEANT:
        raise RowError(
            f"{label} must be 0 or 1, the number of the better response, got {value!r:.40}", label
        )
    return NUMBERS_MEANT[value]


def _has_sharegpt(record: Record) -> bool:
    return any(is_sharegpt(record.get(field)) for field in TEXT_FIELDS)


def _is_whole(record: Record) -> bool:
    """Whether chosen and rejected are whole dialogues or conversations, which include a prompt."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        # even without a common prompt: such a row is dropped, its layout is the same
        return ASSISTANT_TURN in chosen and ASSISTANT_TURN in rejected
    return isinstance(chosen, list) and is_messages(chosen) and not is_response(chosen[0])


PAIR_FIELDS = (*TEXT_FIELDS, *CHAT_FIELDS)
TEXTS = Layout(
    "prompt, chosen and rejected, texts taken as they stand", TEXT_FIELDS, as_it_is, may_mix=True
)
DIALOGUES = Layout(
    r"chosen and rejected, dialogues with '\n\nAssistant:' turns", SIDES, as_it_is, may_mix=True
)
MESSAGES = Layout("prompt, chosen and rejected as messages", PAIR_FIELDS, as_messages, may_mix=True)
CONVERSATIONS = Layout(
    "chosen and rejected, conversations that begin alike",
    (*SIDES, *CHAT_FIELDS),
    as_messages,
    may_mix=True,
)
SHAREGPT_MESSAGES = Layout(
    "prompt, chosen and rejected as messages of from and value", PAIR_FIELDS, as_messages
)
SHAREGPT_CONVERSATIONS = Layout(
    "chosen and rejected, conversations of from and value that begin alike",
    (*SIDES, *CHAT_FIELDS),
    as_messages,
)
TEXT_PROMPT = Layout(
    "prompt as text, chosen and rejected as messages", PAIR_FIELDS, with_text_prompt
)
PREFERRED_OUTPUTS = Layout(
    "the messages of input, preferred_output and non_preferred_output",
    OPENAI,
    of_openai,
    names=dict(zip(TEXT_FIELDS, OPENAI, strict=True)),
)
