"""Estimations of token weights on small rows, and what training makes of their files."""

import json
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer

from fastpref.config import (
    Config,
    DataConfig,
    DPOConfig,
    ModelConfig,
    TISDPOConfig,
    WeightsConfig,
)
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.distributed import init_world
from fastpref.tisdpo.estimate import estimate_weights


def make_config(models, tmp_path, **weights) -> Config:
    return Config(
        task="estimate_weights",
        model=ModelConfig(name_or_path=models[0], fsdp_policy_mp=None),
        loss=DPOConfig(),
        datasets=["rows"],
        base_data_dir=str(tmp_path / "data"),
        weights=WeightsConfig(
            positive=models[0],
            negative=models[1],
            output_dir=str(tmp_path / "out"),
            suffix="-weighted",
            **{"batch_size": 3, **weights},
        ),
    )


def run(config, *, chat_date: str = "") -> None:
    world = init_world()
    try:
        estimate_weights(config, world, chat_date=chat_date)
        world.wait_for_all()
    finally:
        dist.destroy_process_group()


def written_rows(config) -> list[dict]:
    path = output_path(config)
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def output_path(config) -> Path:
    return Path(config.weights.output_dir) / "rows-weighted" / "train.jsonl"


def estimate(config) -> list[dict]:
    run(config)
    return written_rows(config)


def training_config(config, **data) -> Config:
    """TIS-DPO on what `config` has written, weights as they are."""
    training = Config(
        model=config.model,
        loss=TISDPOConfig(),
        datasets=["rows-weighted"],
        base_data_dir=config.weights.output_dir,
        data=DataConfig(**data),
    )
    training.transform.method = "origin"
    return training


def load(config, tokenizer=None, **data):
    training = training_config(config, **data)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(config.model.name_or_path)
    return load_split(
        data_options(training), "train", tokenizer, vocab_size=len(tokenizer), quiet=True
    ).dataset
