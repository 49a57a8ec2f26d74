"""The tokens of one checked row -> ids and weights: EOS, alignment, reversal, truncation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

from fastpref.data.chat import ChatFormat
from fastpref.data.counts import Remark
from fastpref.data.layouts.row_values import RowError
from fastpref.data.row_tokens import RowTokens, Scored
from fastpref.token_weights import align_weights, prepare_weights, token_digest

TOO_LONG = "longer than max_length"
NOTHING_SCORED = "nothing that the assistant writes is in a response"


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
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    chat_date: str | None = None
    """The day that a chat template which prints the date is told, "2026-11-30"; None: today."""
    on_error: str
    strict: bool
    weights_have_eos: bool = False
    """The last weight of each list in the file belongs to EOS."""
    weights_mismatch: str = ""
    """Why weights would stand beside other tokens than those they were estimated for."""

    def chat(self, tokenizer: Any) -> ChatFormat:
        """How conversations become text."""
        return ChatFormat(
            tokenizer=tokenizer,
            template=self.chat_template,
            arguments=self.template_kwargs,
            date=self.chat_date,
        )


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
    lengths: Sequence[int] = ()
    """Tokens of the prompt and of each response with its EOS before anything was cut."""
    scored: Sequence[Scored] = ()
    """Which of `response_ids` are in the loss."""

    def columns(self) -> dict[str, Any]:
        """The same as columns of the encoded dataset; a side that is not there is empty."""
        chosen_ids, rejected_ids = [*self.response_ids, (), ()][:2]
        chosen_weights, rejected_weights = [*self.response_weights, (), ()][:2]
        chosen_scored, rejected_scored = [*self.scored, None, None][:2]
        return {
            "prompt_ids": self.prompt_ids,
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "chosen_weights": chosen_weights,
            "rejected_weights": rejected_weights,
            "chosen_scored": chosen_scored,
            "rejected_scored": rejected_scored,
            "remarks": int(self.remarks),
            "drop": self.drop,
            "note": self.note,
            "lengths": self.lengths,
        }


def named_responses(row: dict[str, Any], options: EncodeOptions) -> dict[str, str]:
    """The responses of a checked row that are encoded, by name of the side.

    Chosen and rejected as the file has them; in SFT the one to imitate: the row's own target if it
    has one, else what is chosen after `reverse_dataset`.
    """
    if not options.sft:
        return {"chosen": row["chosen"], "rejected": row["rejected"]}
    if row["sft_target"] and not options.reverse_dataset:
        return {"sft_target": row["sft_target"]}
    side = "rejected" if options.reverse_dataset else "chosen"
    return {side: row[side]}


def encode_row(
    row: dict[str, Any], tokens: RowTokens, eos_id: int, options: EncodeOptions
) -> EncodedPair:
    """EOS, token weights, reversal and truncation of one row.

    Args:
        tokens: Of its prompt and of its `named_responses`.

    Raises:
        RowError: weights that do not fit the tokens.
    """
    if tokens.drop:
        return EncodedPair(drop=tokens.drop, note=tokens.note)
    responses = _responses(row, tokens, options)
    if options.reverse_dataset and not options.sft:
        responses.reverse()
    full = (tokens.prompt, *([*response.ids, eos_id] for response in responses))
    lengths = [len(part) for part in full]
    cut = truncate(full[0], full[1:], options, keep_end=keeps_end(row["form"], options))
    if cut is None:
        return EncodedPair(drop=TOO_LONG, lengths=lengths)
    prompt_ids, response_ids = cut
    scored = [
        response.scored and response.scored[: len(ids)]
        for response, ids in zip(responses, response_ids, strict=True)
    ]
    if not all(marks is None or any(marks) for marks in scored):
        return EncodedPair(drop=NOTHING_SCORED, lengths=lengths)
    has_eos = options.weights_have_eos and row["chosen_weights"] is not None
    weights = [
        align_weights(response.weights, len(ids), options.eos_weight, has_eos=has_eos)
        for response, ids in zip(responses, response_ids, strict=True)
        if response.weights is not None
    ]
    remarks = (
        Remark(row["remarks"]) | tokens.remarks | _cut_remarks(full, (prompt_ids, *response_ids))
    )
    if weights and row["chosen_weights"] is None:
        remarks |= Remark.NO_WEIGHTS
    return EncodedPair(
        prompt_ids,
        response_ids,
        weights,
        remarks,
        note=tokens.note,
        lengths=lengths,
        scored=[None if marks is None or all(marks) else marks for marks in scored],
    )


class _Response(NamedTuple):
    """A response as the file has it, whole and without EOS."""

    ids: list[int]
    scored: Scored
    weights: list[float] | None
    """Prepared; None where the loss knows none."""


def _responses(row: dict[str, Any], tokens: RowTokens, options: EncodeOptions) -> list[_Response]:
    weights: Sequence[list[float] | None] = [None] * len(tokens.responses)
    if options.weighted:
        check_weights_digest(row, tokens.prompt, tokens.responses, options)
        weights = response_weights(row, tokens, options)
    # a row of texts has marks of two responses, in SFT as well
    scored = tokens.scored[: len(tokens.responses)]
    return list(map(_Response, tokens.responses, scored, weights))


def check_weights_digest(
    row: dict[str, Any], prompt: list[int], responses: Sequence[list[int]], options: EncodeOptions
) -> None:
    """Refuse estimated weights that stand beside other tokens than those they belong to.

    Args:
        row: A checked row; one without a digest passes, its weights are of unknown origin.
        prompt: Its prompt's ids.
        responses: Chosen and rejected as the file has them, without EOS.

    Raises:
        RowError: the digest is that of other tokens.
    """
    digest = row["weights_digest"]
    if digest is not None and digest != token_digest(prompt, *responses):
        raise RowError(f"the weights belong to other tokens: {options.weights_mismatch}", "")


def response_weights(
    row: dict[str, Any], tokens: RowTokens, options: EncodeOptions
) -> list[list[float]]:
    """Prepared weights of chosen and rejected as the file has them; ones where it has none.

    Args:
        row: A checked row.
        tokens: Of its two responses. Those that are not in the loss weigh 0, and the transform does
            not see their weights.
        options: Transform and seed.

    Raises:
        RowError: a list is not as long as its response.
    """
    chosen, rejected = row["chosen_weights"], row["rejected_weights"]
    lengths = [len(response) for response in tokens.responses]
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
    sides = (chosen, rejected)
    marks = [
        [True] * len(weights) if of_side is None else of_side[: len(weights)]
        for weights, of_side in zip(sides, tokens.scored, strict=True)
    ]
    learned = [list(compress(weights, kept)) for weights, kept in zip(sides, marks, strict=True)]
    prepared = prepare_weights(
        learned[0],
        learned[1],
        options.transform_method,
        options.transform_params,
        row_seed=f"{options.seed}:{row['row']}",
    )
    return [
        [next(values) if is_kept else 0.0 for is_kept in kept]
        for values, kept in zip(map(iter, prepared), marks, strict=True)
    ]


def truncate(
    prompt: list[int], responses: Sequence[list[int]], options: EncodeOptions, *, keep_end: bool
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
        return prompt, list(responses)
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


def keeps_end(form: str, options: EncodeOptions) -> bool:
    """Whether of a prompt that is too long the end stays."""
    if options.truncation_mode == "auto":
        # of a conversation the last turn and the generation prompt, without which none answers
        return form != "text"
    return options.truncation_mode == "keep_end"


def _cut_remarks(full: tuple[list[int], ...], kept: tuple[list[int], ...]) -> Remark:
    remarks = Remark(0)
    names = (Remark.PROMPT_CUT, Remark.CHOSEN_CUT, Remark.REJECTED_CUT)
    for name, before, after in zip(names, full, kept, strict=False):
        if len(after) < len(before):
            remarks |= name
    if len(kept) == 3 and kept[1] == kept[2]:
        remarks |= Remark.IDENTICAL
        remarks |= Remark.EQUAL_WHEN_CUT if full[1] != full[2] else Remark(0)
    return remarks
