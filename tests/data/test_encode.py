import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_data import (
    TEMPLATE,
    byte_tokenizer,
    count_calls,
    make_config,
    pair,
    pairs,
    write_jsonl,
)

from fastpref.complete_files import share
from fastpref.config import DPOConfig, SFTConfig, TISDPOConfig, TransformConfig
from fastpref.data import cache
from fastpref.data.counts import format_audit
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.data.remarks import Remark
from fastpref.errors import ConfigError, DataError

EOS = "</s>"
VOCABULARY = 258


def write(tmp_path, rows, name="set"):
    return write_jsonl(tmp_path / "data" / name, "train", rows)


def encode(tmp_path, rows=None, *, tokenizer=None, vocab_size=VOCABULARY, quiet=True, **options):
    if rows is not None:
        write(tmp_path, rows)
    config = make_config(tmp_path, **options)
    tokenizer = tokenizer or byte_tokenizer()
    return load_split(data_options(config), "train", tokenizer, vocab_size=vocab_size, quiet=quiet)


def texts(split, row=0):
    encoded = split.dataset[row]
    decode = byte_tokenizer().decode
    return tuple(decode(encoded[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected"))


def say(role, content):
    return {"role": role, "content": content}


def test_texts_are_tokenized_apart_and_responses_end_in_eos(tmp_path):
    split = encode(tmp_path, [pair("Q:", " yes", " no")])
    assert texts(split) == ("Q:", " yes</s>", " no</s>")
    assert split.name == "train"
    assert not split.audit.remarks


def test_prompt_and_response_never_merge_into_one_token(tmp_path):
    class Merging:
        """What a tokenizer with the merge "ab" does, around one that has none."""

        def __init__(self):
            self.inner = byte_tokenizer()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, given, **options):
            encoded = self.inner(given, **options)
            merged = [
                [300] if text == "ab" else ids
                for text, ids in zip(given, encoded["input_ids"], strict=True)
            ]
            return {"input_ids": merged}

    split = encode(tmp_path, [pair("a", "b", "ab")], tokenizer=Merging(), vocab_size=301)
    row = split.dataset[0]
    assert len(row["prompt_ids"]) == 1
    assert len(row["chosen_ids"]) == 2
    assert row["rejected_ids"][0] == 300


def test_dialogues_keep_the_end_of_a_long_prompt_and_other_rows_its_start(tmp_path):
    bounds = {"max_length": 30, "max_prompt_length": 12}
    dialogue = "\n\nHuman: abcdefghijkl\n\nAssistant:"
    rows = [
        {"chosen": dialogue + " a", "rejected": dialogue + " b"},
        pair("abcdefghijklmnopqrstuvwxyz012345"),
    ]
    split = encode(tmp_path, rows, **bounds)
    assert texts(split, 0)[0] == "\nAssistant:"[-12:].rjust(12, "\n")
    assert texts(split, 1)[0] == "abcdefghijkl"
    assert split.audit.remarks == {Remark.PROMPT_CUT: 2}
    chat = {"prompt": [say("user", "x" * 40)]}
    chat |= {side: [say("assistant", side)] for side in ("chosen", "rejected")}
    rendered = encode(tmp_path, [chat], tokenizer=byte_tokenizer(TEMPLATE), **bounds)
    assert texts(rendered)[0] == "\n[assistant]"
    # the name hh means dialogues whatever its rows look like
    write(tmp_path, rows[1:], name="hh")
    assert texts(encode(tmp_path, names=["hh"], **bounds))[0] == "uvwxyz012345"
    kept_start = encode(tmp_path, names=["hh"], data={"truncation_mode": "keep_start"}, **bounds)
    assert texts(kept_start)[0] == "abcdefghijkl"


def test_a_cut_response_has_no_eos_and_is_counted(tmp_path):
    split = encode(tmp_path, [pair("Q", "x" * 30, "y")], max_length=10, max_prompt_length=4)
    assert texts(split) == ("Q", "xxxxxx", "y</s>")
    assert split.audit.remarks == {Remark.CHOSEN_CUT: 1}
    assert split.audit.longest_tokens == 7


def test_responses_equal_after_truncation_are_counted(tmp_path):
    rows = [pair("Q", "x" * 30, "x" * 40), *pairs(2)]
    split = encode(tmp_path, rows, max_length=20, max_prompt_length=4)
    assert split.audit.remarks[Remark.IDENTICAL] == 1
    rows = [pair("R", "x" * 30, "x" * 30), rows[0]]
    refused = "chosen equals rejected in 2 of 2 .* only as max_length, max_prompt_length and "
    refused += r"data.truncation cut them in 1 of 2 \(50 %\) of them \(first: .*train.jsonl:2\)"
    with pytest.raises(DataError, match=refused):
        encode(tmp_path, rows, max_length=20, max_prompt_length=4)


def test_long_pairs_are_dropped_and_counted_where_asked(tmp_path):
    rows = [*pairs(2), pair("Q", "x" * 90, "y")]
    split = encode(tmp_path, rows, max_length=20, max_prompt_length=4, data={"truncation": "drop"})
    assert split.audit.dropped == {"longer than max_length": 1}
    assert split.audit.first_dropped["longer than max_length"].endswith(":3")
    assert any("rows: longer than max_length: 1 (first" in x for x in format_audit(split.audit)[1])
    assert len(split.dataset) == len(split.groups) == 2


def test_eos_at_the_end_of_a_text_is_not_doubled_and_inside_it_is_counted(tmp_path):
    rows = [pair("Q", "yes" + EOS, "no"), pair("R", "y" + EOS + "es", "no"), pair("S" + EOS)]
    split = encode(tmp_path, rows)
    assert texts(split, 0)[1] == "yes</s>"
    assert split.audit.remarks == {Remark.EOS_AT_END: 1, Remark.EOS_INSIDE: 2}


def test_a_response_of_eos_alone_is_empty(tmp_path):
    split = encode(tmp_path, [*pairs(2), pair("Q", EOS, "no")])
    assert split.audit.dropped == {"empty response": 1}


def test_conversations_have_one_bos_and_one_eos_after_each_response(tmp_path):
    prompt = [say("user", "Q"), say("assistant", "hm"), say("user", "R")]
    rows = [
        {
            "prompt": prompt,
            "chosen": [say("assistant", "yes")],
            "rejected": [say("assistant", "no")],
        }
    ]
    split = encode(tmp_path, rows, tokenizer=byte_tokenizer(TEMPLATE))
    assert texts(split) == (
        "<s>[user]Q</s>\n[assistant]hm</s>\n[user]R</s>\n[assistant]",
        "yes</s>",
        "no</s>",
    )
    assert not split.audit.remarks
    with pytest.raises(ConfigError, match="no chat template"):
        encode(tmp_path)


def test_a_template_that_parts_prompt_and_response_is_counted_or_refused_when_strict(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATE.replace("[assistant]{% endif", "[assistant]<t>{% endif"))
    rows = [
        {
            "prompt": [say("user", "Q")],
            "chosen": [say("assistant", "yes")],
            "rejected": [say("assistant", "no")],
        }
    ]
    split = encode(tmp_path, rows, tokenizer=tokenizer)
    assert texts(split) == ("<s>[user]Q</s>\n[assistant]", "yes</s>", "no</s>")
    assert split.audit.remarks == {Remark.TEMPLATE_SPLIT: 1}
    with pytest.raises(DataError, match=r":1: the rendered prompt does not start"):
        encode(tmp_path, tokenizer=tokenizer, data={"strict": True})


def test_a_template_that_adds_a_second_bos_is_noticed(tmp_path):
    rows = [
        {
            "prompt": [say("user", "Q")],
            "chosen": [say("assistant", "yes")],
            "rejected": [say("assistant", "no")],
        }
    ]
    split = encode(tmp_path, rows, tokenizer=byte_tokenizer("{{ bos_token }}" + TEMPLATE))
    assert split.audit.remarks == {Remark.TWO_BOS: 1}


def test_a_tokenizer_without_eos_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode(tmp_path, pairs(1), tokenizer=byte_tokenizer(eos_token=None))


def test_token_ids_beyond_the_embedding_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"token id 257 \('</s>'\) .* embedding of 257 rows"):
        encode(tmp_path, pairs(2), vocab_size=257)
    # the check does not depend on the cache
    assert encode(tmp_path, vocab_size=258)
    with pytest.raises(DataError, match="embedding of 257 rows"):
        encode(tmp_path, vocab_size=257)


def test_sft_takes_the_last_chosen_of_each_prompt(tmp_path):
    rows = [pair("a", "1", "2"), pair("b", "3", "4"), pair("a", "5", "6"), pair("c", "7", "7")]
    split = encode(tmp_path, rows, loss=SFTConfig())
    assert [texts(split, i)[:2] for i in range(3)] == [
        ("a", "5</s>"),
        ("b", "3</s>"),
        ("c", "7</s>"),
    ]
    assert split.dataset["rejected_ids"][:] == [[], [], []]
    assert split.groups.tolist() == [0, 1, 2]
    reverse = encode(tmp_path, rows, loss=SFTConfig(), reverse_dataset=True)
    assert [texts(reverse, i)[1] for i in range(3)] == ["6</s>", "4</s>", "7</s>"]


def test_groups_of_mixed_datasets_stay_apart(tmp_path):
    write(tmp_path, [pair("a"), pair("b"), pair("a", "x", "y")], name="one")
    write(tmp_path, [pair("b"), pair("c")], name="two")
    split = encode(tmp_path, names=["one", "two"])
    assert split.groups.tolist() == [0, 1, 0, 2, 3]
    assert split.groups.dtype == np.int64
    assert (split.audit.rows, split.audit.kept, split.audit.prompts) == (5, 5, 4)
    assert texts(split, 4)[0] == "c"


WEIGHTED = pair("Q", "yes", "no!!", chosen_weight=[-2, 0.5, 3], rejected_weight=[1, 2, -3, 4])


def weights(split, row=0):
    encoded = split.dataset[row]
    return encoded["chosen_weights"], encoded["rejected_weights"]


def origin(**changed):
    return {"loss": TISDPOConfig(), "transform": TransformConfig(method="origin"), **changed}


def test_weights_change_sign_on_the_chosen_side_and_the_last_token_weighs_zero(tmp_path):
    split = encode(tmp_path, [WEIGHTED], **origin())
    assert weights(split) == ([2, -0.5, -3, 0], [1, 2, -3, 4, 0])
    split = encode(tmp_path, **origin(data={"eos_weight": 0.25}))
    assert weights(split) == ([2, -0.5, -3, 0.25], [1, 2, -3, 4, 0.25])


def test_a_reversed_dataset_has_the_weights_of_the_reversed_preference(tmp_path):
    # both models swap roles: log(π⁺/π⁻) changes sign, and so does the side's own sign
    split = encode(tmp_path, [WEIGHTED], **origin(reverse_dataset=True))
    assert texts(split) == ("Q", "no!!</s>", "yes</s>")
    assert weights(split) == ([1, 2, -3, 4, 0], [2, -0.5, -3, 0])


def test_weights_are_transformed_over_the_untruncated_response(tmp_path):
    transform = TransformConfig(method="rank_based")
    split = encode(
        tmp_path,
        [WEIGHTED],
        loss=TISDPOConfig(),
        transform=transform,
        max_length=5,
        max_prompt_length=2,
    )
    # ranks of -(-2, 0.5, 3) and (1, 2, -3, 4) over the full lists; then a cut to three tokens
    chosen, rejected = weights(split)
    assert chosen == pytest.approx([1.3, 1.0, 0])
    assert rejected == pytest.approx([0.9, 1.1, 0])


def test_rows_without_weights_weigh_one_even_beside_rows_with_weights(tmp_path):
    split = encode(tmp_path, [WEIGHTED, pair("Q", "ab", "c")], **origin())
    assert weights(split, 1) == ([1, 1, 0], [1, 0])
    assert split.audit.remarks == {Remark.NO_WEIGHTS: 1}
    assert split.audit.prompts == 1


def test_weights_of_the_wrong_length_are_refused_with_both_lengths(tmp_path):
    rows = [*pairs(2), WEIGHTED | {"rejected_weight": [1.0, 2.0]}]
    with pytest.raises(DataError, match=r"train\.jsonl:3:rejected_weight: .*expected 4, found 2"):
        encode(tmp_path, rows, **origin())
    split = encode(tmp_path, **origin(data={"on_error": "skip"}))
    assert split.audit.dropped == {"malformed row": 1}
    assert "expected 4, found 2" in split.audit.first_dropped["malformed row"]


def test_random_weights_follow_the_seed_and_the_row_not_the_rows_before_it(tmp_path):
    rows = [WEIGHTED | {"prompt": prompt} for prompt in "abc"]
    random = {"loss": TISDPOConfig(), "transform": TransformConfig(method="random")}
    first = encode(tmp_path, rows, **random)
    assert weights(first, 1) != weights(first, 2)
    # row 3 is the same with row 2 gone
    fewer = encode(tmp_path, [rows[0], rows[1] | {"chosen": ""}, rows[2]], **random)
    assert weights(fewer, 1) == weights(first, 2)
    assert weights(encode(tmp_path, rows, seed=1, **random), 1) != weights(first, 1)


def test_a_loss_without_weights_has_no_weight_columns(tmp_path):
    assert "chosen_weights" not in encode(tmp_path, [WEIGHTED]).dataset.column_names
    split = encode(tmp_path, loss=DPOConfig(token_level=True))
    assert "chosen_weights" in split.dataset.column_names


def test_a_second_encoding_comes_from_the_cache_unless_something_it_depends_on_changes(tmp_path):
    write(tmp_path, pairs(3))

    def calls(**changed):
        return count_calls(lambda: encode(tmp_path, **changed), "encode_row")

    assert calls() == 3
    assert calls() == 0
    # neither seed nor transform touch an unweighted loss
    assert calls(seed=1, transform=TransformConfig(method="random")) == 0
    assert calls(max_length=20, max_prompt_length=4) == 3
    assert calls(reverse_dataset=True) == 3
    assert calls(tokenizer=byte_tokenizer(TEMPLATE)) == 3


def test_several_processes_encode_the_same_and_find_each_other_s_cache(tmp_path, monkeypatch):
    rows = [pair(f"Q{i % 700}:", " yes" * (i % 5 + 1), " no") for i in range(2500)]
    one = encode(tmp_path, rows, data={"num_proc": "1"})
    monkeypatch.setattr(cache, "ROWS_OF_A_PROCESS", 1000)
    monkeypatch.setattr(cache, "available_cores", lambda: 8)
    again = encode(tmp_path)
    assert len(list(tmp_path.rglob("cache-*.arrow"))) == 1
    two = encode(tmp_path, data={"cache_dir": str(tmp_path / "other")})
    assert len(list((tmp_path / "other").rglob("cache-*_of_00002.arrow"))) == 2
    for split in (again, two):
        assert split.dataset[:] == one.dataset[:]
        assert np.array_equal(split.groups, one.groups)
        assert split.audit == one.audit


def test_an_error_in_one_of_several_processes_names_its_row(tmp_path):
    rows = [pair(f"Q{i}:", " yes", " no") for i in range(2500)]
    rows[2100] = rows[2100] | {"chosen_weight": [1.0], "rejected_weight": [1.0]}
    with pytest.raises(DataError, match=r":2101:chosen_weight: .* must have one weight"):
        encode(tmp_path, rows, data={"num_proc": "2"}, loss=TISDPOConfig(beta=0.1))


COLLECTED_IN_A_POOL = """
import gc, os
from multiprocess import Pool
from fastpref.data.cache import tokenizing_in

class Joins:
    # as what waits for a thread that no fork has
    def __init__(self):
        self.itself, self.process = self, os.getpid()
    def __del__(self):
        print("collected", os.getpid() == self.process)

def work(_):
    gc.collect()

gc.disable()
Joins()
with tokenizing_in(2), Pool(2) as pool:
    pool.map(work, range(4))
gc.collect()
"""


def test_garbage_of_a_process_is_not_collected_in_its_forks():
    command = [sys.executable, "-c", COLLECTED_IN_A_POOL]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "collected True\n"


KILLED_IN_A_POOL = """
import os, signal, time
from multiprocess import Manager, Pool
from fastpref.data.cache import tokenizing_in

def say(pid):
    # at once: they share the pipe
    os.write(1, f"{pid}\\n".encode())

def work(parent):
    say(os.getpid())
    time.sleep(1)
    os.kill(parent, signal.SIGKILL)
    time.sleep(60)

with tokenizing_in(2):
    # as datasets does
    manager = Manager()
    say(manager._process.pid)
    Pool(2).map(work, [os.getpid()] * 2)
"""


def test_processes_that_tokenize_end_with_the_one_they_work_for(tmp_path):
    command = [sys.executable, "-c", KILLED_IN_A_POOL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in result.stdout.split()]
    assert len(workers) == 3
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_what_a_kill_has_left_of_an_encoding_goes_unless_somebody_writes_there(tmp_path):
    encode(tmp_path, pairs(3))
    [rows] = (tmp_path / "cache").rglob("generator-train.arrow")
    left, ours = rows.with_name("tmp0a_b1c2d"), rows.with_name("tmp.arrow")
    for path in (left, ours):
        path.write_bytes(b"half")
    with share(rows.parent, "none"):
        encode(tmp_path, max_length=9, max_prompt_length=3)
        assert left.exists()
    encode(tmp_path, max_length=9, max_prompt_length=3)
    assert not left.exists() and ours.exists()


def test_a_folder_is_shared_where_locks_are_those_of_fcntl_as_on_nfs(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpref.complete_files.fcntl.flock", fcntl.lockf)
    code = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'a+') as lock:\n"
        "    for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):\n"
        "        try:\n"
        "            fcntl.lockf(lock, kind | fcntl.LOCK_NB)\n"
        "            print('free', end=' ')\n"
        "        except BlockingIOError:\n"
        "            print('taken', end=' ')\n"
    )
    with share(tmp_path, "none"):
        command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["free", "taken"]


def test_what_a_disk_has_damaged_in_the_cache_is_made_again(tmp_path, caplog):
    expected = encode(tmp_path, pairs(3)).dataset[:]
    for name in ("cache-*.arrow", "generator-train.arrow", "dataset_info.json"):
        [path] = (tmp_path / "cache").rglob(name)
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damaged in (None, b"", flipped):
            # what is mapped still is not touched
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert encode(tmp_path).dataset[:] == expected
            assert f"{path} is damaged or gone, and is made again" in caplog.text
            caplog.clear()
            # a power failure before all was on the disk: the files are there, their list is not
            path.write_bytes(damaged or bytes(len(whole)))
            for sums in (tmp_path / "cache").rglob("*.sums"):
                sums.write_bytes(b"{")
            assert encode(tmp_path).dataset[:] == expected
    caplog.clear()
    assert encode(tmp_path).dataset[:] == expected
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["cache-*.arrow", "generator-train.arrow"])
def test_what_is_damaged_and_cannot_be_removed_is_not_read(tmp_path, monkeypatch, name):
    encode(tmp_path, pairs(50))
    [path] = (tmp_path / "cache").rglob(name)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # a folder of another user
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match=r"cannot be used: .*; delete what is damaged there"):
        encode(tmp_path)


def test_what_another_process_makes_again_is_left_to_it(tmp_path, caplog):
    expected = encode(tmp_path, pairs(3)).dataset[:]
    [path] = (tmp_path / "cache").rglob("cache-*.arrow")
    whole = path.read_bytes()
    path.unlink()
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def make_again():
            path.write_bytes(whole)
            fcntl.flock(lock, fcntl.LOCK_UN)

        other = threading.Timer(0.3, make_again)
        other.start()
        assert encode(tmp_path).dataset[:] == expected
        other.join()
    assert caplog.text == ""


def test_another_process_finds_the_cache(tmp_path):
    write(tmp_path, pairs(3))
    program = (
        "import pathlib, test_encode as t\n"
        f"t.encode(pathlib.Path({str(tmp_path)!r}), tokenizer=t.byte_tokenizer(t.TEMPLATE))"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "PYTHONHASHSEED": "7",
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)

    def again():
        encode(tmp_path, tokenizer=byte_tokenizer(TEMPLATE))

    assert count_calls(again, "parse_row") == count_calls(again, "encode_row") == 0


def test_what_became_of_the_rows_is_said_once_a_split(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    rows = [*pairs(7), pair("Q", ""), pair("L" * 99), pair("S", "same", "same")]
    encode(tmp_path, rows, quiet=False, max_length=40, max_prompt_length=20)
    messages = [(record.levelname, record.message) for record in caplog.records]
    assert len(messages) == 4
    assert messages[0][1].startswith("train: 10 rows of ")
    assert ("INFO", "prompt cut to max_prompt_length: 1 of 9 (11.1 %) rows") in [
        (level, text.removeprefix("train: ").partition(" (first")[0]) for level, text in messages
    ]
    assert any(
        level == "WARNING" and "dropped 1 of 10 (10 %) rows: empty response 1 (first:" in text
        for level, text in messages
    )
    assert any(level == "WARNING" and "chosen equals rejected" in text for level, text in messages)
    caplog.clear()
    encode(tmp_path, quiet=True, max_length=40, max_prompt_length=20)
    assert not caplog.records


THINKING = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ thought | default('hm') }}")


def test_arguments_of_the_chat_template_are_in_the_tokens_and_in_the_cache_key(tmp_path, caplog):
    tokenizer = byte_tokenizer(THINKING)
    chat = {"prompt": [say("user", "Q")], "chosen": [say("assistant", "y")]}
    chat |= {"rejected": [say("assistant", "n")]}

    def prompt(**arguments):
        data = {"template_kwargs": arguments}
        return texts(encode(tmp_path, tokenizer=tokenizer, data=data, quiet=False))[0]

    write(tmp_path, [chat])
    assert [prompt(), prompt(thought="A"), prompt(thought="B"), prompt(thought="A")] == [
        f"<s>{thought}[user]Q</s>\n[assistant]" for thought in ("hm", "A", "B", "A")
    ]
    assert count_calls(partial(prompt, thought="B"), "encode_row") == 0
    with pytest.raises(ConfigError, match=r"template_kwargs\.thougt.*nearest: thought"):
        prompt(thougt="A")
    assert not caplog.messages
    write(tmp_path, pairs(2))
    prompt(thought="A")
    assert any("has no conversations to render" in message for message in caplog.messages)


def test_every_row_of_one_response_is_an_example_and_of_pairs_one_a_prompt(tmp_path):
    rows = [{"prompt": "Q", "completion": answer} for answer in "abca"]
    split = encode(tmp_path, rows, loss=SFTConfig())
    assert [texts(split, i)[1] for i in range(4)] == [f"{answer}</s>" for answer in "abca"]
    assert split.groups.tolist() == [0, 0, 0, 0]
    chats = [{"messages": [say("user", "Q"), say("assistant", answer)]} for answer in "ab"]
    chat_split = encode(tmp_path, chats, loss=SFTConfig(), tokenizer=byte_tokenizer(TEMPLATE))
    assert [texts(chat_split, i)[1][0] for i in range(2)] == ["a", "b"]
    paired = encode(tmp_path, [pair("Q", answer, "n") for answer in "ab"], loss=SFTConfig())
    assert texts(paired)[1] == "b</s>" and len(paired.dataset) == 1
