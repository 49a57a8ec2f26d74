"""Options that determine which rows a run has, how they are read and how they are encoded."""

from dataclasses import dataclass, field

from fastpref.config import Config
from fastpref.data.chat import read_chat_template
from fastpref.data.encode_row import EncodeOptions
from fastpref.data.selection import HeldOut


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options that determine how rows are read."""

    weighted: bool
    """Read token weights; otherwise their columns are ignored."""
    paired: bool
    """False in SFT, where equal responses and repeated pairs are not remarked on."""
    on_error: str
    """raise or skip: how to treat a malformed row."""
    strict: bool
    """Treat a pair that would be dropped as an error."""
    allow_roles: bool
    single: bool
    """Accept rows with one response as well as pairs: in SFT, unless reversed."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Field -> column in files and hub datasets; None leaves out the column of the field's name."""
    max_dropped: float


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Everything that a run's data depends on, except the tokenizer and the files."""

    names: tuple[str, ...]
    """Datasets, read one after another."""
    base_data_dir: str | None
    """Folder that holds the local datasets."""
    split_names: dict[str, str] = field(default_factory=dict)
    """train or test -> name of that split in files and on the hub."""
    config_names: dict[str, str] = field(default_factory=dict)
    """Hub id -> configuration to read."""
    cache_dir: str | None
    """Cache folder of `datasets`; None for its default."""
    num_proc: int | None
    """Tokenizing processes; None: chosen by number of rows and cores."""
    held_out: HeldOut
    """Prompts held out of a dataset without a test split."""
    deduplicate: bool
    """Leave out copies of earlier rows."""
    read: ReadOptions
    encode: EncodeOptions


def data_options(config: Config) -> DataOptions:
    """Select the options of a config that its data depends on.

    Raises:
        ConfigError: the chat template cannot be read.
    """
    needs, data = config.loss.needs, config.data
    return DataOptions(
        names=tuple(config.datasets),
        base_data_dir=config.base_data_dir,
        split_names=dict(data.split_names),
        config_names=dict(data.config_names),
        cache_dir=data.cache_dir,
        num_proc=data.num_processes,
        held_out=HeldOut(fraction=data.test_fraction, seed=config.seed),
        deduplicate=data.deduplicate,
        read=ReadOptions(
            weighted=needs.weights,
            paired=needs.pairs,
            on_error=data.on_error,
            strict=data.strict,
            allow_roles=data.allow_roles,
            single=not (needs.pairs or config.reverse_dataset or config.task == "estimate_weights"),
            columns=dict(data.columns),
            max_dropped=data.max_dropped,
        ),
        encode=EncodeOptions(
            sft=not needs.pairs,
            weighted=needs.weights,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            truncation=data.truncation,
            truncation_mode=data.truncation_mode,
            reverse_dataset=config.reverse_dataset,
            eos_weight=data.eos_weight,
            transform_method=config.transform.method,
            transform_params=config.transform.params(),
            seed=config.seed,
            chat_template=read_chat_template(data.chat_template),
            template_kwargs=dict(data.template_kwargs),
            on_error=data.on_error,
            strict=data.strict,
        ),
    )
