"""Schema of the option group `data`: how a run's rows are found, read, rendered and ordered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastpref.checks import as_count, check_choice, check_number, expand_home, hint

ROW_FIELDS = (
    *("prompt", "chosen", "rejected", "completion", "messages", "conversations"),
    *("question", "instruction", "input", "output", "system", "tools"),
    *("response_0", "response_1", "better_response_id"),
)
"""Fields that a column can be read as; `data/layouts/recognition.py` says which make a row."""
SPLITS = ("train", "test")
ORDERS = ("fastpref", "dpo", "tdpo", "tisdpo")
"""`fastpref` follows the option `seed`; the others are what the code of that repository does."""
OWN_ARGUMENTS = (
    *("conversation", "messages", "tools", "documents", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "strftime_now", "raise_exception", "fastpref_date", "bos_token"),
    *("eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
"""Variables of a chat template that the rows, the tokenizer or this program set."""
SMALLEST_SHARE = 1e-6
"""Smallest share, and how far the sum of all shares may be from 1."""


@dataclass(kw_only=True)
class DataConfig:
    """How rows are read, checked, tokenized and ordered."""

    on_error: str = "raise"
    """A malformed row: raise stops with file:row:field, skip drops and counts it."""
    strict: bool = False
    """Treat as an error what is otherwise dropped and counted, such as an empty response."""
    max_dropped: float = 0.5
    """Largest share of pairs that may be dropped before that is an error, in [0, 1]."""
    drop_last: bool = True
    """Drop the pairs that do not fill the last batch of an epoch."""
    truncation: str = "seed"
    """How to shorten pairs longer than max_length. seed: cut the prompt to max_prompt_length, then
    responses to max_length - max_prompt_length. fill: responses to what the prompt left. drop: drop
    the pair, cut nothing."""
    truncation_mode: str = "auto"
    """Which end of a long prompt is kept: keep_start, keep_end, or auto (keep_end for messages and
    HH dialogues, keep_start for other texts)."""
    order: str = "fastpref"
    """fastpref: order follows `seed`. dpo, tdpo, tisdpo: the order of that repository."""
    shares: list[float] | None = None
    """Share of the training examples taken from each of `datasets`, one number for each, 1 in all;
    the first n examples hold them to within one, for any n. An epoch has as many examples as there
    are rows: small datasets come more than once in it, each time in another order, large ones in
    part, and the next epoch continues with the rest. null: all rows of all datasets are shuffled
    together."""
    test_fraction: float = 0.0
    """Share of the prompts to hold out from a dataset without a test split, in [0, 1). `seed` and
    the prompt alone decide which. 0: a missing test split is an error."""
    deduplicate: bool = False
    """Leave out exact copies of an earlier row of its split, also of another dataset, and count
    them."""
    eos_weight: float | None = None
    """Token weight of the end-of-sequence token; null: the last kept token has weight 0."""
    allow_roles: bool = False
    """Accept message roles beyond system, user, assistant and tool."""
    chat_template: str | None = None
    """Jinja file that renders rows of messages; null: the tokenizer's own chat template."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Columns of files and hub datasets by field, as in '{prompt: question, chosen: good,
    rejected: bad}'; null leaves a column out. Fields: prompt, chosen, rejected, completion,
    messages, conversations, question, instruction, input, output, system, tools, response_0,
    response_1, better_response_id."""
    split_names: dict[str, str] = field(default_factory=dict)
    """Names of the splits in files and hub datasets, as in '{train: train_prefs, test:
    test_prefs}'."""
    config_names: dict[str, str] = field(default_factory=dict)
    """Configuration to read of a hub dataset that has several, by its id, as in
    '{PKU-Alignment/PKU-SafeRLHF: alpaca-7b}'."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, as in '{enable_thinking: false}'."""
    cache_dir: str | None = None
    """Where read and tokenized rows are cached; null: the cache of `datasets`."""
    num_proc: str = "auto"
    """Processes that tokenize: auto, or a number >= 1. auto: one for each core that the rows keep
    busy for some seconds."""

    @property
    def num_processes(self) -> int | None:
        """`num_proc` as a number; None for auto."""
        return as_count("data.num_proc", self.num_proc)

    def __post_init__(self) -> None:
        expand_home(self, "chat_template", "cache_dir")
        self.num_proc = str(self.num_proc).lower()
        check_number("data.num_proc", self.num_processes, ge=1)
        check_choice("data.on_error", self.on_error, ("raise", "skip"))
        check_number("data.max_dropped", self.max_dropped, ge=0, le=1)
        check_choice("data.truncation", self.truncation, ("seed", "fill", "drop"))
        modes = ("auto", "keep_start", "keep_end")
        check_choice("data.truncation_mode", self.truncation_mode, modes)
        check_choice("data.order", self.order, ORDERS)
        check_number("data.eos_weight", self.eos_weight)
        check_columns(self.columns)
        check_split_names(self.split_names)
        check_template_kwargs(self.template_kwargs)
        check_number("data.test_fraction", self.test_fraction, ge=0, lt=1)
        self._check_shares()

    def _check_shares(self) -> None:
        # `check_datasets` refuses an empty list
        if not self.shares:
            return
        for share in self.shares:
            check_number("data.shares", share, ge=SMALLEST_SHARE, le=1)
        total = sum(self.shares)
        # sums of decimals are off by some 1e-16
        if not abs(total - 1) <= 1.001 * SMALLEST_SHARE:
            proportional = ",".join(f"{share / total:.6g}" for share in self.shares)
            raise ValueError(
                f"data.shares must be 1 in all, got {listed_numbers(self.shares)}, which is "
                f"{total:g}; in these proportions: data.shares=[{proportional}]"
            )
        if self.order != "fastpref":
            raise ValueError(
                f"data.shares needs data.order=fastpref, got {self.order}: that repository mixes "
                "all rows of all datasets"
            )

    def check_datasets(self, datasets: Sequence[str]) -> None:
        """Refuse a wrong number of shares, and configurations of datasets that are not used."""
        for name, config_name in self.config_names.items():
            check_choice("data.config_names", name, tuple(datasets))
            if not isinstance(config_name, str) or not config_name:
                raise ValueError(
                    f"data.config_names.{name} must name a configuration, got {config_name!r}"
                )
        if self.shares is not None and len(self.shares) != len(datasets):
            raise ValueError(
                f"data.shares must be one share for each of the {len(datasets)} datasets "
                f"({', '.join(datasets)}), got {listed_numbers(self.shares)}"
            )


def check_columns(columns: Mapping[str, str | None]) -> None:
    """Refuse a field that no layout has, and a column that would be read twice.

    Raises:
        ValueError: naming the field.
    """
    for name, column in columns.items():
        if name not in ROW_FIELDS:
            raise ValueError(
                f"data.columns: there is no field {name}, only {', '.join(ROW_FIELDS)}"
                f"{hint(name, ROW_FIELDS)}; it is written {{FIELD: COLUMN}}"
            )
        if column is not None and not (isinstance(column, str) and column):
            raise ValueError(f"data.columns.{name} must name a column, or be null, got {column!r}")
    fields: dict[str, str] = {}
    for name, column in columns.items():
        if column is None:
            continue
        if column in fields:
            raise ValueError(f"data.columns: {fields[column]} and {name} are both {column!r}")
        fields[column] = name


def check_split_names(split_names: Mapping[str, str]) -> None:
    """Refuse an unknown split, and a value that cannot be the name of one.

    Raises:
        ValueError: naming the split.
    """
    for split, name in split_names.items():
        check_choice("data.split_names", split, SPLITS)
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(
                f"data.split_names.{split} must be the name of a split, as train_prefs in "
                f"train_prefs.jsonl, got {name!r}"
            )


def check_template_kwargs(arguments: Mapping[str, Any]) -> None:
    """Refuse chat-template arguments in `OWN_ARGUMENTS`, and values that JSON cannot represent.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in arguments.items():
        key = f"data.template_kwargs.{name}"
        if not str(name).isidentifier():
            raise ValueError(f"data.template_kwargs: {name!r} is no name of an argument")
        if name in OWN_ARGUMENTS:
            raise ValueError(f"{key}: the rows, the tokenizer or the program itself give {name}")
        if not _is_plain(value):
            raise ValueError(f"{key} must be text, a number, true, false, null or a list of these")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool | int)


def listed_numbers(numbers: Sequence[float]) -> str:
    """ "[0.7,0.3]", as on a command line."""
    return f"[{','.join(f'{number:g}' for number in numbers)}]"
