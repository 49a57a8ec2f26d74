"""The newest whole checkpoint is found whatever happened to the others; what is kept is kept."""

import errno
import logging
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from exhaustion import no_more_files

from fastpref.checkpoint.folders import (
    Best,
    clear_leftovers,
    delete,
    find_named,
    find_newest,
    folder_name,
    open_checkpoint,
    retain,
)
from fastpref.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_files,
    digest_files,
    read_manifest,
    write_manifest,
)
from fastpref.errors import CheckpointError


def make_checkpoint(folder: Path, step: int, **metrics: float) -> Path:
    """A whole checkpoint of two files, one of them in a single byte."""
    path = folder / folder_name(step)
    path.mkdir(parents=True)
    (path / "weights").write_bytes(random.Random(step).randbytes(3000))
    (path / "state.json").write_bytes(b"0")
    files = digest_files([path / "weights", path / "state.json"])
    write_manifest(path, Manifest(step=step, world_size=1, metrics=metrics, files=files))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """`checkpoints/` of a run with three of them."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (5, 10, 100):
        make_checkpoint(folder, step)
    return folder


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"0")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_unreadable(path: Path) -> None:
    path.write_bytes(b"\xff{")


FAULTS = {
    "missing file": ("weights", os.unlink, "weights is missing"),
    "truncated file": ("weights", cut, r"weights is truncated: 2,999 of 3,000 bytes"),
    "empty file": ("state.json", cut, r"state\.json is truncated: 0 of 1 bytes"),
    "longer file": ("weights", lengthen, r"weights is too long: 3,001 of 3,000 bytes"),
    "flipped bit": ("weights", flip, "weights is altered: its digest differs"),
    "no manifest": (MANIFEST, os.unlink, r"manifest\.json is missing"),
    "manifest cut": (MANIFEST, cut, r"manifest\.json is unreadable: JSONDecodeError"),
    "manifest not text": (MANIFEST, make_unreadable, r"manifest\.json is unreadable: Unicode"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_named_and_passed_over(folder, fault, caplog):
    name, inflict, message = FAULTS[fault]
    inflict(folder / "step-00000100" / name)
    with caplog.at_level(logging.WARNING):
        assert find_newest(folder).step == 10
    assert "step-00000100 is passed over" in caplog.text
    with pytest.raises(CheckpointError, match=f"step-00000100 is no whole checkpoint: {message}"):
        find_named(folder / "step-00000100")


def test_every_byte_of_a_checkpoint_counts(folder):
    path = folder / "step-00000010"
    places = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(60):
            altered = bytearray(whole)
            altered[places.randrange(len(whole))] ^= 1 << places.randrange(8)
            file.write_bytes(altered)
            try:
                manifest = open_checkpoint(path).manifest
            except CheckpointError:
                continue
            finally:
                file.write_bytes(whole)
            # white space between the manifest's entries means nothing
            assert file.name == MANIFEST and manifest == read_manifest(path)


def test_a_checkpoint_that_the_disk_does_not_give_up_is_passed_over(folder, caplog):
    newest = folder / "step-00000100"
    # it has no size, and to read it is an input/output error
    (newest / "lost").symlink_to("/proc/self/mem")
    manifest = read_manifest(newest)
    files = manifest.files | {"lost": FileEntry(0, "")}
    write_manifest(newest, replace(manifest, files=files))
    with caplog.at_level(logging.WARNING):
        assert find_newest(folder).step == 10
    assert "lost cannot be read: Input/output error" in caplog.text


def test_where_no_file_can_be_opened_no_checkpoint_is_passed_over(folder, caplog):
    manifest = read_manifest(folder / "step-00000100")
    for read in (
        lambda: find_newest(folder),
        lambda: open_checkpoint(folder / "step-00000100"),
        lambda: check_files(folder / "step-00000100", manifest),
    ):
        with pytest.raises(OSError) as raised, no_more_files():
            read()
        assert raised.value.errno == errno.EMFILE
    assert "passed over" not in caplog.text


def test_a_file_that_the_system_does_not_find_a_way_to_is_not_called_missing(folder):
    path = folder / "step-00000100" / "weights"
    path.unlink()
    path.symlink_to(path)
    message = "weights cannot be read: Too many levels of symbolic links"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path.parent)


def test_sizes_alone_can_be_checked(folder):
    newest = folder / "step-00000100"
    flip(newest / "weights")
    assert open_checkpoint(newest, digests=False).step == 100
    cut(newest / "weights")
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(newest, digests=False)


def test_a_manifest_of_another_step_is_found_out(folder):
    (folder / "step-00000005").rename(folder / "step-00000200")
    assert find_newest(folder).step == 100
    with pytest.raises(CheckpointError, match="its manifest is that of step 5"):
        find_named(folder / "step-00000200")


def test_what_only_looks_like_a_checkpoint_is_not_one(folder):
    for suffix in ("partial", "deleted", "abandoned", "abandoned-2"):
        shutil.copytree(folder / "step-00000100", folder / f"step-00000200.{suffix}")
    (folder / "step-00000300").write_text("a file")
    (folder / "latest").write_text("step-00000300\n")
    assert find_newest(folder).step == 100


def test_a_path_may_name_a_run_its_checkpoints_or_one_of_them(folder):
    run_dir = folder.parent
    assert find_named(run_dir).step == 100
    assert find_named(folder).step == 100
    (folder / "latest").write_text("step-00000010\n")
    assert find_named(folder / "latest").step == 100
    assert find_named(folder / "step-00000005").step == 5
    copy = shutil.copytree(folder / "step-00000010", run_dir.parent / "best of all")
    assert find_named(copy).step == 10


def test_a_path_to_nothing_says_what_was_looked_at(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"resume: .*no_run is not there"):
        find_named(tmp_path / "no_run")
    with pytest.raises(CheckpointError, match="weights is a file"):
        find_named(folder / "step-00000005" / "weights")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"looked for .*empty/checkpoints/step-\*"):
        find_named(tmp_path / "empty")
    for path in folder.iterdir():
        (path / "weights").unlink()
    message = "no whole checkpoint in .*: step-00000100: weights is missing; step-00000010: weights"
    for find in (find_newest, find_named):
        with pytest.raises(CheckpointError, match=message):
            find(folder)


def steps_in(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in folder.glob("step-????????")}


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_newest_and_the_best_are_kept(tmp_path, higher_is_better):
    values = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.9, 5: 0.1, 6: float("nan"), 7: float("inf")}
    for step, value in values.items():
        make_checkpoint(tmp_path, step, score=value)
    make_checkpoint(tmp_path, 8)
    deleted = retain(tmp_path, keep=2, best=Best("score", higher_is_better))
    # of equals the earlier one
    best = 2 if higher_is_better else 3
    assert steps_in(tmp_path) == {8, 7, best}
    assert {path.name for path in deleted} == {folder_name(s) for s in {1, 2, 3, 4, 5, 6} - {best}}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_metric_that_was_never_measured_keeps_nothing(folder):
    retain(folder, keep=1, best=Best("score", higher_is_better=True))
    assert steps_in(folder) == {100}


def test_the_one_that_is_resumed_from_stays(folder):
    protected = Path(os.path.relpath(folder / "step-00000005"))
    retain(folder, keep=1, protected=protected)
    assert steps_in(folder) == {5, 100}
    retain(folder, keep=1, protected=folder / "gone")
    assert steps_in(folder) == {100}


def test_broken_checkpoints_neither_count_nor_go(folder):
    (folder / "step-00000100" / "weights").unlink()
    retain(folder, keep=1)
    assert steps_in(folder) == {10, 100}
    assert find_newest(folder).step == 10


def test_leftovers_are_cleared_and_nothing_else(folder):
    before = sorted(os.listdir(folder))
    shutil.copytree(folder / "step-00000005", folder / "step-00000005.deleted")
    (folder / "step-00000101.partial").mkdir()
    (folder / "latest.partial").write_text("step-000")
    clear_leftovers(folder)
    assert sorted(os.listdir(folder)) == before


def test_deleting_begins_anew_over_what_an_earlier_try_left(folder):
    (folder / "step-00000005.deleted").mkdir()
    (folder / "step-00000005.deleted" / "weights").write_text("left")
    delete(folder / "step-00000005")
    assert sorted(os.listdir(folder)) == ["step-00000010", "step-00000100"]
