"""A named source of preference rows -> checked rows in one form, cached by `datasets`."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from fastpref.checks import hint
from fastpref.counts import AuditCounts, Remark, check_counts, count_rows
from fastpref.errors import DataError
from fastpref.hub_sources import HUB_PATHS, hub_rows
from fastpref.readers import SUFFIXES, read_records
from fastpref.row_cache import cache_errors, code_digest, file_state, progress_bars
from fastpref.rows import Row, RowError, parse_row
from fastpref.weights_file import WeightsOrigin, check_complete, read_origin

if TYPE_CHECKING:
    from fastpref.config import Config

BUILT_IN = ("planted", *HUB_PATHS)
MALFORMED = "malformed row"
SPLITS = ("train", "test")
READING_CODE = (
    "datasets.py",
    "hub_sources.py",
    "planted.py",
    "readers.py",
    "rows.py",
    "weights_file.py",
)

FEATURES = datasets.Features(
    {
        "form": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "chosen": datasets.Value("string"),
        "rejected": datasets.Value("string"),
        "chosen_weights": datasets.List(datasets.Value("float64")),
        "rejected_weights": datasets.List(datasets.Value("float64")),
        "weights_digest": datasets.Value("string"),
        # null: the chosen response of the prompt's last row
        "sft_target": datasets.Value("string"),
        "row": datasets.Value("int64"),
        # ascending by first appearance of the prompt; -1 for a malformed row
        "group": datasets.Value("int64"),
        "remarks": datasets.Value("int32"),
        "drop": datasets.Value("string"),
        # the message of a malformed row
        "note": datasets.Value("string"),
    }
)


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
    max_dropped: float


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The checked rows of one source, those to drop left out."""

    name: str
    source: str
    """The file, the hub name, or `planted`."""
    dataset: datasets.Dataset
    """Columns as `FEATURES`."""
    fingerprint: str
    """Changes with the source, the options and the code that reads."""
    counts: AuditCounts
    origin: WeightsOrigin | None
    """What is known of the weights in a file that `task=estimate_weights` wrote."""


def check_sources(config: "Config", splits: Sequence[str] = SPLITS) -> None:
    """See that every dataset has its files, before anything heavy is loaded.

    Raises:
        DataError: the path, what was expected, what lies there.
    """
    for name in config.datasets:
        for split in splits:
            find_source(name, split, config.base_data_dir)


def read_rows(config: "Config", split: str, *, quiet: bool) -> list[Rows]:
    """Read and check the rows of all of a config's datasets; needs neither tokenizer nor model.

    Raises:
        DataError: a source is missing, a row breaks a rule, or too few rows are left.
    """
    check_sources(config, [split])
    options = ReadOptions(
        weighted=config.loss.needs.weights,
        paired=config.loss.needs.pairs,
        on_error=config.data.on_error,
        strict=config.data.strict,
        allow_roles=config.data.allow_roles,
        max_dropped=config.data.max_dropped,
    )
    return [
        load_rows(
            name,
            split,
            options,
            base_data_dir=config.base_data_dir,
            cache_dir=config.data.cache_dir,
            quiet=quiet,
        )
        for name in config.datasets
    ]


def find_source(name: str, split: str, base_data_dir: str | None) -> Path | None:
    """The file {base_data_dir}/{name}/{split}.*, or None for a built-in dataset.

    A local folder comes before a built-in dataset of the same name.

    Raises:
        DataError: neither exists; names what lies there instead.
    """
    folder = Path(base_data_dir).expanduser() / name if base_data_dir is not None else None
    if folder is not None and folder.is_dir():
        for suffix in SUFFIXES:
            if (folder / f"{split}{suffix}").is_file():
                return folder / f"{split}{suffix}"
        found = sorted(child.name for child in folder.iterdir())
        raise DataError(
            f"datasets: no file {folder / split}.jsonl (or .jsonl.gz, .parquet); found "
            f"{', '.join(found[:8]) or 'an empty folder'}{hint(f'{split}.jsonl', found)}"
        )
    if name in BUILT_IN:
        return None
    built_in = f"built in: {', '.join(BUILT_IN)}"
    if folder is None:
        raise DataError(
            f"datasets: no dataset {name!r}; {built_in}; a local folder DIR/{name} needs "
            f"base_data_dir=DIR{hint(name, BUILT_IN)}"
        )
    if not folder.parent.is_dir():
        raise DataError(f"base_data_dir: no folder {folder.parent}; expected it to hold {name}/")
    found = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    raise DataError(
        f"datasets: no folder {folder}; expected {split}.jsonl, .jsonl.gz or .parquet in it; "
        f"folders there: {', '.join(found[:8]) or 'none'}; {built_in}"
        f"{hint(name, [*found, *BUILT_IN])}"
    )


def load_rows(
    name: str,
    split: str,
    options: ReadOptions,
    *,
    base_data_dir: str | None,
    cache_dir: str | None,
    quiet: bool,
) -> Rows:
    """Read and check one source, or take the result of an earlier reading from the cache.

    Args:
        name, split, base_data_dir: See `find_source`.
        options, quiet: How to read; whether without progress bar.
        cache_dir: Of `datasets`; None for its default.

    Raises:
        DataError: the source is missing, a row breaks a rule (file:row: field), or too few rows
            are left.
    """
    path = find_source(name, split, base_data_dir)
    source = str(path) if path else HUB_PATHS.get(name, name)
    origin = read_origin(path) if path and options.weighted else None
    with progress_bars(quiet), cache_errors(cache_dir):
        dataset = datasets.Dataset.from_generator(
            generate_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            split=datasets.NamedSplit(split),
            gen_kwargs={
                "name": name,
                "split": split,
                "path": str(path) if path else None,
                "cache_dir": cache_dir,
                "state": code_digest(*READING_CODE) + (file_state(path) if path else ""),
                "weighted": options.weighted,
                "paired": options.paired,
                "on_error": options.on_error,
                "strict": options.strict,
                "allow_roles": options.allow_roles,
                "zero_weights": origin is not None,
            },
        )
    if origin is not None:
        check_complete(source, len(dataset), origin)
    counts, kept = count_dataset(dataset, source, split)
    check_counts(counts, max_dropped=options.max_dropped)
    return Rows(
        name=name,
        source=source,
        dataset=dataset if len(kept) == len(dataset) else dataset.select(kept),
        fingerprint=dataset._fingerprint,
        counts=counts,
        origin=origin,
    )


def count_dataset(
    dataset: datasets.Dataset, source: str, split: str
) -> tuple[AuditCounts, np.ndarray]:
    """`count_rows` on the columns `drop note row group remarks` of a dataset."""
    columns = dataset.select_columns(["drop", "note", "row", "group", "remarks"])
    table = columns.with_format("arrow")[:]
    return count_rows(
        split=split,
        source=source,
        drop=table["drop"].to_pylist(),
        note=table["note"].to_pylist(),
        row=table["row"].to_numpy(),
        group=table["group"].to_numpy(),
        remarks=table["remarks"].to_numpy(),
    )


def generate_rows(
    name: str,
    split: str,
    path: str | None,
    cache_dir: str | None,
    state: str,
    weighted: bool,
    paired: bool,
    on_error: str,
    strict: bool,
    allow_roles: bool,
    zero_weights: bool,
) -> Iterator[dict[str, Any]]:
    """Checked rows of a source, those to drop included; what `datasets` writes to its cache.

    All arguments are plain values, because the cache is found by them; `state` is there for
    nothing else.
    """
    source = path or HUB_PATHS.get(name, name)
    tracker = PairTracker()
    number = 0
    for number, record in _records(name, split, path, cache_dir):
        message = ""
        try:
            if isinstance(record, RowError):
                raise record
            row = parse_row(
                record, weighted=weighted, allow_roles=allow_roles, zero_weights=zero_weights
            )
        except RowError as error:
            message = error.at(source, number)
            if on_error == "raise":
                raise DataError(message) from None
            row = _malformed_row()
        if strict and row["drop"] not in ("", MALFORMED):
            raise DataError(f"{source}:{number}: {row['drop']} (data.strict=true)")
        group, remarks = tracker.add(row, paired=paired)
        yield {
            **row,
            # only a built-in dataset says what to imitate: a file's other fields are ignored
            "sft_target": _nonblank(record.get("sft_target")) if path is None else None,
            "row": number,
            "group": group,
            "remarks": int(remarks),
            "note": message,
        }
    if number == 0:
        raise DataError(f"0 rows in split {split!r} of {source}")


class PairTracker:
    """Numbers prompts by first appearance and notices pairs that come again."""

    def __init__(self) -> None:
        self.groups: dict[bytes, int] = {}
        self.pairs: set[bytes] = set()

    def add(self, row: Row, *, paired: bool) -> tuple[int, Remark]:
        """The row's prompt number (-1 if the row is dropped) and what is remarkable about it."""
        if row["drop"]:
            return -1, Remark(0)
        prompt = _digest(row["prompt"])
        group = self.groups.setdefault(prompt, len(self.groups))
        if not paired:
            return group, Remark(0)
        chosen, rejected = _digest(row["chosen"]), _digest(row["rejected"])
        if chosen == rejected:
            return group, Remark.IDENTICAL
        remarks = Remark(0)
        if prompt + chosen + rejected in self.pairs:
            remarks |= Remark.DUPLICATE
        if prompt + rejected + chosen in self.pairs:
            remarks |= Remark.CONTRADICTION
        self.pairs.add(prompt + chosen + rejected)
        return group, remarks


def _records(
    name: str, split: str, path: str | None, cache_dir: str | None
) -> Iterator[tuple[int, Any]]:
    if path is not None:
        yield from read_records(Path(path))
    elif name == "planted":
        from fastpref.planted import generate_rows as planted_rows

        yield from enumerate(planted_rows(split), start=1)
    else:
        yield from enumerate(hub_rows(name, split, cache_dir), start=1)


def _nonblank(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _malformed_row() -> Row:
    return Row(
        form="",
        prompt="",
        chosen="",
        rejected="",
        chosen_weights=None,
        rejected_weights=None,
        weights_digest=None,
        drop=MALFORMED,
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
