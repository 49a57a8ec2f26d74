#!/usr/bin/env python3
"""Tokens that packing saves on real rows, and the speed of building batches on one core.

    python benchmarks/packing_savings.py MODEL DATA_DIR NAME [PAIRS_A_STEP]

Reads DATA_DIR/NAME/train.jsonl(.gz) with MODEL's tokenizer at the default lengths. Prints the
tokens that the model's body computes, with and without shared prompts, relative to the tokens of
both sequences of each pair and to padded batches; then rows planned and built per second.
"""

import sys
import time
from dataclasses import replace

import torch

from fastpref.batches.layouts import GPU_TOKENS, PackedRows, PaddedRows
from fastpref.batches.loader import Loader, pad_token_id
from fastpref.batches.order import GlobalOrder
from fastpref.config import Config, DPOConfig, ModelConfig
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.model.files.paths import find_model, resolve_model
from fastpref.model.source import load_tokenizer, read_vocab_size


def load(model: str, base_data_dir: str, name: str, batch_size: int) -> Loader:
    """Loader of one epoch of the train split, packed with shared prompts."""
    config = Config(
        model=ModelConfig(name_or_path=model),
        loss=DPOConfig(),
        datasets=[name],
        base_data_dir=base_data_dir,
    )
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    vocab_size = read_vocab_size(find_model(folder))
    data = load_split(data_options(config), "train", tokenizer, vocab_size=vocab_size, quiet=True)
    layout = PackedRows(share_prompt=True, max_tokens=GPU_TOKENS)
    order = GlobalOrder(data.groups, batch_size=batch_size, seed=0, n_epochs=1)
    filler = pad_token_id(tokenizer, vocab_size)
    return Loader(data=data, order=order, layout=layout, pad_token_id=filler)


def count(loader: Loader) -> tuple[int, int]:
    """Tokens in the data and tokens computed, over an epoch."""
    return loader.savings(1, loader.order.num_steps)


def rows_per_second(loader: Loader) -> float:
    """Rows read, planned and built per second of CPU time, over 3 s on one core."""
    done, start = 0, time.process_time()
    while time.process_time() - start < 3:
        for index in range(loader.order.num_steps):
            columns, plan = loader.plan(index, 1)
            for (micro_batch,) in plan:
                loader.build(columns, micro_batch)
            done += len(columns)
    return done / (time.process_time() - start)


def main(model: str, base_data_dir: str, name: str, batch_size: int = 8) -> None:
    torch.set_num_threads(1)
    loader = load(model, base_data_dir, name, batch_size)
    layouts = {
        "packed, prompts shared": loader.layout,
        "packed, prompts apart": replace(loader.layout, share_prompt=False),
        "padded": PaddedRows(max_tokens=sys.maxsize),
    }
    counts = {title: count(replace(loader, layout=layout)) for title, layout in layouts.items()}
    padded = counts["padded"][1]
    print(f"{loader.order.num_steps} steps of {batch_size} pairs of {name}")
    for title, (in_data, computed) in counts.items():
        print(
            f"{title:24} {computed:>10,} tokens   {computed / in_data:.3f} of the two sequences"
            f"   {computed / padded:.3f} of padded rows"
        )
    for rows in (batch_size, 64):
        order = GlobalOrder(loader.data.groups, batch_size=rows, seed=0, n_epochs=1)
        rate = rows_per_second(replace(loader, order=order))
        print(f"{rate:,.0f} rows/s planned and built, {rows} a step, one core")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
