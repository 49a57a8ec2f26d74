"""Locate the rows of a dataset: files of a folder, whole or in shards, or the hub."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastpref.checks import hint, listed
from fastpref.config.data import SPLITS
from fastpref.data.cache import file_state
from fastpref.data.sources.built_in import SOURCES
from fastpref.data.sources.hub import hub_splits, hub_state
from fastpref.data.sources.readers import SUFFIXES
from fastpref.errors import DataError, is_shortage

ENDINGS = "|".join(map(re.escape, SUFFIXES))
ANY_SUFFIX = (
    ".jsonl (or .ndjson, .parquet, .json, .arrow, .csv, .tsv, those of text also .gz, .bz2, .xz or "
    ".zst, or shards of one)"
)
"""The suffixes of data files, in words."""
NO_DATA = re.compile(r"(dataset_info|dataset_dict|state)\.json|cache-.*\.arrow")
"""Metadata and cache files of `datasets` in the folders that `save_to_disk` writes."""
OTHER_NAMES = {"test": ("validation", "valid", "val", "eval", "dev")}
"""Split -> other common names, for suggestions."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class MissingSplitError(DataError):
    """A dataset exists, but not the requested split."""


@contextmanager
def _reading() -> Iterator[None]:
    """Turn an OSError into a `DataError`, unless it says nothing of the files."""
    try:
        yield
    except OSError as error:
        if is_shortage(error):
            raise
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


class Location(NamedTuple):
    """Location of one split of a dataset; plain values, as they are part of the cache key."""

    name: str
    """Name in the option `datasets`."""
    split: str
    """train or test."""
    split_there: str
    """Name of that split in the dataset."""
    paths: tuple[str, ...] = ()
    """Files, in reading order; empty for hub and built-in datasets."""
    is_hub: bool = False
    """`name` is a hub id."""
    hub_config: str | None = None
    """Configuration of a hub dataset; None for its only or default one."""
    passed_over: tuple[str, ...] = ()
    """Files of the split that are not read, relative to the dataset's folder."""

    @property
    def is_built_in(self) -> bool:
        return not self.paths and not self.is_hub

    @property
    def files(self) -> tuple[str, ...]:
        """Name of each file for messages; a source without files counts as one."""
        if self.is_built_in:
            return (SOURCES[self.name].origin,)
        return self.paths or (self.name,)

    @property
    def source(self) -> str:
        """Name of the whole source for messages."""
        if len(self.paths) < 2:
            return self.files[0]
        first, last = self.paths[0], Path(self.paths[-1]).name
        return f"{first} … {last} ({len(self.paths)} files)"

    def state(self, cache_dir: str | None) -> str:
        """Fingerprint of the files or the hub split, to detect changes; "" for built-in data.

        Args:
            cache_dir: Cache folder of `datasets`, for hub datasets.

        Raises:
            DataError: a file is gone, or the hub cannot be reached.
        """
        if self.is_hub:
            return hub_state(self.name, self.hub_config, self.split_there, cache_dir)
        with _reading():
            return "\n".join(file_state(Path(path)) for path in self.paths)


@_reading()
def find_source(
    name: str, split: str, base_data_dir: str | None, split_names: Mapping[str, str]
) -> Location:
    """Locate a split of a dataset.

    A folder {base_data_dir}/{name} takes precedence over a built-in dataset of the same name, and
    both over a hub dataset, whose id contains a slash.

    Args:
        name: Name in the option `datasets`.
        split: train or test.
        base_data_dir: Folder of the local datasets; None for none.
        split_names: train or test -> name of that split in folders and on the hub.

    Raises:
        DataError: there is no such dataset, or its folder cannot be read; names what was found
            instead. A `MissingSplitError` if only the split is missing in its folder.
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
    # unlike `Path.expanduser`, this leaves the ~ of an unknown user
    path = Path(os.path.expanduser(name)).absolute()
    if file := next((place for place in (folder, path) if place and place.is_file()), None):
        raise _path_given(name, file, split_names)
    if folder is not None and not folder.parent.is_dir() and not HUB_ID.fullmatch(name):
        raise DataError(f"base_data_dir: no folder {folder.parent}; expected it to hold {name}/")
    if HUB_ID.fullmatch(name):
        return Location(name, split, there, is_hub=True)
    built_in = f"built in: {', '.join(SOURCES)}"
    if folder is None and path.exists():
        raise _path_given(name, path, split_names)
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


def _path_given(name: str, path: Path, split_names: Mapping[str, str]) -> DataError:
    """Error about a path that stands in `datasets` in place of a name.

    Args:
        name: What stands in `datasets`.
        path: The file or folder that is there.
        split_names: See `find_source`.
    """
    place, called = (path.parent, split_of(path)) if path.is_file() else (path, "")
    is_other = called not in ("", *SPLITS, *split_names.values())
    advice = f"; for {path.name} add data.split_names={{train: {called}}}" if is_other else ""
    return DataError(
        f"datasets: {name} is a path; datasets go by the names of their folders: datasets="
        f"[{place.name}] base_data_dir={place.parent} reads the splits in {place}{advice}"
    )


def check_hub_split(location: Location, cache_dir: str | None) -> None:
    """Check that a hub dataset has a split.

    Raises:
        MissingSplitError: it lacks the split; names those that it has.
        DataError: the hub cannot be reached.
    """
    there = location.split_there
    found = hub_splits(location.name, location.hub_config, cache_dir)
    # syntax of `datasets`: train[:90%] is a slice of a split, train+validation a union
    if not {part.partition("[")[0] for part in there.split("+")} <= set(found):
        is_named = location.split != there
        advice = hint(there, found) if is_named else _split_names(there, set(found))
        raise MissingSplitError(
            f"datasets: {location.name} has no split {there!r}, only {listed(found)}{advice}"
        )


class Files(NamedTuple):
    """Files of a split in a folder."""

    paths: list[Path]
    """Files to read, in order."""
    passed_over: list[Path]
    """Alternatives that are not read."""


def find_files(folder: Path, split: str) -> Files:
    """The files of a split in a folder or, as on the hub, in its subfolder `data`.

    In order of precedence: one file {split}.SUFFIX; shards such as {split}-00000-of-00003.SUFFIX
    or {split}_0.SUFFIX; a folder {split}/ of files. Of files that differ in suffix only, the one
    whose suffix is first in `SUFFIXES` is read.

    Raises:
        DataError: shards are missing or do not belong together.
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
    """The split of a data file: its name without shard number and suffix; "" for other files."""
    match = re.fullmatch(rf"(.+?)(?:[-_.]\d+(?:-of-\d+(?:-\w+)?)?)?(?:{ENDINGS})", path.name)
    return match[1] if match else ""


def _data_files(folder: Path, stem: re.Pattern[str] | None = None) -> Files:
    """Sorted data files of a folder whose stem matches, one per stem by order of `SUFFIXES`."""
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
    """Pattern of a shard's stem; its groups are the shard's number and the total, if named."""
    return re.compile(rf"{re.escape(split)}[-_.](\d+)(?:-of-(\d+)(?:-\w+)?)?", re.ASCII)


def _as_listed(split: str, paths: list[Path]) -> list[Path]:
    return paths


def _by_number(split: str, paths: list[Path]) -> list[Path]:
    """Sort shards by their numbers; if their names give a total, none may be missing."""
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
    """Data files of a split's own folder, sorted by name, checked for missing shards."""
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
    # suggest neither metadata of `datasets` nor, unless the split was renamed, the other split
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
    """Remark on a path that has the name of a data file and is no file; "" for others."""
    if not split_of(path) or path.is_file():
        return ""
    if path.is_dir():
        return " (a folder)"
    return " (no regular file)" if path.exists() else " (a link to nothing)"


def _own_folders(folder: Path, name: str, there: str) -> str:
    """Suggestion of subfolders that hold the split, such as configurations of a hub dataset, as
    the end of an error message; "" for none."""
    own = [
        f"{name}/{child.name}"
        for child in sorted(path for path in folder.iterdir() if path.is_dir())
        if any(split_of(path) == there for path in _contents(child) if path.is_file())
    ]
    return f"; folders in it that have one: datasets=[{','.join(own)}]" if own else ""


def _split_names(missing: str, splits: set[str]) -> str:
    """Suggestion of names for a missing split, together with the other split if that is missing
    too, as the end of an error message; "" for none."""
    meant = {}
    for split in SPLITS:
        names = [name for name in sorted(splits) if name.startswith(f"{split}_")]
        names += [name for name in OTHER_NAMES.get(split, ()) if name in splits]
        if split not in splits and names:
            meant[split] = names[0] if len(names) == 1 else f"one of {' '.join(names)}"
    named = ", ".join(f"{split}: {name}" for split, name in meant.items())
    return f"; splits of other names: data.split_names={{{named}}}" if missing in meant else ""
