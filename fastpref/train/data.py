"""The data of a run: read, encoded, in its order, and how its rows become batches."""

import logging
from dataclasses import replace
from functools import partial
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
from fastpref.model.beforehand import Twin, check_files, check_options, load_vocabulary
from fastpref.train.orders import build_eval_order, build_train_order, log_mix
from fastpref.train.resume.fingerprints import take_digests, take_model_digest, today

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
    digests: dict[str, str]
    """Of rows and tokenizer, see `take_digests`."""
    chat_date: str
    """The day that a chat template which prints the date was told."""
    twin: Twin
    """The model, without its weights."""

    @property
    def texts(self) -> tuple[Any, str | None]:
        """What turns texts into tokens: tokenizer and chat template."""
        return self.tokenizer, self.chat_template

    def fingerprints(self, model: ModelConfig, world: World) -> dict[str, str]:
        """What tells rows, tokenizer and model from others."""
        return self.digests | {"model": take_model_digest(model, world)}

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


class Loaders(NamedTuple):
    """All rows that a run reads, as batches."""

    train: Loader
    eval: Loader | None


def load_data(config: Config, world: World, *, chat_date: str = "", quiet: bool = False) -> Data:
    """Read and encode the train and test splits, rank 0 first so that the others find its cache.

    Rows are validated before the tokenizer is loaded, and everything before any model.

    Args:
        chat_date: What a chat template that prints the date is told; "": today, by rank 0's clock.
        quiet: Without a word on what there is.
    """
    quiet = quiet or not world.is_main
    splits = ["train", "test"] if config.n_eval_examples else ["train"]
    options = data_options(config)
    main_first(world, lambda: read_splits(options, splits, quiet=quiet))
    # to make tokens of many rows takes an hour
    options_of_model = config.model, config.adapter, config.packing
    twin = check_options(*options_of_model, trainable=True, world=world)
    world.on_main(partial(check_files, config.model))
    tokenizer, vocab_size = load_vocabulary(config.model)
    chat_date = chat_date or today(tokenizer, world)
    options = replace(options, encode=replace(options.encode, chat_date=chat_date))

    def encode() -> list[PreferenceSplit]:
        return [
            load_split(options, split, tokenizer, vocab_size=vocab_size, quiet=quiet)
            for split in splits
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
    template = options.encode.chat_template
    digests = take_digests((train, held_out), (tokenizer, template), world)
    eval_order = None
    if held_out is not None:
        eval_order = build_eval_order(
            held_out,
            config.data,
            seed=config.seed,
            batch_size=config.eval_batch_size,
            n_examples=config.n_eval_examples,
        )
    texts = tokenizer, template
    return Data(train, train_order, held_out, eval_order, *texts, digests, chat_date, twin)


def build_loaders(
    data: Data, layout: RowLayout, *, num_embeddings: int, min_micro_batches: int
) -> Loaders:
    """How the rows of each split become batches."""
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
