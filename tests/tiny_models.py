"""Tiny models and rows on disk, for tests that run the whole program."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.batch import EncodedRow
from fastpref.model.files.paths import resolve_model

WORDS = ["the", "one", "red", "blue", "green", "cat", "dog", "bird", "sees", "finds", "old", "new"]


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
DISTANCES = {"model_type": "bloom", "n_layer": 2, "n_head": 4}
"""Of a tiny model whose rows cannot be packed."""
FAMILIES = {
    # name: transformers model type, config, class of a block
    "llama": ("llama", SMALL, "LlamaDecoderLayer"),
    "llama tied": ("llama", SMALL | {"tie_word_embeddings": True}, "LlamaDecoderLayer"),
    "qwen2": ("qwen2", SMALL | {"tie_word_embeddings": True}, "Qwen2DecoderLayer"),
    "qwen3": ("qwen3", SMALL | {"head_dim": 8}, "Qwen3DecoderLayer"),
    "mistral": ("mistral", SMALL | {"sliding_window": None}, "MistralDecoderLayer"),
    "gemma2": (
        "gemma2",
        SMALL | {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8},
        "Gemma2DecoderLayer",
    ),
    "granite": ("granite", SMALL | {"logits_scaling": 4.0}, "GraniteDecoderLayer"),
    "cohere": ("cohere", SMALL | {"logit_scale": 0.25}, "CohereDecoderLayer"),
    "gpt2": (
        "gpt2",
        GPT2 | {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
        "GPT2Block",
    ),
    "gpt-neox": ("gpt_neox", NEOX | {"hidden_dropout": 0.5}, "GPTNeoXLayer"),
    "gpt-j": ("gptj", GPT2 | {"rotary_dim": 4}, "GPTJBlock"),
    "opt": (
        "opt",
        {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
        | {"ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
        | {"word_embed_proj_dim": 32, "dropout": 0.5},
        "OPTDecoderLayer",
    ),
    "phi": ("phi", NEOX | {"resid_pdrop": 0.5}, "PhiDecoderLayer"),
}


def build_model(family: str, **overrides):
    model_type, config, _ = FAMILIES[family]
    return build_family(model_type, **(config | overrides))


def build_family(model_type: str, **config: Any):
    """A random causal LM of any family that transformers knows, in training mode."""
    special = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(special | config)))
    # the default initialisation is so small that every logit is nearly equal
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.train()


def random_rows(num_rows: int = 3, vocab_size: int = 97) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    return [EncodedRow(ids(2 + i), ids(4 + 2 * i), ids(9 - 3 * i)) for i in range(num_rows)]


def rows_of_other_numbers() -> list[EncodedRow]:
    """A row, and rows that differ from it in one token, one border or one mask."""
    row = EncodedRow([1, 2], [3, 4], [5])
    return [
        row,
        row._replace(prompt_ids=[1, 3]),
        row._replace(prompt_ids=[1], chosen_ids=[2, 3, 4]),
        row._replace(rejected_ids=[6]),
        row._replace(chosen_scored=[True, False]),
        row._replace(chosen_scored=[False, True]),
        row._replace(rejected_scored=[False]),
    ]


def save_tiny_model(
    folder: Path, *, model_type: str = "llama", seed: int = 0, **config: Any
) -> Path:
    """A random causal LM of two layers with the embedded model's tokenizer, as a folder."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny"))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            model_type,
            **{
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
            }
            | config,
        )
    )
    # larger than the default initialisation: tokens must differ in probability to be learnt from
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with prompts, chosen and rejected responses of different lengths."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [
        {
            "prompt": f"Say {i}: {words(2, 8)}.",
            "chosen": f" {words(2, 9)}.",
            "rejected": f" {words(1, 12)}!",
        }
        for i in range(num_rows)
    ]


def write_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    """`{folder}/{split}.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_dataset(base: Path, name: str, *, num_train: int = 24, num_test: int = 10) -> Path:
    """A data folder with both splits; returns `base`, the `base_data_dir`."""
    write_rows(base / name, "train", text_rows(num_train, seed=1))
    write_rows(base / name, "test", text_rows(num_test, seed=2))
    return base


def read_metrics(run_dir: Path, split: str) -> list[dict[str, Any]]:
    """The records of one split in a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["split"] == split]
