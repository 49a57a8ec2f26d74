"""What tells one run's data, tokenizer and model from another's, wherever they lie."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from fastpref.config import ModelConfig
from fastpref.data.encode import PreferenceSplit, tokenizer_digest
from fastpref.data.weights_file import template_digest
from fastpref.distributed import World
from fastpref.model.identity import model_identity

ROWS_AT_ONCE = 8192


class Fingerprints(NamedTuple):
    """64 hexadecimal digits each."""

    data: str
    """Token ids, weights and order of the rows to train on."""
    tokenizer: str
    """Vocabulary and chat template, which the exported model has beside it."""
    model: str
    """The weights that the run started from, and its reference."""


def take_fingerprints(
    model: ModelConfig, train: PreferenceSplit, texts: tuple[Any, str | None], world: World
) -> dict[str, str]:
    """Those of a run by name, computed by rank 0, which reads every byte: a second a gigabyte.

    Args:
        model: Options of the model.
        train: Rows to train on.
        texts: Tokenizer, and the chat template that replaces its own or None.
        world: Whoever runs.
    """

    def compute() -> dict[str, str]:
        tokenizer, chat_template = texts
        digests = tokenizer_digest(tokenizer) + str(template_digest(chat_template))
        return Fingerprints(
            data=split_digest(train),
            tokenizer=hashlib.sha256(digests.encode()).hexdigest(),
            model=model_identity(model),
        )._asdict()

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
