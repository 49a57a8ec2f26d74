"""What a user sees of the data before training: the account of each split, one example."""

import logging
from typing import Any

from fastpref.checks import both_ends
from fastpref.config.data import SPLITS
from fastpref.data.encode import PreferenceSplit, load_split
from fastpref.data.options import DataOptions

logger = logging.getLogger("fastpref")


def run_audit(options: DataOptions, tokenizer: Any, *, vocab_size: int) -> list[PreferenceSplit]:
    """`task=audit`: read, check and encode every split; the account and an example go to the log.

    Returns:
        The encoded splits, train first.

    Raises:
        FastprefError: as training on this data would.
    """
    splits = []
    for split in SPLITS:
        encoded = load_split(options, split, tokenizer, vocab_size=vocab_size, quiet=False)
        logger.info("%s, first row:\n%s", split, describe_example(encoded, tokenizer))
        splits.append(encoded)
    return splits


def describe_example(split: PreferenceSplit, tokenizer: Any) -> str:
    """The first row of a split as the model sees it: the texts of its ids, what the loss counts.

    Returns:
        A line per part: its name, tokens, whether they are in the loss, the text (its middle left
        out where long), and the range of token weights where there are any.
    """
    row = split.dataset[0]
    lines = [_part("prompt", row["prompt_ids"], "not in the loss", tokenizer)]
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_ids"]
        if not ids:
            continue
        scored = row.get(f"{side}_scored")
        ending = "in the loss, " if scored is None else f"{sum(scored)} of them in the loss, "
        ending += "EOS last" if ids[-1] == tokenizer.eos_token_id else "cut, no EOS"
        weights = row.get(f"{side}_weights")
        if weights:
            ending += f", weights {min(weights):.3g} to {max(weights):.3g}, last {weights[-1]:.3g}"
        lines.append(_part(side, ids, ending, tokenizer))
    return "\n".join(lines)


def _part(name: str, ids: list[int], comment: str, tokenizer: Any) -> str:
    return f"  {name} ({len(ids)} tokens, {comment}): {both_ends(tokenizer.decode(ids))!r}"
