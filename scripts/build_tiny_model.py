"""Builds the shipped tiny model: tokenizer, random weights, then SFT with `recipe=tiny_sft`.

    python scripts/build_tiny_model.py --work-dir output/build_tiny

The work folder receives the untrained model (`random/`), the SFT corpus (`data/planted-sft/`) and
the run folder (`run/`). The trained model replaces `fastpref/assets/tiny`, in bfloat16.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastpref.data.sources.planted import generate_rows, generate_sft_rows

REPOSITORY = Path(__file__).parents[1]
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}

# renders the text of planted.PROMPT_TEMPLATE; a rendered prompt is a prefix of its dialogue
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- 'Answer: ' + message['content'].strip() + eos_token }}"
    "{%- elif message['role'] == 'user' %}"
    "{{- 'Question: ' + message['content'].strip() + '\\n' }}"
    "{%- else %}"
    "{{- message['content'].strip() + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Answer:' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per word of the planted set; other text is encoded as bytes.

    Digits and capital letters outside of these words are thus single tokens, any text can be
    encoded, and decoding is lossless.
    """
    texts = [row["prompt"] + row["chosen"] for row in generate_rows("train")]
    words = sorted({word for text in texts for word in re.findall(r" ?\b[A-Z]?[a-z]+\b", text)})
    byte_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS.values(), *byte_alphabet, *(w.replace(" ", "Ġ") for w in words)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # no merges: a word is either in the vocabulary (ignore_merges) or split into bytes
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|[^\p{L}]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_random_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about one million parameters, tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # four times transformers' default, with which the outputs of so small a model are too flat
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def write_sft_corpus(folder: Path) -> None:
    """Write `folder/{train,test}.jsonl` with prompt, chosen, rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in generate_sft_rows(split))


def run_sft(work_dir: Path) -> Path:
    """Runs the project's trainer on the corpus; returns the folder of the trained model."""
    run_dir = work_dir / "run"
    command = [
        *(sys.executable, str(REPOSITORY / "train.py"), "recipe=tiny_sft"),
        *("datasets=[planted-sft]", f"base_data_dir={work_dir / 'data'}"),
        *(f"model.name_or_path={work_dir / 'random'}", f"run_dir={run_dir}"),
    ]
    subprocess.run(command, check=True)
    return run_dir / "LATEST"


def export(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes model and tokenizer to the package data, weights in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    folder = REPOSITORY / "fastpref" / "assets" / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "output" / "build_tiny")
    work_dir = parser.parse_args().work_dir.resolve()
    shutil.rmtree(work_dir, ignore_errors=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(work_dir / "random")
    build_random_model(tokenizer).save_pretrained(work_dir / "random")
    write_sft_corpus(work_dir / "data" / "planted-sft")
    export(run_sft(work_dir), tokenizer)


if __name__ == "__main__":
    main()
