"""What decides which rows a run has, how they are read and how they become token ids."""

from dataclasses import dataclass, field, replace

from fastpref.config import Config
from fastpref.data.chat import read_chat_template
from fastpref.data.encode_row import EncodeOptions
from fastpref.data.selection import HeldOut


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What decides how rows are read."""

    weighted: bool
    """Read token weights; without it those columns are ignored."""
    paired: bool
    """False in SFT, where a pair of equal responses is nothing to worry about."""
    on_error: str
    """raise or skip: what a malformed row does."""
    strict: bool
    """Make an error of a pair that would be dropped."""
    allow_roles: bool
    single: bool
    """Take rows of one response beside those of pairs: SFT that is not reversed."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """What columns of files and of the hub are called here."""
    max_dropped: float


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """All that a run's data depends on, beside tokenizer and files."""

    names: tuple[str, ...]
    """Datasets, read one after another."""
    base_data_dir: str | None
    """Where local ones lie."""
    split_names: dict[str, str] = field(default_factory=dict)
    """What the splits of files and of the hub are called there."""
    config_names: dict[str, str] = field(default_factory=dict)
    """Configurations of data sets of the hub, by their ids."""
    cache_dir: str | None
    """Of `datasets`; None for its default."""
    num_proc: int | None
    """Processes that tokenize; None leaves that to us."""
    held_out: HeldOut
    """What a dataset without a test split has instead."""
    deduplicate: bool
    """Leave out copies of earlier rows."""
    read: ReadOptions
    encode: EncodeOptions

    def of_files(self) -> "DataOptions":
        """The same of the rows as the files have them: nothing held out, no copy left out."""
        held_out = replace(self.held_out, fraction=0.0)
        return replace(self, held_out=held_out, deduplicate=False)


def data_options(config: Config) -> DataOptions:
    """The options of a config that its data depends on.

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
