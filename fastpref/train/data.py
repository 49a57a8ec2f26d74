"""The data of a run: rows read, encoded and ordered, and the loaders that batch them."""

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from fastpref.batches.layouts import RowLayout
from fastpref.batches.loader import Loader, pad_token_id
from fastpref.batches.order import GlobalOrder
from fastpref.config import Config, ModelConfig
from fastpref.data.announce import read_splits
from fastpref.data.audit.account import describe_example
from fastpref.data.encode import PreferenceSplit, load_split
from fastpref.data.options import data_options
from fastpref.distributed import World, main_first
from fastpref.model.beforehand import Twin, check_training, load_vocabulary
from fastpref.train.orders import build_eval_order, build_train_order, log_mix
from fastpref.train.resume.fingerprints import take_digests, take_model_digest, today

logger = logging.getLogger("fastpref")


class Data(NamedTuple):
    """The data of a run, ready before any model weights are loaded."""

    train: PreferenceSplit
    train_order: GlobalOrder
    eval: PreferenceSplit | None
    eval_order: GlobalOrder | None
    tokenizer: Any
    chat_template: str | None
    """Jinja text that replaces the tokenizer's own template; None: the tokenizer's is used."""
    digests: dict[str, str]
    """Digests of rows and tokenizer, see `take_digests`."""
    chat_date: str
    """The date given to a chat template that prints it."""
    twin: Twin
    """The model without its weights."""

    @property
    def texts(self) -> tuple[Any, str | None]:
        """Tokenizer and chat template, which turn texts into tokens."""
        return self.tokenizer, self.chat_template

    def fingerprints(self, model: ModelConfig, world: World) -> dict[str, str]:
        """Digests that identify rows, tokenizer and model."""
        return self.digests | {"model": take_model_digest(model, world)}

    @property
    def longest(self) -> int:
        """Length of the longest sequence of both splits, in tokens."""
        return max(split.audit.longest_tokens for split in (self.train, self.eval) if split)

    @property
    def num_tokens(self) -> int:
        """Approximate number of tokens that the whole run trains on, counting a prompt once per
        row."""
        audit = self.train.audit
        of_row = (audit.prompt_tokens + audit.response_tokens) / audit.kept
        return int(of_row * self.train_order.num_steps * self.train_order.batch_size)


class Loaders(NamedTuple):
    """The loaders of a run's two splits."""

    train: Loader
    eval: Loader | None


def load_data(config: Config, world: World, *, chat_date: str = "", quiet: bool = False) -> Data:
    """Read and encode the train and test splits, rank 0 first so that the others find its cache.

    Rows are validated before the tokenizer is loaded, and everything before any model weights.

    Args:
        chat_date: The date for a chat template that prints it; "": today, by rank 0's clock.
        quiet: Log nothing about the data.
    """
    quiet = quiet or not world.is_main
    options = data_options(config)
    main_first(world, lambda: read_splits(options, config.splits, quiet=quiet))
    # to make tokens of many rows takes an hour
    twin = check_training(config.model, config.adapter, config.packing, world)
    tokenizer, vocab_size = load_vocabulary(config.model, config.adapter)
    chat_date = chat_date or today(tokenizer, world)
    options = replace(options, encode=replace(options.encode, chat_date=chat_date))

    def encode() -> list[PreferenceSplit]:
        return [
            load_split(options, split, tokenizer, vocab_size=vocab_size, quiet=quiet)
            for split in config.splits
        ]

    train, *others = main_first(world, encode)
    held_out = others[0] if others else None
    if not quiet:
        logger.info("one example, as the model sees it:\n%s", describe_example(train, tokenizer))
    limits = {"n_epochs": config.n_epochs, "n_examples": config.n_examples}
    train_order = build_train_order(
        train, config.data, seed=config.seed, batch_size=config.batch_size, **limits
    )
    if not quiet:
        log_mix(train_order, config.datasets)
        if train_order.warning:
            logger.warning(train_order.warning)
    texts = tokenizer, options.encode.chat_template
    digests = take_digests((train, held_out), texts, world)
    eval_order = None
    if held_out is not None:
        eval_order = build_eval_order(
            held_out,
            config.data,
            seed=config.seed,
            batch_size=config.eval_batch_size,
            n_examples=config.n_eval_examples,
        )
    return Data(train, train_order, held_out, eval_order, *texts, digests, chat_date, twin)


def build_loaders(
    data: Data, layout: RowLayout, *, num_embeddings: int, min_micro_batches: int
) -> Loaders:
    """Build the loader of each split.

    Args:
        layout: How rows are packed or padded, and how many tokens are computed at once.
        num_embeddings: Rows of the model's embedding, which must contain the padding token.
        min_micro_batches: Least number of micro-batches of a training step.
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
        return Loaders(train, None)
    held_out = Loader(data=data.eval, order=data.eval_order, layout=layout, pad_token_id=filler)
    return Loaders(train, held_out)
