"""The data of a run: read, encoded, in its order, and how its rows become batches."""

import logging
from typing import Any, NamedTuple

from fastpref.batches.layouts import RowLayout
from fastpref.batches.loader import Loader
from fastpref.batches.order import GlobalOrder
from fastpref.config import Config, ModelConfig
from fastpref.data.audit import describe_example
from fastpref.data.encode import PreferenceSplit, load_split
from fastpref.data.options import data_options
from fastpref.data.source import check_sources, log_layouts, read_rows
from fastpref.distributed import World, main_first
from fastpref.model.paths import named_model
from fastpref.model.source import load_model_tokenizer, pad_token_id, read_vocab_size
from fastpref.train.fingerprints import take_fingerprints

logger = logging.getLogger("fastpref")


class Data(NamedTuple):
    """What is known of the data before there is a model."""

    train: PreferenceSplit
    train_order: GlobalOrder
    eval: PreferenceSplit | None
    eval_order: GlobalOrder | None
    tokenizer: Any
    chat_template: str | None
    """Jinja text that replaces the tokenizer's own; None if none does."""

    @property
    def texts(self) -> tuple[Any, str | None]:
        """What turns texts into tokens: tokenizer and chat template."""
        return self.tokenizer, self.chat_template

    def fingerprints(self, model: ModelConfig, world: World) -> dict[str, str]:
        """What tells rows, tokenizer and model from others, see `take_fingerprints`."""
        return take_fingerprints(model, self.train, self.texts, world)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(split.audit.longest_tokens for split in (self.train, self.eval) if split)

    @property
    def num_tokens(self) -> int:
        """Tokens that are trained on in the whole run, a prompt once for each row; about."""
        audit = self.train.audit
        of_row = (audit.prompt_tokens + audit.response_tokens) / audit.kept
        return int(of_row * self.train_order.num_steps * self.train_order.batch_size)


def load_data(config: Config, world: World) -> Data:
    """Read and encode the train and test splits, rank 0 first so that the others find its cache.

    Rows are validated before the tokenizer is loaded, and everything before any model.
    """
    quiet = not world.is_main
    splits = ["train", "test"] if config.n_eval_examples else ["train"]
    options = data_options(config)
    check_sources(options, splits)
    read = main_first(
        world, lambda: [rows for split in splits for rows in read_rows(options, split, quiet=quiet)]
    )
    if world.is_main:
        log_layouts(read)
    vocab_size = read_vocab_size(named_model(config.model))
    tokenizer = load_model_tokenizer(config.model)

    def encode() -> list[PreferenceSplit]:
        return [
            load_split(options, split, tokenizer, vocab_size=vocab_size, quiet=quiet)
            for split in splits
        ]

    train, *held_out = main_first(world, encode)
    if world.is_main:
        logger.info("one example, as the model sees it:\n%s", describe_example(train, tokenizer))
    train_order = GlobalOrder(
        train.groups,
        batch_size=config.batch_size,
        seed=config.seed,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        drop_last=config.data.drop_last,
        order=config.data.order,
        num_prompts=train.num_prompts,
    )
    template = options.encode.chat_template
    if world.is_main and train_order.warning:
        logger.warning(train_order.warning)
    if not held_out:
        return Data(train, train_order, None, None, tokenizer, template)
    eval_order = GlobalOrder(
        held_out[0].groups,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        n_epochs=1,
        n_examples=config.n_eval_examples,
        drop_last=False,
        order=config.data.order,
        num_prompts=held_out[0].num_prompts,
    )
    return Data(train, train_order, held_out[0], eval_order, tokenizer, template)


def build_loaders(
    data: Data, layout: RowLayout, *, num_embeddings: int, min_micro_batches: int
) -> tuple[Loader, Loader | None]:
    """How the rows of each split become batches.

    Args:
        data: What was read.
        layout: How the model takes rows.
        num_embeddings: Tokens that it can read.
        min_micro_batches: Of an optimizer step, at least.
    """
    filler = pad_token_id(data.tokenizer, num_embeddings)
    train = Loader(
        data=data.train,
        order=data.train_order,
        layout=layout,
        pad_token_id=filler,
        min_micro_batches=min_micro_batches,
    )
    if data.eval is None or data.eval_order is None:
        return train, None
    held_out = Loader(data=data.eval, order=data.eval_order, layout=layout, pad_token_id=filler)
    return train, held_out
