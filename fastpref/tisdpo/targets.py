"""The files that an estimation writes, none of which may replace a file of another kind."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastpref.data.source import Rows
from fastpref.data.weights_file import read_origin
from fastpref.errors import ConfigError, DataError
from fastpref.tisdpo.jobs import JobOptions


def one_for_each_file(sources: Sequence[Rows], options: JobOptions) -> list[Rows]:
    """The sources to write weights files for: of splits that read the same file, only one.

    Raises:
        ConfigError: two different sources have the same weights file, or one would replace rows
            that are read or a file that no estimation wrote.
    """
    read = {os.path.realpath(path) for rows in sources for path in rows.location.paths}
    written: dict[Path, Rows] = {}
    for rows in sources:
        path = options.path_of(rows)
        first = written.setdefault(path, rows)
        if first.location.paths != rows.location.paths:
            raise ConfigError(
                f"weights.output_dir: {path} would hold the weights of {first.source} and of "
                f"{rows.source}; datasets of one name need a folder each"
            )
        if os.path.realpath(path) in read:
            raise ConfigError(
                f"weights.output_dir: {path} is a file whose rows are read; set another folder, or "
                "weights.suffix"
            )
        if path.exists() and not _is_of_an_estimation(path):
            raise ConfigError(
                f"weights.output_dir: {path} is there and has no record of an estimation beside "
                "it, so it is not overwritten; set another folder or weights.suffix, or move it"
            )
    return list(written.values())


def _is_of_an_estimation(path: Path) -> bool:
    try:
        return read_origin(path) is not None
    except DataError:
        # written by an estimation, though its sidecar is damaged
        return True
