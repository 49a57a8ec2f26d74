"""What of a response the assistant writes: the rest of several messages is read, not learned.

Found by rendering ever longer beginnings of the conversation: what a beginning that ends with a
message of the assistant adds to the one before it and to the generation prompt, its end-of-turn
marker included, is what a model writes there.
"""

from collections.abc import Callable, Sequence

from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import RowError

Spans = list[tuple[int, int]]
"""[start, end) characters, ascending."""
Render = Callable[..., str]
"""The text of messages, see `ChatFormat.render`."""
ASSISTANT = "assistant"


def others_are_learned(answers: Sequence[Messages], written: Sequence[Spans | None]) -> bool:
    """Whether others speak in a response of which all is learned."""
    return any(
        spans is None and any(message["role"] != ASSISTANT for message in answer)
        for answer, spans in zip(answers, written, strict=True)
    )


def written_spans(
    prompt: Messages,
    answers: Sequence[Messages],
    prompt_text: str,
    texts: Sequence[str],
    render: Render,
) -> list[Spans | None]:
    """Where in each rendered conversation the assistant writes.

    Args:
        prompt, answers: Messages of the prompt and of its responses, as they are rendered.
        prompt_text, texts: The same rendered, responses without the EOS at their end.
        render: The chat template.

    Returns:
        Of prompt + response a span for each message of the assistant, of which one that ends the
        text goes on with EOS. None, all of the response, where it is one message of the assistant,
        or the template renders a beginning of the conversation in another way than the whole.
    """
    return [
        None
        if [message["role"] for message in answer] == [ASSISTANT]
        else _written_spans(prompt, answer, prompt_text + text, len(prompt_text), render)
        for answer, text in zip(answers, texts, strict=True)
    ]


def _written_spans(
    prompt: Messages, answer: Messages, text: str, border: int, render: Render
) -> Spans | None:
    spans: Spans = []
    for i, message in enumerate(answer):
        if message["role"] != ASSISTANT:
            continue
        try:
            start = _turn_start([*prompt, *answer[:i]], text, render)
            if i == 0:
                # before that is what a template put into the prompt alone
                start = border if start is None else max(border, start)
            is_last = i == len(answer) - 1
            end = len(text) if is_last else _turn_end([*prompt, *answer[: i + 1]], text, render)
        except RowError:
            # not every beginning of a conversation is one for every template
            return None
        if start is None or end is None or not (spans[-1][1] if spans else border) <= start <= end:
            return None
        spans.append((start, end))
    return spans


def written_tokens(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Which tokens hold a character of some spans.

    Args:
        offsets: [start, end) characters of each token.
        spans: Characters of the same text.
    """
    # of the bytes of one character some tokenizers give all but one no width
    return [
        any(start < stop and max(end, start + 1) > begin for begin, stop in spans)
        for start, end in offsets
    ]


def num_equal(one: str, other: str) -> int:
    """Characters that two texts both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _turn_start(messages: Messages, text: str, render: Render) -> int | None:
    """Where in `text` the assistant's turn begins that follows some messages."""
    before, prompted = render(messages), render(messages, generation_prompt=True)
    end = _end_in(before, text)
    if end is None or not prompted.startswith(before):
        return None
    # behind the prompt of an answer that is given may stand what the whole conversation leaves out,
    # such as an empty thought
    return end + num_equal(prompted[len(before) :], text[end:])


def _turn_end(messages: Messages, text: str, render: Render) -> int | None:
    """Where in `text` the last of some messages ends, white space behind it left out."""
    return _end_in(render(messages).rstrip(), text)


def _end_in(beginning: str, text: str) -> int | None:
    """Where in `text` a beginning of the conversation ends, rendered by itself.

    It may say more at one place than `text` does: the reasoning of what is the last turn there, or
    the tools and the system message, which some templates put into the last turn of the user.

    Returns:
        The end, None where they differ in another way.
    """
    agreed = num_equal(beginning, text)
    for start in range(agreed, len(beginning.rstrip())):
        # a few characters first: the rest is as long as the conversation
        if text.startswith(beginning[start : start + 32], agreed) and text.startswith(
            beginning[start:], agreed
        ):
            return agreed + len(beginning) - start
    return agreed if agreed == len(beginning) else None
