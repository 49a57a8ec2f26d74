"""What tells one run's data, tokenizer and model from another's, wherever they lie."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.config import ModelConfig
from fastpref.data.encode import PreferenceSplit, tokenizer_digest
from fastpref.data.weights_file import template_digest
from fastpref.distributed import World
from fastpref.model.identity import model_identity
from fastpref.train.comparison import HELD_OUT

ROWS_AT_ONCE = 8192


def take_fingerprints(
    model: ModelConfig,
    splits: Sequence[PreferenceSplit | None],
    texts: tuple[Any, str | None],
    world: World,
) -> dict[str, str]:
    """Those of a run, computed by rank 0, which reads every byte: a second a gigabyte.

    Args:
        model: Options of the model.
        splits: Rows to train on, and those held out or None.
        texts: Tokenizer, and the chat template that replaces its own or None.
        world: Whoever runs.

    Returns:
        64 hexadecimal digits each. data: token ids, weights and order of the rows to train on;
        held-out data: the same of the others; tokenizer: vocabulary and chat template, which the
        exported model has beside it; model: the weights that the run started from, and its
        reference.
    """

    def compute() -> dict[str, str]:
        tokenizer, chat_template = texts
        digests = tokenizer_digest(tokenizer) + str(template_digest(chat_template))
        train, held_out = (split_digest(split) if split else "none" for split in splits)
        return {
            "data": train,
            HELD_OUT: held_out,
            "tokenizer": hashlib.sha256(digests.encode()).hexdigest(),
            "model": model_identity(model),
        }

    return world.on_main(compute)


def split_digest(split: PreferenceSplit) -> str:
    """Digest of what training sees of a split: the same rows read from another place, or by another
    version of a library, have the same one."""
    digest = hashlib.sha256(np.ascontiguousarray(split.groups, np.int64).tobytes())
    table = split.dataset.with_format("arrow")
    for rows in table.iter(ROWS_AT_ONCE):
        for name in sorted(rows.column_names):
            lists = rows[name].combine_chunks()
            lengths = lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
            values = lists.flatten().to_numpy(zero_copy_only=False)
            digest.update(f"{name} {values.dtype}".encode())
            digest.update(lengths.astype(np.int64).tobytes())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
