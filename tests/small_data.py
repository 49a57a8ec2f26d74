"""A tokenizer of single bytes, rows on disk and configs for the tests of the data path."""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpref.config import Config, DataConfig, DPOConfig, ModelConfig

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(chat_template=None, eos_token="</s>"):
    """One token per byte, so a text of n ASCII characters has n tokens; <s> and </s> are extra."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos_token
    )
    wrapped.chat_template = chat_template
    return wrapped


def pair(prompt="Q:", chosen=" yes", rejected=" no", **fields):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields}


def pairs(number):
    return [pair(f"Q{i}:", f" yes {i}", f" no {i}") for i in range(number)]


def write_jsonl(folder: Path, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_config(tmp_path, *, names=("set",), loss=None, data=None, **options):
    return Config(
        model=ModelConfig(name_or_path="none"),
        loss=loss or DPOConfig(),
        datasets=list(names),
        base_data_dir=str(tmp_path / "data"),
        data=DataConfig(**{"cache_dir": str(tmp_path / "cache"), **(data or {})}),
        **options,
    )


def count_calls(function, name):
    """How often the Python function `name` is entered while `function` runs."""
    calls = 0

    def profile(frame, event, _):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_name == name

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
