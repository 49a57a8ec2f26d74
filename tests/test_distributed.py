"""Ranks share rank 0's errors, and say what is wrong with the world they were started in."""

import datetime
import errno
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_on_ranks
from safetensors.torch import load_file, save_file
from tiny_models import (
    DISTANCES,
    read_metrics,
    save_dataset,
    save_tiny_model,
    text_rows,
    write_rows,
)

import train
from fastpref import distributed, heartbeat
from fastpref.cli import ranks as ranks_of_cli
from fastpref.cli.command_line import main
from fastpref.cli.run import run_on_this_rank
from fastpref.cli.tasks import run_task
from fastpref.config import Config, DPOConfig, ModelConfig, PackingConfig, WeightsConfig
from fastpref.distributed import (
    FAREWELL_TIMEOUT,
    World,
    beat_key,
    index_of_gpu,
    init_world,
    read_ranks,
)
from fastpref.errors import (
    DataError,
    DistributedError,
    LostRankError,
    RankError,
    RankMemoryError,
    error_text,
)
from fastpref.explanations import explain
from fastpref.heartbeat import Heartbeat, await_device
from fastpref.meeting import join_store
from fastpref.model.attention.choice import choose_rows
from fastpref.model.build import build_scorer
from fastpref.model.liger import choose_liger
from fastpref.model.loading import load_causal_lm, try_model
from fastpref.model.source import load_tokenizer
from fastpref.scoring.models import load_frozen_scorer
from fastpref.tisdpo.sides import build_sides
from fastpref.train.data import load_data
from fastpref.train.export.latest import export_model
from fastpref.train.export.plan import plan_export
from fastpref.train.run_folder import run_place

UNWRITABLE = "/proc/no-such-folder"
"""The kernel lets nobody make a folder there."""


def save_broken_models(base: Path) -> None:
    """Models that look well until rank 0 reads them."""
    save_tiny_model(base / "model")
    damaged = save_tiny_model(base / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    save_tiny_model(base / "distances", **DISTANCES)
    not_finite = save_tiny_model(base / "not finite") / "model.safetensors"
    weights = load_file(not_finite)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, not_finite, metadata={"format": "pt"})
    gone = save_tiny_model(base / "gone")
    (gone / "model.safetensors").unlink()
    (gone / "model.safetensors").symlink_to(base / "nothing")
    unknown = save_tiny_model(base / "unknown", dtype=torch.bfloat16)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "no-such-family"}))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("ranks")
    save_broken_models(base)
    save_dataset(base, "words")
    for rank in range(2):
        save_dataset(base / f"disk of rank {rank}", "words", num_train=24 + rank)
    write_rows(base / "bad", "train", [*text_rows(3), {"prompt": "a"}])
    write_rows(base / "bad", "test", text_rows(3))
    return base


def make_config(base: Path, model: str = "model", **options: Any) -> Config:
    values: dict[str, Any] = {
        "model": ModelConfig(name_or_path=str(base / model), fsdp_policy_mp=None),
        "loss": DPOConfig(),
        "datasets": ["words"],
        "base_data_dir": str(base),
        "max_length": 64,
        "max_prompt_length": 32,
    }
    return Config(**(values | options))


def failures(base: Path, world: World) -> dict[str, Callable[[], Any]]:
    """What rank 0 finds out for all, in a world where it fails, with its exit code."""
    whole = make_config(base)
    packed = make_config(base, "distances", packing=PackingConfig(share_prompt="true"))
    weights = WeightsConfig(positive=str(base / "gone"), negative="tiny", output_dir="out")

    def load(model: str, *, trainable: bool = True) -> Any:
        return load_causal_lm(make_config(base, model).model, world, trainable=trainable)

    def pack() -> None:
        model = load("distances")
        path = try_model(model, packed.model, world, trainable=True).path
        choose_rows(model, packed.model, packed.packing, world, path=path, longest=64)

    def export() -> None:
        model = load("model")
        path = try_model(model, whole.model, world, trainable=True).path
        scorer = build_scorer(model, whole.model, world, path=path, trainable=True)
        tokenizer = load_tokenizer(str(base / "model"))
        plan = plan_export(whole.model, model.config, tokenizer, None) if world.is_main else None
        export_model(scorer, plan, Path(UNWRITABLE), world)

    return {
        "3 rows": lambda: load_data(make_config(base, datasets=["bad"]), world),
        "3 other rows": lambda: load_data(
            make_config(base / f"disk of rank {world.rank}", model=str(base / "model")), world
        ),
        "2 options": lambda: run_task(make_config(base, lr=1e-3 * (1 + world.rank)), world),
        "4 weights": lambda: load("damaged"),
        "4 stored dtype": lambda: load("unknown", trainable=False),
        "4 model": lambda: load_frozen_scorer(
            make_config(base, "not finite").model, whole.packing, world, longest=8
        ),
        "2 packing": pack,
        "2 liger": lambda: choose_liger("true", load("model"), world, compiled=False),
        "4 identity": lambda: build_sides(
            weights, whole.model, whole.adapter, whole.packing, world
        ),
        "4 run folder": lambda: world.on_main(
            lambda: run_place(make_config(base, run_dir=UNWRITABLE)).create("")
        ),
        "4 export": export,
        "1 bug": lambda: world.on_main(lambda: 1 // 0),
    }


def fail_on_this_rank(base: Path, out: Path) -> None:
    world = init_world()
    found = {}
    for name, fail in failures(base, world).items():
        started = time.monotonic()
        try:
            fail()
        except Exception as error:
            known = explain(error)
            code, text = (known.exit_code, str(known)) if known else (1, type(error).__name__)
            found[name] = [code, text, time.monotonic() - started]
    (out / str(world.rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


def test_what_fails_on_rank_0_ends_every_rank_with_the_same_error_at_once(base, tmp_path):
    run_on_ranks(fail_on_this_rank, 2, base, tmp_path)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert len(first) == 12 and first.keys() == second.keys()
    for name, (code, text, _) in first.items():
        assert code == int(name[0]), f"{name}: {text}"
        assert second[name][0] == code, f"{name}: {second[name]}"
        if code != 1:
            assert second[name][1] == text
        # a rank that was left alone would wait for half an hour
        assert second[name][2] < 10, name
    assert "rank 0 failed: ZeroDivisionError" in second["1 bug"][1]
    assert first["3 other rows"][1].startswith("data of rank 1 are not those of rank 0: ")
    assert first["2 options"][1] == "rank 1 was started with lr=0.002, and rank 0 lr=0.001"


def run_main(commands: list[list[str]], out: Path, spoil: Path) -> None:
    """The program on this rank, once for each command; a file is replaced by a folder on rank 0
    as soon as it is there."""
    if os.environ["RANK"] == "0":
        threading.Thread(target=replace_by_folder, args=(spoil,), daemon=True).start()
    codes = [main(command, train.compose_choices, train.CONFIG_DIR) for command in commands]
    (out / os.environ["RANK"]).write_text(json.dumps(codes))


def run_main_in(folders: Path, command: list[str]) -> None:
    """The program on this rank, which sees folders of its own."""
    os.chdir(folders / os.environ["RANK"])
    Path("code").write_text(str(main(command, train.compose_choices, train.CONFIG_DIR)))


def test_a_rank_that_refuses_alone_says_so_to_the_others(base, tmp_path, capfd):
    for rank in "01":
        (tmp_path / rank).mkdir()
    # what rank 1's machine has for a disk is a file
    (tmp_path / "1" / "disk").touch()
    run_on_ranks(run_main_in, 2, tmp_path, arguments(base, "model", Path("disk/run")))
    said = capfd.readouterr().err
    # rank 0 has heard of it, and did nothing
    assert [(tmp_path / rank / "code").read_text() for rank in "01"] == ["7", "2"], said
    assert f"run_dir: {tmp_path}/1/disk is a file, expected a folder" in said
    assert not (tmp_path / "0" / "disk").exists()


def replace_by_folder(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    path.rename(path.with_name("before"))
    path.mkdir()


def arguments(base: Path, model: str, run_dir: Path) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={base / model}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "loss=dpo"),
        *("max_length=64", "max_prompt_length=32", "batch_size=8", "n_epochs=100000"),
        *("sample_during_eval=false", "minimum_log_interval_secs=0"),
    ]


def test_processes_end_with_the_exit_code_of_rank_0_and_the_model_is_saved(base, tmp_path):
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    commands = [arguments(base, model, run_dir) for model in ("damaged", "model")]
    run_on_ranks(run_main, 2, commands, tmp_path, metrics)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[4, 4]] * 2
    # the second one's numbers could not be written from some step on
    assert (run_dir / "LATEST" / "model.safetensors").exists()
    metrics.rmdir()
    (run_dir / "before").rename(metrics)
    assert read_metrics(run_dir, "eval")


def world_of(rank: int, store: Any) -> World:
    """One of two ranks that share a store, and no more."""
    return World(rank=rank, size=2, device=torch.device("cpu"), mesh=None, store=store)


def test_an_error_of_one_rank_alone_is_said_by_it(monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 0)
    monkeypatch.setattr(heartbeat, "STORE_SECONDS", 0.1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    store = dist.HashStore()
    first, second = (Heartbeat(world_of(rank, store)) for rank in range(2))
    error = DataError("no folder words")
    alone = second.close(error)
    assert isinstance(alone, DataError)
    assert error_text(alone) == "fastpref: rank 1: no folder words\n"
    # what is everybody's rank 0 says
    assert first.close(error) is error and second.close(error) is error
    assert error_text(error) == ""
    assert store.get("end 1") == b"no folder words"


def test_what_rank_0_ended_of_is_said_by_it_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    store = dist.HashStore()
    first, second = (Heartbeat(world_of(rank, store)) for rank in range(2))
    first.say_why(DataError("no folder words"))
    lost = second.close(LostRankError("Connection closed by peer"))
    assert str(lost) == "rank 0 ended: no folder words"
    assert error_text(lost) == ""


def test_an_error_without_words_is_said_by_its_name():
    for error in (ZeroDivisionError("of a row"), DataError("")):
        store = dist.HashStore()
        Heartbeat(world_of(0, store)).say_why(error)
        said = str(heartbeat.Watch(world_of(1, store)).look())
        assert said == f"rank 0 ended: {type(error).__name__}"


class GoneStore:
    """Ended with the rank that hosted it."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any) -> Any:
            raise dist.DistNetworkError("Connection reset by peer")

        return fail


def test_a_store_that_is_gone_has_ended_with_rank_0():
    second = Heartbeat(world_of(1, GoneStore()))
    error = DataError("no folder words")
    assert second.close(error) is error and not error.is_own
    lost = second.close(LostRankError("Connection closed by peer"))
    assert isinstance(lost, RankError) and lost.is_own
    assert str(lost) == "rank 0, or what else had the ranks' store, died: Connection reset by peer"


def test_of_three_ranks_the_one_without_a_heartbeat_is_named(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 1.0)
    store = dist.HashStore()
    first, second = (replace(world_of(rank, store), size=3) for rank in range(2))
    error = LostRankError("Connection closed by peer")
    with Heartbeat(second):
        said = str(Heartbeat(first).close(error))
    assert said.startswith("rank 2 died or hangs, there is no sign of life")


def test_a_rank_that_ends_while_others_listen_for_it_is_not_taken_for_lost(monkeypatch):
    store = dist.HashStore()
    first, second = (Heartbeat(world_of(rank, store)) for rank in range(2))

    def listen(self: Heartbeat) -> list[int]:
        first.say_why(DataError("no folder words"))
        return [0]

    monkeypatch.setattr(Heartbeat, "_silent", listen)
    lost = second.close(LostRankError("Connection closed by peer"))
    assert str(lost) == "rank 0 ended: no folder words"


def test_of_a_rank_that_is_lost_the_first_that_knows_speaks(monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    store = dist.HashStore()
    error = LostRankError("Connection closed by peer")
    texts = [error_text(Heartbeat(world_of(1, store)).close(error))]
    # as one that has listened at the same time
    monkeypatch.setattr(Heartbeat, "_reasons", lambda self: {})
    texts.append(error_text(Heartbeat(world_of(1, store)).close(error)))
    assert [text[:33] for text in texts] == ["fastpref: rank 0 died or hangs, t", ""]
    assert store.get("end 1").decode().startswith("rank 0 died or hangs")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at gloo/tcp/socket.cc:24] socket: Too many open files"),
        OSError(errno.EMFILE, "Too many open files", "train.jsonl"),
        RuntimeError("unable to open file </w.bin> in read-only mode: Too many open files (24)"),
    ],
)
def test_where_no_file_can_be_opened_that_is_said(error):
    known = explain(error)
    assert known is not None and known.exit_code == 6
    assert str(known).startswith("no more files or connections can be open at once")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    ],
)
def test_where_no_thread_or_process_can_be_started_that_is_said(error):
    known = explain(error)
    assert known.exit_code == 6 and "ulimit -u" in str(known)


def test_a_rank_waits_for_rank_0_without_a_word(capfd):
    store = dist.TCPStore("localhost", 0, 1, is_master=True)
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(world_of(1, store).on_main(lambda: None)), daemon=True
    )
    waiting.start()
    time.sleep(1.5)
    assert world_of(0, dist.TCPStore("localhost", store.port, 1)).on_main(lambda: 7) == 7
    waiting.join()
    assert found == [7]
    # torch complains of a wait that is over
    assert capfd.readouterr().err == ""


def test_rank_0_does_not_wait_for_one_that_has_ended_to_hear_of_it(caplog):
    store = dist.HashStore()
    Heartbeat(world_of(1, store)).say_why(DataError("no folder words"))
    world = world_of(0, store)
    started = time.monotonic()
    with pytest.raises(DistributedError, match=r"^rank 1 ended: no folder words"):
        world.compare_on_main(0, lambda values: None)
    assert time.monotonic() - started < FAREWELL_TIMEOUT.total_seconds() / 2
    assert not caplog.messages


class Busy:
    """An event on a GPU that is never done."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


def on_gpu(world: World) -> World:
    return replace(world, device=torch.device("cuda"))


def test_a_rank_does_not_wait_for_a_gpu_that_waits_for_one_that_has_ended(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Busy)
    monkeypatch.setattr(heartbeat, "WATCH_SECONDS", 0.01)
    store = dist.HashStore()
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 0.1)
    with pytest.raises(LostRankError, match="no word of rank 1"):
        await_device(on_gpu(world_of(0, store)))
    Heartbeat(world_of(1, store)).say_why(RankMemoryError("out of memory in 256 tokens at once"))
    with pytest.raises(DistributedError, match=r"^rank 1 ended: out of memory in 256 tokens"):
        await_device(on_gpu(world_of(0, store)))


class Suspended:
    """A clock: between any two looks at it, a scheduler has suspended the job for an hour."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 3600
        return self.now

    def sleep(self, seconds: float) -> None: ...


class LateStore:
    """Has a heartbeat of rank 1 that stays the same, and soon a value."""

    def __init__(self) -> None:
        self.looks = 0

    def check(self, keys: list[str]) -> bool:
        self.looks += keys == ["value"]
        return keys == [beat_key(1)] or (keys == ["value"] and self.looks > 5)

    def get(self, key: str) -> bytes:
        return b"5"


def test_a_job_that_was_suspended_misses_no_rank(monkeypatch):
    clock, store = Suspended(), LateStore()
    monkeypatch.setattr(heartbeat, "time", clock)
    monkeypatch.setattr(distributed, "time", clock)
    watch = heartbeat.Watch(world_of(0, store))
    assert [watch.look() for _ in range(3)] == [None] * 3
    # one that stays silent is missed in the end
    assert any(isinstance(watch.look(), LostRankError) for _ in range(20))
    world_of(0, store)._wait("value", datetime.timedelta(days=1), sender=1)


def test_a_beat_ends_the_silence_before_it(monkeypatch):
    monkeypatch.setattr(heartbeat, "time", Suspended())
    store = dist.HashStore()
    # the last rank watches the first one
    watch = heartbeat.Watch(world_of(1, store))
    for beat in range(20):
        store.set(beat_key(0), str(beat))
        assert watch.look() is None
    assert watch.look() is None


def test_of_two_ranks_that_end_the_first_is_named():
    store = dist.HashStore()
    for rank, reason in enumerate(["no folder words", "no folder others"]):
        Heartbeat(world_of(rank, store)).say_why(DataError(reason))
    assert str(heartbeat.Watch(world_of(1, store)).look()) == "rank 0 ended: no folder words"


def test_a_heart_beats_while_its_rank_waits_for_the_store():
    hosted = dist.TCPStore("localhost", 0, 1, is_master=True)
    store = dist.TCPStore("localhost", hosted.port, 1)
    with Heartbeat(world_of(1, store)):
        # as NCCL does for a communicator whose first rank is late
        wait = threading.Thread(target=store.get, args=("id",), daemon=True)
        wait.start()
        time.sleep(3 * heartbeat.BEAT_SECONDS)
        beats = int(hosted.get(beat_key(1))) if hosted.check([beat_key(1)]) else 0
        hosted.set("id", "")
        wait.join()
    assert beats


@pytest.mark.parametrize("busy", [True, False])
def test_a_host_that_waits_in_a_launch_for_a_rank_that_has_ended_is_ended(monkeypatch, busy):
    store = dist.HashStore()
    Heartbeat(world_of(1, store)).say_why(RankMemoryError("out of memory in 256 tokens at once"))
    heart, ended = Heartbeat(on_gpu(world_of(0, store))), []
    monkeypatch.setattr(heartbeat, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 0.1)
    # one that computes nothing may be writing what was computed
    stream = SimpleNamespace(query=lambda: not busy)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream)

    def end(error: DistributedError) -> None:
        ended.append(str(error))
        heart._ended.set()

    monkeypatch.setattr(heartbeat, "quit_saying", end)
    threading.Timer(0.5, heart._ended.set).start()
    heart.end_if_stuck()
    assert ended == ["rank 1 ended: out of memory in 256 tokens at once"] * busy


@pytest.mark.parametrize(
    ("fails", "device", "left"), [(False, "cuda", 1), (True, "cpu", 1), (True, "cuda", 0)]
)
def test_a_rank_that_fails_does_not_wait_for_the_others_gpus(monkeypatch, fails, device, left):
    """NCCL's communicators end when all ranks let go of them, which the others do not."""
    world = world_of(0, dist.HashStore())
    world = replace(world, device=torch.device(device))
    # the other rank's part in the end
    world.store.set("value 0 1", pickle.dumps(None))
    monkeypatch.setattr(ranks_of_cli, "init_world", lambda timeout: world)
    monkeypatch.setattr(World, "agree_max", lambda self, value: value)
    calls = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))

    def task(world: World) -> None:
        if fails:
            raise RankMemoryError("out of memory")

    with pytest.raises(RankMemoryError) if fails else nullcontext():
        run_on_this_rank(task, 1)
    assert len(calls) == left


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": None}, "RANK must be set where WORLD_SIZE=2, MASTER_ADDR=localhost"),
        ({"WORLD_SIZE": None, "MASTER_PORT": ""}, "WORLD_SIZE and MASTER_PORT must be set"),
        ({"RANK": "2"}, r"RANK must be in \[0, 2\), got '2'"),
        ({"RANK": "first"}, "RANK must be .* got 'first'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number >= 1, got '0'"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT must be in \[1, 65536\), got 'http'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a number >= 0, got '-1'"),
    ],
)
def test_variables_that_make_no_world_are_refused_by_name(monkeypatch, variables, message):
    for name, value in (TORCHRUN | variables).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=message):
        read_ranks()


def test_a_rank_that_cannot_join_says_so_whatever_its_number(base, tmp_path, monkeypatch, capsys):
    for name, value in (TORCHRUN | {"RANK": "7"}).items():
        monkeypatch.setenv(name, value)
    assert main(arguments(base, "model", tmp_path), train.compose_choices, train.CONFIG_DIR) == 7
    assert "RANK must be in [0, 2), got '7'" in capsys.readouterr().err


def test_a_rank_takes_the_one_gpu_that_its_scheduler_shows_it_or_the_one_of_its_number(monkeypatch):
    assert index_of_gpu(3, 1) == 0
    assert index_of_gpu(3, 8) == 3
    with pytest.raises(RankError, match="4 ranks are on this machine and 2 of its GPUs visible"):
        index_of_gpu(3, 2)
    # the first of three does not wait for the third
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(RankError, match="3 ranks are"):
        index_of_gpu(0, 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    # all ranks of torchrun see the same
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(RankError, match="2 ranks are on this machine and 1 of"):
        index_of_gpu(1, 1)
    # or each one, with --virtual-local-rank
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert index_of_gpu(0, 1) == 0


@pytest.fixture
def torchruns_store(monkeypatch) -> dist.TCPStore:
    """What a torchrun, of this process, keeps for all ranks that it starts."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def test_ranks_meet_in_torchruns_own_store_however_late_one_comes(torchruns_store, monkeypatch):
    # torchrun holds the port, so no rank can open a store there
    monkeypatch.setattr(dist, "TCPStore", None)
    seconds = datetime.timedelta(seconds=30)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(join_store, 0, 2, seconds)
        with pytest.raises(TimeoutError):
            first.result(0.3)
        join_store(1, 2, seconds)
        assert first.result(30)
    with pytest.raises(RankError, match="rank 2 did not come in 0 s"):
        join_store(0, 3, datetime.timedelta(seconds=0.1))
    with pytest.raises(RankError, match="rank 0 did not come in 0 s"):
        join_store(1, 3, datetime.timedelta(seconds=0.1))
    # those that met name the one that is missing
    with ThreadPoolExecutor() as threads:
        part = datetime.timedelta(seconds=1)
        for joining in [threads.submit(join_store, rank, 3, part) for rank in range(2)]:
            with pytest.raises(RankError, match=": rank 2 did not come in 1 s"):
                joining.result(30)


def test_without_torchrun_rank_0_holds_the_store_and_says_who_is_missing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RankError, match=": rank 1, rank 2 did not come in 0 s"):
        join_store(0, 3, datetime.timedelta(seconds=0.1))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    nobody = f"rank 1 of 2 cannot meet the others at localhost:{os.environ['MASTER_PORT']}: "
    with pytest.raises(RankError, match=nobody):
        join_store(1, 2, datetime.timedelta(seconds=0.1))


def test_ranks_that_torchrun_starts_again_hear_nothing_of_the_ones_before(torchruns_store):
    seconds = datetime.timedelta(seconds=30)
    with ThreadPoolExecutor() as threads:
        for _ in range(2):
            # the second one is there while of rank 0 only the store knows
            other = threads.submit(join_store, 1, 2, seconds)
            time.sleep(0.2)
            parts = join_store(0, 2, seconds), other.result(30)
            assert not any(part.check(["end 1"]) for part in parts)
            parts[0].set("end 1", "died")
            assert parts[1].get("end 1") == b"died"


def end_late() -> None:
    """Rank 0 has something to do of its own for longer than ranks wait in a collective."""
    run_on_this_rank(lambda world: time.sleep(2.5 * world.is_main), 1)


def test_rank_0_may_take_longer_to_end_than_ranks_wait_for_one_another():
    run_on_ranks(end_late, 2)
