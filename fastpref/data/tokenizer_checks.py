"""Checks of a tokenizer: it has an EOS token, and its ids fit the model's embedding."""

from typing import Any

import datasets
import pyarrow.compute as pc

from fastpref.errors import ConfigError, DataError

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer without an end-of-sequence token: no response could ever end.

    Raises:
        ConfigError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.tokenizer_name_or_path: the tokenizer has no end-of-sequence token; set "
            "eos_token in its tokenizer_config.json or name another tokenizer"
        )


def unknown_id(tokenizer: Any) -> int | None:
    """Id of the unknown token; None if there is none, or if it is also EOS, BOS or padding."""
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def check_vocabulary(encoded: datasets.Dataset, vocab_size: int, tokenizer: Any) -> None:
    """Refuse token ids outside the embedding of `vocab_size` rows.

    Raises:
        DataError: naming the token.
    """
    table = encoded.with_format("arrow")[:]
    for column in ID_COLUMNS:
        highest = pc.max(pc.list_flatten(table[column])).as_py()
        if highest is not None and highest >= vocab_size:
            raise DataError(
                f"datasets: token id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) is "
                f"not in the model's embedding of {vocab_size} rows; the tokenizer belongs to "
                "another model"
            )
