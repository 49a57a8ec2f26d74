"""Fingerprints of a run's data, tokenizer and model: digests of their contents, not paths."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.config import ModelConfig
from fastpref.data.chat import current_date
from fastpref.data.encode import PreferenceSplit
from fastpref.data.tokenizer_checks import tokenizer_digest
from fastpref.data.weights_file import template_digest
from fastpref.distributed import World
from fastpref.errors import DataError
from fastpref.model.files.identity import model_identity
from fastpref.train.resume.comparison import HELD_OUT

ROWS_AT_ONCE = 8192


def take_digests(
    splits: Sequence[PreferenceSplit | None], texts: tuple[Any, str | None], world: World
) -> dict[str, str]:
    """Digests of the rows and the tokenizer, which every rank reads itself and plans its steps
    from; about a second per gigabyte.

    Args:
        splits: The training rows, and the held-out rows or None.
        texts: The tokenizer, and the chat template that replaces its own, or None.
        world: The ranks, which compare their digests.

    Returns:
        SHA-256 digests in hexadecimal. data: token ids, weights and order of the training rows;
        held-out data: the same of the held-out rows, or "none"; tokenizer: vocabulary and chat
        template, which are exported with the model.

    Raises:
        DataError: a rank's digests differ from those of rank 0.
    """
    tokenizer, chat_template = texts
    of_texts = tokenizer_digest(tokenizer) + str(template_digest(chat_template))
    train, held_out = (split_digest(split) if split else "none" for split in splits)
    digests = {
        "data": train,
        HELD_OUT: held_out,
        "tokenizer": hashlib.sha256(of_texts.encode()).hexdigest(),
    }
    world.compare_on_main(digests, check_same_digests)
    return digests


def today(tokenizer: Any, world: World) -> str:
    """Today's date by rank 0's clock: if each rank used its own, chat templates might render
    different rows."""
    return world.on_main(lambda: current_date(tokenizer))


def take_model_digest(model: ModelConfig, world: World) -> str:
    """Digest of the weights that a run starts from, and its reference has; rank 0 reads every
    byte."""
    return world.on_main(lambda: model_identity(model))


def check_same_digests(of_ranks: Sequence[dict[str, str]]) -> None:
    """Refuse ranks that have read different rows or tokenizers.

    Args:
        of_ranks: Digests of each rank, by rank, see `take_digests`.

    Raises:
        DataError: naming the first rank that differs from rank 0, and its digests that do.
    """
    for rank, digests in enumerate(of_ranks):
        differing = [name for name, digest in digests.items() if digest != of_ranks[0][name]]
        if differing:
            raise DataError(
                f"{' and '.join(differing)} of rank {rank} are not those of rank 0: files of one "
                "name on the disks of different machines, or different versions of transformers"
            )


def split_digest(split: PreferenceSplit) -> str:
    """Digest of everything that training reads from a split. It does not depend on where the rows
    were read from, or on library versions."""
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
