"""Layouts of rows: what the columns and values of a record say of prompt and responses.

A layout brings a record to the fields that `rows` checks, `prompt`, `chosen` and `rejected`; for
SFT also a record of one response, which becomes `chosen`. Texts named `prompt` are taken as they
stand; what is named `question` or `instruction` is a turn of the user, for the chat template.
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
"""Columns that stand for `prompt` where it is not there."""
NUMBERED = ("response_0", "response_1")
NUMBERS = ("better_response_id", "safer_response_id", "winner")
"""Columns that name the better response by its number."""
WORDS = ("preference", "preferred", "label")
"""Columns whose numbers have two readings, and whose texts may name a column."""
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
}
"""What the log calls them."""


class AmbiguousRowError(RowError):
    """Rows that can be read in two ways: whoever runs must choose."""


class Layout(NamedTuple):
    """How one record is laid out."""

    what: str
    """What the log calls it; layouts of one source are the same where this is."""
    columns: tuple[str, ...]
    """Fields that are read."""
    read: Callable[[Record], Record]
    """To the fields that `parse_row` takes."""
    names: Mapping[str, str] = MappingProxyType({})
    """Fields that `parse_row` may complain of -> what they were."""
    may_mix: bool = False
    """Rows of other layouts of which this holds may stand in one file with it."""
    single: bool = False
    """One response a row, for SFT."""

    def is_beside(self, other: "Layout") -> bool:
        """Whether rows of both may stand in one source."""
        return self.what == other.what or (self.may_mix and other.may_mix)


def recognise(record: Record, named: Sequence[str] = (), *, single: bool) -> Layout:
    """How a record is laid out.

    Args:
        record: With `data.columns` applied.
        named: Fields that `data.columns` names: they come before others.
        single: Take a row of one response.

    Raises:
        RowError: in no way that is known.
        AmbiguousRowError: in two ways.
    """
    # beside two responses what may be a prompt is that
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
    """Two responses by number and the column that says which of them is better."""
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


def _recognise_single(record: Record, named: Sequence[str]) -> Layout:
    response = _only(_present(RESPONSES, record, named), "the response to imitate")
    # of a table of text it is a word
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
    """Fields that a record has, only those that `data.columns` names where it names any."""
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
    """The number of the better response."""
    if label in WORDS and value not in NUMBERED:
        if isinstance(value, int | float) and value in (0, 1):
            raise AmbiguousRowError(
                f"two readings of {label}={value:g}: the number of the chosen response, or whether "
                "response_0 is chosen; choose by "
                f"'data.columns={{better_response_id: {label}}}' or 'data.columns={{response_0: "
                f"response_1, response_1: response_0, better_response_id: {label}}}'"
            )
        raise RowError(f"{label} must be response_0 or response_1, got {value!r:.40}", label)
    # True == 1, and a list has no hash
    usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not usable or value not in NUMBERS_MEANT:
        raise RowError(
            f"{label} must be 0 or 1, the number of the better response, got {value!r:.40}", label
        )
    return NUMBERS_MEANT[value]


def _has_sharegpt(record: Record) -> bool:
    return any(is_sharegpt(record.get(field)) for field in TEXT_FIELDS)


def _is_whole(record: Record) -> bool:
    """Whether chosen and rejected are whole dialogues or conversations, which need no prompt."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        # that they share no prompt is a reason to leave the row out, not another layout
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
