"""Log the account of each split and one example row, before training."""

import logging
from collections.abc import Sequence
from typing import Any

from fastpref.checks import both_ends
from fastpref.config.data import SPLITS
from fastpref.data.encode import PreferenceSplit, load_split
from fastpref.data.options import DataOptions

logger = logging.getLogger("fastpref")


def run_audit(
    options: DataOptions, tokenizer: Any, *, vocab_size: int, splits: Sequence[str] = SPLITS
) -> list[PreferenceSplit]:
    """Read, check and encode splits, and log the account and an example row of each.

    Returns:
        The encoded splits, in their order.

    Raises:
        FastprefError: training on this data would fail.
    """
    read = []
    for split in splits:
        encoded = load_split(options, split, tokenizer, vocab_size=vocab_size, quiet=False)
        logger.info("%s, first row:\n%s", split, describe_example(encoded, tokenizer))
        read.append(encoded)
    return read


def describe_example(split: PreferenceSplit, tokenizer: Any) -> str:
    """Describe the first row of a split as the model sees it, from its token ids.

    Returns:
        A line per part: name, number of tokens, whether they are in the loss, range of the token
        weights if there are any, and the decoded text, shortened in the middle if long.
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
