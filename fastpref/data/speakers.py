"""Find the spans of a response that the assistant writes; other messages in it are context only.

Found by rendering growing prefixes of the conversation: the text that an assistant message adds to
the prefix before it and the generation prompt, including the end-of-turn marker, is what a model
generates there.
"""

from collections.abc import Callable, Sequence

from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import RowError

Spans = list[tuple[int, int]]
"""[start, end) characters, ascending."""
Render = Callable[..., str]
"""Renders messages to text, see `ChatFormat.render`."""
ASSISTANT = "assistant"


def others_are_learned(answers: Sequence[Messages], written: Sequence[Spans | None]) -> bool:
    """Whether a response that is in the loss as a whole contains messages of other roles."""
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
    """Spans of each rendered conversation that the assistant writes.

    Args:
        prompt, answers: Messages of the prompt and of each response.
        prompt_text, texts: The same as rendered, responses without their final EOS.
        render: The chat template.

    Returns:
        For each response one span of prompt + response per assistant message; a span that ends
        with the text includes the EOS to be appended. None, the whole response, if it is a single
        assistant message, or if the rendering of a prefix does not match that of the whole.
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
                # text before the border belongs to the prompt
                start = border if start is None else max(border, start)
            is_last = i == len(answer) - 1
            until = [*prompt, *answer[: i + 1]]
            # without the white space that the template puts behind the turn
            end = len(text) if is_last else _end_in(render(until).rstrip(), text)
        except RowError:
            # some templates reject a prefix of a conversation
            return None
        if start is None or end is None or not (spans[-1][1] if spans else border) <= start <= end:
            return None
        spans.append((start, end))
    return spans


def written_tokens(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Whether each token overlaps one of the spans.

    Args:
        offsets: [start, end) characters of each token.
        spans: Character ranges of the same text.
    """
    # a character of several byte tokens: some tokenizers give all but one of them zero width
    return [
        any(start < stop and max(end, start + 1) > begin for begin, stop in spans)
        for start, end in offsets
    ]


def num_equal(one: str, other: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _turn_start(messages: Messages, text: str, render: Render) -> int | None:
    """Start in `text` of the assistant's turn after some messages, behind its header."""
    before, prompted = render(messages), render(messages, generation_prompt=True)
    end = _end_in(before, text)
    if end is None or not prompted.startswith(before):
        return None
    # the generation prompt may contain text that the whole conversation lacks, such as an empty
    # reasoning block
    return end + num_equal(prompted[len(before) :], text[end:])


def _end_in(beginning: str, text: str) -> int | None:
    """End in `text` of a prefix of the conversation that was rendered by itself.

    The prefix may have one insertion that `text` lacks: reasoning, which some templates render in
    the last turn only, or tools and system message, which some put into the last user turn.

    Returns:
        The end; None if the two differ in any other way.
    """
    agreed = num_equal(beginning, text)
    for start in range(agreed, len(beginning.rstrip())):
        # compare a few characters first: the rest may be as long as the conversation
        if text.startswith(beginning[start : start + 32], agreed) and text.startswith(
            beginning[start:], agreed
        ):
            return agreed + len(beginning) - start
    return agreed if agreed == len(beginning) else None
