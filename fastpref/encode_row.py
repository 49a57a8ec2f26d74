"""One checked row -> token ids and weights: EOS, alignment, reversal, truncation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastpref.chat import render_chat
from fastpref.counts import Remark
from fastpref.rows import EMPTY_RESPONSE, RowError
from fastpref.token_weights import align_weights, prepare_weights, token_digest

TOO_LONG = "longer than max_length"


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What decides how a row becomes token ids; most fields are the options of that name."""

    sft: bool
    """One response a row: the one to imitate."""
    weighted: bool
    """Give every response token its weight."""
    max_length: int
    max_prompt_length: int
    truncation: str
    truncation_mode: str
    reverse_dataset: bool
    eos_weight: float | None
    transform_method: str
    transform_params: dict[str, float]
    seed: int
    """Of the transform `random`."""
    chat_template: str | None
    """Jinja text; None for the tokenizer's own."""
    on_error: str
    strict: bool
    weights_have_eos: bool = False
    """The last weight of each list in the file belongs to EOS."""
    weights_mismatch: str = ""
    """Why weights would stand beside other tokens than those they were estimated for."""


class RowTexts(NamedTuple):
    """The texts of a row, ready to be tokenized one by one: prompt, then its responses."""

    texts: list[str]
    is_split: bool = False
    """The prompt as rendered did not start prompt + response: they were divided where they part."""
    error: RowError | None = None
    """Why there are no texts."""


class EncodedPair(NamedTuple):
    """A row of the encoded dataset, empty where it is dropped."""

    prompt_ids: Sequence[int] = ()
    response_ids: Sequence[Sequence[int]] = ()
    """Chosen and rejected, or in SFT the one response."""
    response_weights: Sequence[Sequence[float]] = ()
    """Beside `response_ids` where the loss is weighted."""
    remarks: Remark = Remark(0)
    drop: str = ""
    note: str = ""

    def columns(self) -> dict[str, Any]:
        """The same as columns of the encoded dataset; a side that is not there is empty."""
        chosen_ids, rejected_ids = [*self.response_ids, (), ()][:2]
        chosen_weights, rejected_weights = [*self.response_weights, (), ()][:2]
        return {
            "prompt_ids": self.prompt_ids,
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "chosen_weights": chosen_weights,
            "rejected_weights": rejected_weights,
            "remarks": int(self.remarks),
            "drop": self.drop,
            "note": self.note,
        }


def row_texts(row: dict[str, Any], tokenizer: Any, options: EncodeOptions) -> RowTexts:
    """Prompt and responses of a checked row as texts, conversations rendered.

    The responses are chosen and rejected as the file has them; in SFT the one to imitate: the
    row's own target if it has one, else what is chosen after `reverse_dataset`.
    """
    responses = [row["chosen"], row["rejected"]]
    if options.sft:
        target = None if options.reverse_dataset else row["sft_target"]
        responses = [target or responses[options.reverse_dataset]]
    if row["form"] != "chat":
        return RowTexts([row["prompt"], *responses])
    try:
        prompt, responses, is_prefix = render_chat(
            row["prompt"], responses, tokenizer, options.chat_template
        )
    except RowError as error:
        return RowTexts([], error=error)
    return RowTexts([prompt, *responses], is_split=not is_prefix)


def encode_row(
    row: dict[str, Any],
    texts: RowTexts,
    ids: list[list[int]],
    tokenizer: Any,
    options: EncodeOptions,
) -> EncodedPair:
    """EOS, token weights, reversal and truncation of one row.

    Args:
        row: A checked row.
        texts: What `row_texts` made of it.
        ids: Of each of these texts.
        tokenizer: For its special tokens.
        options: How to encode.

    Raises:
        RowError: no texts, no prompt token, or weights that do not fit the tokens.
    """
    _check_texts(texts, ids, options)
    prompt, *raw_responses = ids
    eos_id = tokenizer.eos_token_id
    responses = [without_final_eos(response, eos_id) for response in raw_responses]
    if not all(responses):
        return EncodedPair(drop=EMPTY_RESPONSE)
    remarks = Remark(row["remarks"])
    remarks |= Remark.TEMPLATE_SPLIT if texts.is_split else 0
    remarks |= Remark.EOS_AT_END if responses != raw_responses else 0
    # the turns of a conversation may each end in EOS
    has_eos = row["form"] != "chat" and any(eos_id in part for part in (prompt, *responses))
    remarks |= Remark.EOS_INSIDE if has_eos else 0
    remarks |= Remark.TWO_BOS if prompt[:2] == [tokenizer.bos_token_id] * 2 else 0

    weights: list[list[float]] = []
    if options.weighted:
        check_weights_digest(row, prompt, responses, options)
        weights = response_weights(row, [len(response) for response in responses], options)
        remarks |= Remark.NO_WEIGHTS if row["chosen_weights"] is None else 0
    if options.reverse_dataset and not options.sft:
        responses, weights = responses[::-1], weights[::-1]
    full = [[*response, eos_id] for response in responses]
    cut = truncate(prompt, full, options, keep_end=_keeps_end(row["form"], options))
    if cut is None:
        return EncodedPair(drop=TOO_LONG)
    prompt_ids, response_ids = cut
    kept_weights = [
        align_weights(
            weights[side],
            len(kept),
            options.eos_weight,
            has_eos=options.weights_have_eos and row["chosen_weights"] is not None,
        )
        for side, kept in enumerate(response_ids[: len(weights)])
    ]
    remarks |= _cut_remarks((prompt, *full), (prompt_ids, *response_ids))
    return EncodedPair(prompt_ids, response_ids, kept_weights, remarks)


def without_final_eos(ids: list[int], eos_id: int) -> list[int]:
    """A response's ids without an EOS that its text spelled out: token weights leave it out."""
    return ids[:-1] if ids and ids[-1] == eos_id else ids


def check_weights_digest(
    row: dict[str, Any], prompt: list[int], responses: list[list[int]], options: EncodeOptions
) -> None:
    """Refuse estimated weights that stand beside other tokens than those they belong to.

    Args:
        row: A checked row; one without a digest passes, its weights are of unknown origin.
        prompt: Its prompt's ids.
        responses: Chosen and rejected as the file has them, without EOS.
        options: For the reason to give.

    Raises:
        RowError: the digest is that of other tokens.
    """
    digest = row["weights_digest"]
    if digest is not None and digest != token_digest(prompt, *responses):
        raise RowError(f"the weights belong to other tokens: {options.weights_mismatch}", "")


def response_weights(
    row: dict[str, Any], lengths: list[int], options: EncodeOptions
) -> list[list[float]]:
    """Prepared weights of chosen and rejected as the file has them; ones where it has none.

    Args:
        row: A checked row.
        lengths: Tokens of the two untruncated responses, without EOS.
        options: Transform and seed.

    Raises:
        RowError: a list is not as long as its response.
    """
    chosen, rejected = row["chosen_weights"], row["rejected_weights"]
    num_eos = int(options.weights_have_eos)
    if chosen is None:
        return [[1.0] * length for length in lengths]
    for side, weights, length in (
        ("chosen", chosen, lengths[0] + num_eos),
        ("rejected", rejected, lengths[1] + num_eos),
    ):
        if len(weights) != length:
            raise RowError(
                f"{side}_weight must have one weight per token of the response "
                f"{'and one of EOS' if num_eos else 'without EOS'}: "
                f"expected {length}, found {len(weights)}",
                f"{side}_weight",
            )
    return prepare_weights(
        chosen,
        rejected,
        options.transform_method,
        options.transform_params,
        row_seed=f"{options.seed}:{row['row']}",
    )


def truncate(
    prompt: list[int], responses: list[list[int]], options: EncodeOptions, *, keep_end: bool
) -> tuple[list[int], list[list[int]]] | None:
    """Cut prompt and responses so that prompt + response fits `max_length` (option `truncation`).

        seed    if prompt + longer response is too long, the prompt is cut to max_prompt_length;
                if it still is, every response is cut to max_length - max_prompt_length
        fill    the prompt as in seed; then each response to max_length - len(prompt)
        drop    None if prompt + longer response is too long

    A response that is cut loses its EOS.

    Args:
        prompt: Prompt ids.
        responses: Ids of each response, EOS included.
        options: For `truncation`, `max_length` and `max_prompt_length`.
        keep_end: Cut the prompt's start, not its end.

    Returns:
        Prompt and responses, at least one token each.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest <= options.max_length:
        return prompt, responses
    if options.truncation == "drop":
        return None
    if len(prompt) > options.max_prompt_length:
        side = (
            slice(-options.max_prompt_length, None)
            if keep_end
            else slice(options.max_prompt_length)
        )
        prompt = prompt[side]
    if options.truncation == "fill":
        budget = options.max_length - len(prompt)
    elif len(prompt) + longest > options.max_length:
        budget = options.max_length - options.max_prompt_length
    else:
        budget = longest
    return prompt, [response[:budget] for response in responses]


def _check_texts(texts: RowTexts, ids: list[list[int]], options: EncodeOptions) -> None:
    if texts.error is not None:
        raise texts.error
    if texts.is_split and options.strict:
        raise RowError("the rendered prompt does not start prompt + response (data.strict=true)")
    if not ids[0]:
        raise RowError("prompt is empty: at least one token must come before the response")


def _keeps_end(form: str, options: EncodeOptions) -> bool:
    if options.truncation_mode == "auto":
        return form == "hh"
    return options.truncation_mode == "keep_end"


def _cut_remarks(full: tuple[list[int], ...], kept: tuple[list[int], ...]) -> Remark:
    remarks = Remark(0)
    names = (Remark.PROMPT_CUT, Remark.CHOSEN_CUT, Remark.REJECTED_CUT)
    for name, before, after in zip(names, full, kept, strict=False):
        if len(after) < len(before):
            remarks |= name
    if len(kept) == 3 and kept[1] == kept[2]:
        remarks |= Remark.IDENTICAL
    return remarks
