"""Location of each split's rows: in a split of their own, or held out of the train split."""

from collections.abc import Sequence
from typing import NamedTuple

from fastpref.config.data import SPLITS
from fastpref.data.options import DataOptions
from fastpref.data.sources.files import Location, MissingSplitError, check_hub_split, find_source
from fastpref.errors import DataError


class Part(NamedTuple):
    """The rows of one split of a dataset."""

    location: Location
    split: str
    """train or test; test at a train location means rows held out of the train split."""
    is_divided: bool = False
    """The location holds the rows of both splits."""


def check_sources(options: DataOptions, splits: Sequence[str] = SPLITS) -> None:
    """Check that every dataset has its files, before anything heavy is loaded.

    Raises:
        DataError: naming the path, what was expected and what was found.
    """
    parts = [find_part(name, split, options) for name in options.names for split in splits]
    for name in options.config_names:
        if not any(part.location.is_hub and part.location.name == name for part in parts):
            raise DataError(
                f"data.config_names: {name} is no data set of the hub, so it has no configurations"
            )
    if all(part.location.is_built_in for part in parts):
        for key, value in (("columns", options.read.columns), ("split_names", options.split_names)):
            if value:
                raise DataError(
                    f"data.{key} is for files and data sets of the hub; all of datasets="
                    f"[{','.join(options.names)}] are built in"
                )


def own_parts(options: DataOptions) -> list[Part]:
    """The existing splits of all datasets, nothing held out; all train splits first.

    Raises:
        DataError: a dataset has neither split, or a split lacks shards.
    """
    parts, missing = [], dict[str, MissingSplitError]()
    for split in SPLITS:
        for name in options.names:
            try:
                parts.append(Part(_find_own(name, split, options), split))
            except MissingSplitError as error:
                missing.setdefault(name, error)
    found = {part.location.name for part in parts}
    for name in options.names:
        if name not in found:
            raise missing[name]
    return parts


def find_part(name: str, split: str, options: DataOptions) -> Part:
    """Locate the rows of a split.

    If the dataset has no test split and `data.test_fraction` is set, train and test are both
    parts of its train split.

    Raises:
        DataError: no such dataset or split, see `find_source`.
    """
    train, test = SPLITS
    is_divided, fraction = False, options.held_out.fraction
    if split == test or fraction:
        try:
            own = _find_own(name, test, options)
        except MissingSplitError as error:
            # if the train split is missing too, report that one
            own = _find_own(name, train, options)
            is_divided = fraction > 0
            if not is_divided:
                raise MissingSplitError(
                    f"{error}; or hold out prompts of the train split: data.test_fraction=0.05"
                ) from None
        if split == test or is_divided:
            return Part(own, split, is_divided)
    return Part(_locate(name, split, options), split)


def _find_own(name: str, split: str, options: DataOptions) -> Location:
    """Locate a split that exists by itself, locally or on the hub.

    Raises:
        DataError: see `find_source` and `check_hub_split`.
    """
    location = _locate(name, split, options)
    if location.is_hub:
        check_hub_split(location, options.cache_dir)
    return location


def _locate(name: str, split: str, options: DataOptions) -> Location:
    location = find_source(name, split, options.base_data_dir, options.split_names)
    if location.is_hub:
        return location._replace(hub_config=options.config_names.get(name))
    return location
