"""Turn the tokens of one row into model inputs: EOS, token weights, reversal, truncation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

from fastpref.data.chat import ChatFormat
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import WEIGHT_FIELDS
from fastpref.data.remarks import Remark
from fastpref.data.row_tokens import RowTokens, Scored
from fastpref.data.tokenizer_checks import unknown_id
from fastpref.token_weights import align_weights, prepare_weights, token_digest

TOO_LONG = "longer than max_length"
NOTHING_SCORED = "nothing that the assistant writes is in a response"


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options that determine how a row is encoded; most have the name of their option."""

    sft: bool
    """Encode one response per row, the SFT target."""
    weighted: bool
    """Give every response token a weight."""
    max_length: int
    max_prompt_length: int
    truncation: str
    truncation_mode: str
    reverse_dataset: bool
    eos_weight: float | None
    transform_method: str
    transform_params: dict[str, float]
    seed: int
    """Seed of the transform `random`."""
    chat_template: str | None
    """Jinja text; None for the tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    chat_date: str | None = None
    """Date given to a chat template that prints it, "2026-11-30"; None: today."""
    on_error: str
    strict: bool
    weights_have_eos: bool = False
    """The last weight of each list in the file belongs to EOS."""
    weights_mismatch: str = ""
    """Why the tokens may differ from those that the weights were estimated for, for the error."""

    def chat(self, tokenizer: Any) -> ChatFormat:
        """The chat template with its arguments."""
        return ChatFormat(
            tokenizer=tokenizer,
            template=self.chat_template,
            arguments=self.template_kwargs,
            date=self.chat_date,
        )


class EncodedPair(NamedTuple):
    """A row of the encoded dataset; without ids if it is dropped."""

    prompt_ids: Sequence[int] = ()
    response_ids: Sequence[Sequence[int]] = ()
    """Chosen and rejected, or in SFT the one response."""
    response_weights: Sequence[Sequence[float]] = ()
    """One weight per id of `response_ids` if the loss is weighted."""
    remarks: Remark = Remark(0)
    drop: str = ""
    note: str = ""
    lengths: Sequence[int] = ()
    """Tokens of the prompt and of each response with its EOS, before truncation."""
    scored: Sequence[Scored] = ()
    """For each response, which of its ids are in the loss."""

    def columns(self) -> dict[str, Any]:
        """The row as columns of the encoded dataset; a missing response is empty."""
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
    """Responses of a checked row to encode, by column.

    Chosen and rejected as in the file; in SFT the target: `sft_target` if the row has one and
    `reverse_dataset` is off, else the response that is chosen after `reverse_dataset`.
    """
    if not options.sft:
        return {"chosen": row["chosen"], "rejected": row["rejected"]}
    if row["sft_target"] and not options.reverse_dataset:
        return {"sft_target": row["sft_target"]}
    side = "rejected" if options.reverse_dataset else "chosen"
    return {side: row[side]}


def encode_row(
    row: dict[str, Any], tokens: RowTokens, tokenizer: Any, options: EncodeOptions
) -> EncodedPair:
    """Append EOS to the responses of one row, align token weights, reverse and truncate.

    Args:
        row: A checked row.
        tokens: Tokens of its prompt and of its `named_responses`.
        tokenizer: That made them.

    Raises:
        RowError: the weights do not fit the tokens.
    """
    if tokens.drop:
        return EncodedPair(drop=tokens.drop, note=tokens.note)
    responses = _responses(row, tokens, options)
    if options.reverse_dataset and not options.sft:
        responses.reverse()
    eos_id = tokenizer.eos_token_id
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
    kept = (prompt_ids, *response_ids)
    remarks = Remark(row["remarks"]) | tokens.remarks | _cut_remarks(full, kept)
    unknown = unknown_id(tokenizer)
    if unknown is not None and any(unknown in part for part in kept):
        remarks |= Remark.UNKNOWN
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
    """A response as in the file, not truncated and without EOS."""

    ids: list[int]
    scored: Scored
    weights: list[float] | None
    """Transformed weights; None if the loss is not weighted."""


def _responses(row: dict[str, Any], tokens: RowTokens, options: EncodeOptions) -> list[_Response]:
    weights: Sequence[list[float] | None] = [None] * len(tokens.responses)
    if options.weighted:
        _check_weights_digest(row, tokens, options)
        weights = _response_weights(row, tokens, options)
    # `scored` of a text row has two entries, in SFT too
    scored = tokens.scored[: len(tokens.responses)]
    return list(map(_Response, tokens.responses, scored, weights))


def _check_weights_digest(row: dict[str, Any], tokens: RowTokens, options: EncodeOptions) -> None:
    """Refuse estimated weights that belong to other tokens.

    A row without a digest passes, as the origin of its weights is unknown.

    Raises:
        RowError: the digest is not that of these tokens.
    """
    digest = row["weights_digest"]
    if digest is not None and digest != token_digest(tokens.prompt, *tokens.responses):
        raise RowError(f"the weights belong to other tokens: {options.weights_mismatch}", "")


def _response_weights(
    row: dict[str, Any], tokens: RowTokens, options: EncodeOptions
) -> list[list[float]]:
    """Transformed weights of chosen and rejected as in the file; ones if the row has no weights.

    Args:
        row: A checked row.
        tokens: Tokens of its two responses. Those that are not in the loss get weight 0 and are
            hidden from the transform.
        options: Transform and seed.

    Raises:
        RowError: the number of weights is not that of the response's tokens.
    """
    sides = (row["chosen_weights"], row["rejected_weights"])
    if sides[0] is None:
        return [[1.0] * len(response) for response in tokens.responses]
    has_eos = options.weights_have_eos
    for name, weights, response in zip(WEIGHT_FIELDS, sides, tokens.responses, strict=True):
        if len(weights) != len(response) + has_eos:
            raise RowError(
                f"{name} must have one weight per token of the response "
                f"{'and one of EOS' if has_eos else 'without EOS'}: "
                f"expected {len(response) + has_eos}, found {len(weights)}",
                name,
            )
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
        options: Uses `truncation`, `max_length` and `max_prompt_length`.
        keep_end: Cut the prompt's start, not its end.

    Returns:
        Prompt and responses, at least one token each; None: drop the row.
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
    """Whether truncation keeps the end of a long prompt, not its start."""
    if options.truncation_mode == "auto":
        # a conversation must keep its last turn and the generation prompt
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
