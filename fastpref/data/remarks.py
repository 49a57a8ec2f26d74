"""Remarks on kept rows: properties that are counted, and their texts in the account."""

from enum import IntFlag, auto


class Remark(IntFlag):
    """Properties of kept rows that are counted and reported."""

    IDENTICAL = auto()
    DUPLICATE = auto()
    CONTRADICTION = auto()
    PROMPT_CUT = auto()
    CHOSEN_CUT = auto()
    REJECTED_CUT = auto()
    EOS_INSIDE = auto()
    EOS_AT_END = auto()
    TEMPLATE_SPLIT = auto()
    TWO_BOS = auto()
    NO_WEIGHTS = auto()
    ZERO_WEIGHTS = auto()
    PROMPT_TWICE = auto()
    RESPONSE_NOT_RENDERED = auto()
    PROMPT_NOT_RENDERED = auto()
    ARGUMENTS_DECODED = auto()
    BORDER_TOKEN = auto()
    TOKENIZED_APART = auto()
    JOINED_DIFFERS = auto()
    EQUAL_WHEN_CUT = auto()
    OTHERS_SPEAK = auto()
    EOS_ADDED = auto()
    TEXT_OF_MESSAGES = auto()
    OTHERS_IN_LOSS = auto()
    UNKNOWN = auto()


REMARK_TEXTS = {
    Remark.IDENTICAL: "chosen equals rejected (no gradient)",
    Remark.DUPLICATE: "pair seen before",
    Remark.CONTRADICTION: "pair seen before with chosen and rejected swapped",
    Remark.PROMPT_CUT: "prompt cut to max_prompt_length",
    Remark.CHOSEN_CUT: "chosen cut, its EOS lost",
    Remark.REJECTED_CUT: "rejected cut, its EOS lost",
    Remark.EOS_INSIDE: "EOS inside a text",
    Remark.EOS_AT_END: "EOS at the end of a text (not doubled)",
    Remark.TEMPLATE_SPLIT: "rendered prompt is no prefix of prompt + response",
    Remark.TWO_BOS: "more than one BOS in the prompt",
    Remark.NO_WEIGHTS: "no token weights in the file (ones instead)",
    Remark.ZERO_WEIGHTS: "all token weights of a response are zero",
    Remark.PROMPT_TWICE: "chosen and rejected begin with the text of prompt, which so stands twice",
    Remark.RESPONSE_NOT_RENDERED: "the chat template leaves out a part of a response",
    Remark.PROMPT_NOT_RENDERED: "the chat template leaves out tools or a system message",
    Remark.ARGUMENTS_DECODED: "arguments of tool calls were decoded, the chat template fails on "
    "their JSON text",
    Remark.BORDER_TOKEN: "the last characters of the prompt and the first ones of a response are "
    "one token, which is taken for the response's",
    Remark.TOKENIZED_APART: "prompt and response were tokenized one by one: the tokenizer tells no "
    "offsets, and the prompt's tokens do not begin those of prompt + response",
    Remark.JOINED_DIFFERS: "prompt + response tokenized as one text are other tokens than one by "
    "one, which is the rule of the seed repositories",
    Remark.EQUAL_WHEN_CUT: "chosen and rejected are equal only as max_length, max_prompt_length "
    "and data.truncation cut them",
    Remark.OTHERS_SPEAK: "a response holds messages that are not the assistant's, such as results "
    "of tools: read, not learned",
    Remark.EOS_ADDED: "the chat template ends a response with something else than EOS, which is "
    "put behind it",
    Remark.TEXT_OF_MESSAGES: "a text is a list of messages written out, and taken as it stands",
    Remark.OTHERS_IN_LOSS: "where messages that are not the assistant's stand in a response is not "
    "known, so they are in the loss as well: the chat template renders the beginning of the "
    "conversation in another way than the whole, or the tokenizer tells no offsets",
    Remark.UNKNOWN: "a text has characters that are no token of the tokenizer, and one unknown "
    "token stands for all of them",
}
ORDINARY = (
    Remark.PROMPT_CUT
    | Remark.CHOSEN_CUT
    | Remark.REJECTED_CUT
    | Remark.EOS_AT_END
    | Remark.ARGUMENTS_DECODED
    | Remark.EOS_ADDED
    | Remark.OTHERS_SPEAK
)
"""Remarks that are reported without a warning."""
