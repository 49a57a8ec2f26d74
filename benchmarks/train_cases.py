"""Inputs of both trainers in the step benchmark: a model folder, rows as text, and their token ids.

fastpref reads the rows as text; TRL gets the ids and the order that fastpref made of them, so both
train on the same pairs in the same steps.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

LAWS = {
    # median tokens of prompt, chosen, rejected; spread of their logarithm
    "FIX": (256, 768, 768, 0.0),
    "UF": (110, 260, 260, 0.7),
    "CHAT": (900, 250, 250, 0.6),
}
"""Length distributions: FIX has no padding to save, UF is like UltraFeedback, CHAT has long prompts
and short answers."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "qwen2.5-3b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "intermediate_size": 11_008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
MAX_LENGTH = 2048


def write_random_model(shape: str, folder: Path) -> None:
    """Write a model of a shape with random weights, and a tokenizer with one word per token id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    options = dict(SHAPES[shape])
    vocab = options["vocab_size"]
    config = AutoConfig.for_model(
        options.pop("model_type"),
        **options,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)


def write_random_rows(law: str, vocab: int, num_rows: int, folder: Path) -> None:
    """Write rows of random words with lengths from a distribution, at most MAX_LENGTH tokens."""
    random = np.random.default_rng(0)
    *medians, spread = LAWS[law]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(num_rows):
            lengths = np.exp(random.normal(np.log(medians), spread)).astype(int).clip(2)
            # one token is left for the EOS of a response
            lengths = np.minimum(
                lengths, [MAX_LENGTH // 2, MAX_LENGTH // 2 - 1, MAX_LENGTH // 2 - 1]
            )
            texts = [" ".join(f"w{i}" for i in random.integers(2, vocab, n)) for n in lengths]
            row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            lines.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, compressed if its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_ids(config: Any, world: Any, num_steps: int, path: Path) -> None:
    """Write the token ids of the first steps' pairs, in the order of fastpref's training."""
    from fastpref.train.data import load_data

    data = load_data(config, world)
    rows = np.concatenate([data.train_order.batch(step) for step in range(num_steps)])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    with path.open("w", encoding="utf-8") as lines:
        for row in rows.tolist():
            record = data.train.dataset[row]
            lines.write(json.dumps({name: record[name] for name in names}) + "\n")
