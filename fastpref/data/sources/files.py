"""Where the rows of a data set lie: files of a folder, whole or in shards, or the hub."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fastpref.checks import hint, listed
from fastpref.config.data import SPLITS
from fastpref.data.cache import file_state
from fastpref.data.sources.built_in import SOURCES
from fastpref.data.sources.hub import hub_splits, hub_state
from fastpref.data.sources.readers import SUFFIXES
from fastpref.errors import DataError

ENDINGS = "|".join(map(re.escape, SUFFIXES))
ANY_SUFFIX = (
    ".jsonl (or .ndjson, .parquet, .json, .arrow, .csv, .tsv, those of text also .gz, .bz2, .xz or "
    ".zst, or shards of one)"
)
"""What a data file may end with, in words."""
NO_DATA = re.compile(r"(dataset_info|dataset_dict|state)\.json|cache-.*\.arrow")
"""What `datasets` puts beside the files that `save_to_disk` writes."""
OTHER_NAMES = {"test": ("validation", "valid", "val", "eval", "dev")}
"""What else a split is called."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class MissingSplitError(DataError):
    """A data set is there, and the split that was asked for is not."""


class Location(NamedTuple):
    """Where one split of a data set lies: plain values, by which the cache finds its rows."""

    name: str
    """As the option `datasets` has it."""
    split: str
    """train or test."""
    split_there: str
    """What that split is called there."""
    paths: tuple[str, ...] = ()
    """Files, in their order."""
    is_hub: bool = False
    """`name` is a data set of the hub."""
    hub_config: str | None = None
    """Which configuration of it; None for its only or default one."""
    passed_over: tuple[str, ...] = ()
    """Files that are there as well and not read, in the data set's folder."""

    @property
    def is_built_in(self) -> bool:
        return not self.paths and not self.is_hub

    @property
    def files(self) -> tuple[str, ...]:
        """What messages call each file of it."""
        if self.is_built_in:
            return (SOURCES[self.name].origin,)
        return self.paths or (self.name,)

    @property
    def source(self) -> str:
        """What messages call all of it."""
        if len(self.paths) < 2:
            return self.files[0]
        first, last = self.paths[0], Path(self.paths[-1]).name
        return f"{first} … {last} ({len(self.paths)} files)"

    def state(self, cache_dir: str | None) -> str:
        """What tells that its rows have changed; "" where nothing does.

        Args:
            cache_dir: Of `datasets`, for a data set of the hub.

        Raises:
            DataError: a file is gone, or the hub cannot be reached.
        """
        if self.is_hub:
            return hub_state(self.name, self.hub_config, self.split_there, cache_dir)
        try:
            return "\n".join(file_state(Path(path)) for path in self.paths)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


def find_source(
    name: str, split: str, base_data_dir: str | None, split_names: Mapping[str, str]
) -> Location:
    """Where a split of a data set lies.

    A folder {base_data_dir}/{name} comes before a built-in data set of the same name, and both
    before one of the hub, whose names have a slash.

    Args:
        name: As the option `datasets` has it.
        split: train or test.
        base_data_dir: Holds folders by name; None where there are none.
        split_names: What splits of folders and of the hub are called there.

    Raises:
        DataError: there is none; names what lies there instead. A `MissingSplitError` where a
            folder is there and only the split is not.
    """
    there = split_names.get(split, split)
    folder = Path(base_data_dir) / name if base_data_dir is not None else None
    if folder is not None and folder.is_dir():
        paths, others = find_files(folder, there)
        if not paths:
            raise _no_files(folder, name, split, there)
        passed_over = tuple(str(path.relative_to(folder)) for path in others)
        return Location(name, split, there, tuple(map(str, paths)), passed_over=passed_over)
    if name in SOURCES:
        return Location(name, split, split)
    if folder is not None and not folder.parent.is_dir() and not HUB_ID.fullmatch(name):
        raise DataError(f"base_data_dir: no folder {folder.parent}; expected it to hold {name}/")
    if HUB_ID.fullmatch(name):
        return Location(name, split, there, is_hub=True)
    built_in = f"built in: {', '.join(SOURCES)}"
    path = Path(name).expanduser().absolute()
    if folder is None and path.exists():
        place = path.parent if path.is_file() else path
        raise DataError(
            f"datasets: {name} is a path; data sets go by the names of their folders: datasets="
            f"[{place.name}] base_data_dir={place.parent} reads the splits in {place}"
        )
    if folder is None:
        raise DataError(
            f"datasets: no dataset {name!r}; {built_in}; a local folder DIR/{name} needs "
            f"base_data_dir=DIR{hint(name, SOURCES)}"
        )
    found = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    raise DataError(
        f"datasets: no folder {folder}; expected {there}{ANY_SUFFIX} in it; folders there: "
        f"{listed(found) or 'none'}; {built_in}{hint(name, [*found, *SOURCES])}"
    )


def check_hub_split(location: Location, cache_dir: str | None) -> None:
    """See that a data set of the hub has a split.

    Raises:
        MissingSplitError: it has not; names those that it has.
        DataError: the hub cannot be reached.
    """
    there = location.split_there
    found = hub_splits(location.name, location.hub_config, cache_dir)
    # a part of a split is written train[:90%], two of them train+validation
    if not {part.partition("[")[0] for part in there.split("+")} <= set(found):
        is_named = location.split != there
        advice = hint(there, found) if is_named else _split_names(there, set(found))
        raise MissingSplitError(
            f"datasets: {location.name} has no split {there!r}, only {listed(found)}{advice}"
        )


class Files(NamedTuple):
    """Files of a split in a folder."""

    paths: list[Path]
    """Those to read, in their order."""
    passed_over: list[Path]
    """Others that could have been read instead."""


def find_files(folder: Path, split: str) -> Files:
    """The files of a split in a folder, or, as on the hub, in its folder `data`.

    In this order: one file {split}.SUFFIX; shards such as {split}-00000-of-00003.SUFFIX or
    {split}_0.SUFFIX; a folder {split}/ of files. What is there under several suffixes is read
    under the first of `SUFFIXES`.

    Raises:
        DataError: a shard is missing, there or in the split's folder.
    """
    found = [
        (files, in_order)
        for place in (folder, folder / "data")
        for files, in_order in (
            (_data_files(place, re.compile(re.escape(split))), _as_listed),
            (_data_files(place, _shard_of(split)), _by_number),
            (_data_files(place / split), _by_name),
        )
        if files.paths
    ]
    if not found:
        return Files([], [])
    (first, in_order), *others = found
    later = [path for files, _ in others for path in (*files.paths, *files.passed_over)]
    return Files(in_order(split, first.paths), [*first.passed_over, *later])


def split_of(path: Path) -> str:
    """The split that a data file belongs to by its name; "" for another file."""
    match = re.fullmatch(rf"(.+?)(?:[-_.]\d+(?:-of-\d+(?:-\w+)?)?)?(?:{ENDINGS})", path.name)
    return match[1] if match else ""


def _data_files(folder: Path, stem: re.Pattern[str] | None = None) -> Files:
    """Data files of a folder, sorted, whose names without suffix match; each name once."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    names = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else ()
    for suffix in SUFFIXES:
        for path in names:
            name = path.name.removesuffix(suffix)
            is_data = path.name.endswith(suffix) and not NO_DATA.fullmatch(path.name)
            if is_data and (stem is None or stem.fullmatch(name)):
                by_stem[name].append(path)
    return Files(
        sorted(paths[0] for paths in by_stem.values()),
        sorted(path for paths in by_stem.values() for path in paths[1:]),
    )


def _shard_of(split: str) -> re.Pattern[str]:
    """What shards of a split are called: their number, and how many there are or None."""
    return re.compile(rf"{re.escape(split)}[-_.](\d+)(?:-of-(\d+)(?:-\w+)?)?", re.ASCII)


def _as_listed(split: str, paths: list[Path]) -> list[Path]:
    return paths


def _by_number(split: str, paths: list[Path]) -> list[Path]:
    """Shards in the order of their numbers."""
    folder, stem = paths[0].parent, _shard_of(split)
    numbered = {path: stem.fullmatch(re.sub(f"(?:{ENDINGS})$", "", path.name)) for path in paths}
    numbers = {path: int(match[1]) for path, match in numbered.items() if match}
    totals = {match[2] for match in numbered.values() if match}
    if len(totals) > 1:
        raise DataError(
            f"{folder}: shards of {split!r} that do not belong together: "
            f"{listed(sorted(path.name for path in numbers))}"
        )
    if totals and (total := totals.pop()) is not None:
        _check_complete(folder, split, numbers, int(total))
    return sorted(numbers, key=lambda path: (numbers[path], path.name))


def _by_name(split: str, paths: list[Path]) -> list[Path]:
    """Data files of a split's own folder, whatever they are called."""
    sets: dict[tuple[str, int], dict[Path, int]] = defaultdict(dict)
    for path in paths:
        if match := re.match(r"(.*?)(\d+)-of-(\d+)", path.name, re.ASCII):
            sets[match[1], int(match[3])][path] = int(match[2])
    for (_, total), numbers in sets.items():
        _check_complete(paths[0].parent, split, numbers, total)
    return paths


def _check_complete(folder: Path, split: str, numbers: dict[Path, int], total: int) -> None:
    """Raises DataError unless shards are numbered 0 to total - 1, as on the hub, or from 1 on."""
    complete = [set(range(first, first + total)) for first in (0, 1)]
    if set(numbers.values()) not in complete or len(numbers) != total:
        raise DataError(
            f"{folder}: {len(numbers)} of {total} shards of {split!r} are there: "
            f"{listed(sorted(path.name for path in numbers))}"
        )


def _contents(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name == "data" and path.is_dir():
            yield from sorted(path.iterdir())
        else:
            yield path


def _no_files(folder: Path, name: str, split: str, there: str) -> MissingSplitError:
    contents = list(_contents(folder))
    found = [f"{path.relative_to(folder)}{_no_file(path)}" for path in contents]
    splits = {path.name if path.is_dir() else split_of(path) for path in contents} - {""}
    advice = _split_names(split, splits) if split == there else ""
    advice = advice or _own_folders(folder, name, there)
    # neither what `datasets` puts beside is meant nor, unless by its name, the other split
    others = ("", "train", "test") if split == there else ("",)
    near = [path for path in contents if split_of(path) not in others]
    near = [path for path in near if not NO_DATA.fullmatch(path.name)]
    if not advice and near and split == there == SPLITS[0]:
        names = sorted({split_of(path) for path in near})
        called = names[0] if len(names) == 1 else f"one of {listed(names)}"
        advice = f"; to read what is called otherwise: data.split_names={{{split}: {called}}}"
    advice = advice or hint(f"{there}.jsonl", [path.name for path in near])
    return MissingSplitError(
        f"datasets: no file {folder / there}{ANY_SUFFIX}; found "
        f"{listed(found) or 'an empty folder'}{advice}"
    )


def _no_file(path: Path) -> str:
    """What something with the name of a data file is, where it is no file."""
    if not split_of(path) or path.is_file():
        return ""
    if path.is_dir():
        return " (a folder)"
    return " (no regular file)" if path.exists() else " (a link to nothing)"


def _own_folders(folder: Path, name: str, there: str) -> str:
    """Folders that are data sets by themselves, as the hub has configurations, to end a message
    with; "" for none."""
    own = [
        f"{name}/{child.name}"
        for child in sorted(path for path in folder.iterdir() if path.is_dir())
        if any(split_of(path) == there for path in _contents(child) if path.is_file())
    ]
    return f"; folders in it that have one: datasets=[{','.join(own)}]" if own else ""


def _split_names(missing: str, splits: set[str]) -> str:
    """What a missing split may be called there, and the other one with it, to end a message with;
    "" for no idea."""
    meant = {}
    for split in SPLITS:
        names = [name for name in sorted(splits) if name.startswith(f"{split}_")]
        names += [name for name in OTHER_NAMES.get(split, ()) if name in splits]
        if split not in splits and names:
            meant[split] = names[0] if len(names) == 1 else f"one of {' '.join(names)}"
    named = ", ".join(f"{split}: {name}" for split, name in meant.items())
    return f"; splits of other names: data.split_names={{{named}}}" if missing in meant else ""
