"""Checks of a tokenizer: it has an EOS token, and its ids fit the model's embedding; its digest."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow.compute as pc

from fastpref.errors import ConfigError, DataError

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
PLACES = ("name_or_path", "is_local", "local_files_only", "tokenizer_file")
"""Init arguments of a tokenizer that say where it was read from, beside those of its files."""


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


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that a tokenizer's output depends on, unaffected by earlier calls."""
    if tokenizer.is_fast:
        # skip the settings before it: truncation and padding are those of the last call
        _, _, model = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')
        # not serialized with the rest
        model += "split_special_tokens" if tokenizer.split_special_tokens else ""
    else:
        model = json.dumps(_slow_facts(tokenizer), default=str)
    facts = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], default=str)
    return hashlib.sha256((model + facts).encode()).hexdigest()


def _slow_facts(tokenizer: Any) -> list[Any]:
    """Class, options, vocabulary and files of a tokenizer that runs in Python. The vocabulary alone
    does not determine its tokens: merges and scores are in the files only."""
    left_out = {*PLACES, *tokenizer.vocab_files_names}
    options = {key: x for key, x in sorted(tokenizer.init_kwargs.items()) if key not in left_out}
    with TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        files = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
    # of code that comes with a model, the module's name has a hash
    kind = type(tokenizer)
    code = f"{kind.__module__}.{kind.__qualname__}"
    return [code, options, sorted(tokenizer.get_vocab().items()), files]
