"""`task=audit` as a command: its page without network, whatever the data hold; its table."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from stopped_runs import run
from tiny_models import save_tiny_model, text_rows, write_rows

from fastpref.data.audit.html import MOST_CHARACTERS, _text
from fastpref.page import render_page, visible

EVIL = "</span></p><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("audit")
    rows = text_rows(40, seed=1)
    for row in rows[:3]:
        row["prompt"] += EVIL
    rows[1]["rejected"] += EVIL + "\u202e\n\t"
    write_rows(base / "one", "train", [*rows, rows[5], {**rows[6], "chosen": EVIL, "rejected": ""}])
    write_rows(base / "two", "train", text_rows(30, seed=2))
    save_tiny_model(base / "model")
    return base


def arguments(base: Path, *options: str) -> list[str]:
    return [
        *("task=audit", "model=blank_model", f"model.name_or_path={base / 'model'}", "loss=dpo"),
        *("datasets=[one,two]", f"base_data_dir={base}", "data.test_fraction=0.2"),
        *("max_length=48", "max_prompt_length=24", *options),
    ]


class Outline(HTMLParser):
    """Tags that are open and were closed in order, and what a page asks for."""

    VOID = ("meta", "img", "br", "line", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.asked: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.asked += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        self.asked += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def test_the_page_runs_and_asks_for_nothing_whatever_the_data_hold(base, tmp_path, capsys):
    assert run(arguments(base, f"run_dir={tmp_path / 'audit'}", "data.shares=[0.5,0.5]")) == 0
    page = (tmp_path / "audit" / "audit.html").read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert outline.open == [] and outline.asked == []
    assert outline.tags.isdisjoint({"script", "img", "iframe", "link", "object"})
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    # it is shown, token by token, and the sign that would turn the line has its number
    shown = re.sub(r"<(?!/?i\b)[^>]*>", "", page)
    assert "<i>U+202E</i>" in shown and "&lt;/script&gt;" in shown
    assert "empty response" in outline.text and "in the train split too" not in outline.text
    captured = capsys.readouterr()
    assert "data.shares: an epoch has" in captured.err and "share 0.5, passed" in outline.text
    assert "has no test split" in captured.err and "has no test split" in outline.text
    assert f"rows token by token: {tmp_path}/audit/audit.html" in captured.err


def test_the_table_tells_lengths_and_limits(base, tmp_path, capsys):
    assert run(arguments(base, f"run_dir={tmp_path / 'audit'}")) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [row[0] for row in rows] == ["prompt", "chosen", "rejected", "longer sequence"] * 2
    assert [row[5] for row in rows[:4]] == ["24", "24", "24", "48"]
    assert all("┃" in row[1] for row in rows if int(row[4]) > int(row[5]))


def test_an_audit_has_a_folder_of_its_own_and_takes_none_from_a_run(base, tmp_path, capsys):
    output = tmp_path / "output"
    for _ in range(2):
        assert run(arguments(base, f"output_dir={output}")) == 0
    folders = sorted(path.name for path in output.iterdir())
    assert len(folders) == 2 and all(
        name.startswith("audit_dpo_model_one_two_") for name in folders
    )
    assert {path.name for path in (output / folders[0]).iterdir()} == {"audit.html", "config.yaml"}
    # beside it a run may begin, and it may be written again beside a run
    folder = tmp_path / "run"
    assert run(arguments(base, f"run_dir={folder}")) == 0
    steps = ["task=train", "n_examples=4", "batch_size=4", "n_eval_examples=0", "warmup_steps=0"]
    assert run([*arguments(base)[1:], *steps, f"run_dir={folder}"]) == 0
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert run(arguments(base, f"run_dir={folder}")) == 0
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert json.loads(metrics.splitlines()[0])["step"] == 1 and (folder / "audit.html").is_file()
    assert run([*arguments(base)[1:], *steps, f"run_dir={folder}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_without_evaluations_no_test_split_is_needed(base, tmp_path, capsys):
    options = ("data.test_fraction=0", "n_eval_examples=0", f"run_dir={tmp_path}")
    assert run(arguments(base, *options)) == 0
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<h2>train</h2>" in page and "<h2>test</h2>" not in page
    assert "train: tokens before" in (out := capsys.readouterr().out) and "test:" not in out


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("data.test_fraction=0", 3, "no file .*one/test.jsonl"),
        ("data.test_fraction=1e-9", 3, "0 would be held out and 40 trained on"),
        ("data.test_fraction=2", 2, "data.test_fraction must be >= 0 and < 1"),
        ("data.shares=[0.5,0.4]", 2, "data.shares must be 1 in all"),
        ("datasets=[one,tow]", 3, "nearest: two"),
        ("run_dir=FILE", 2, "run_dir: .* is a file, expected a folder"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(base, tmp_path, option, code, message, capsys):
    (tmp_path / "file").write_text("")
    out = [f"output_dir={tmp_path / 'out'}", option.replace("FILE", str(tmp_path / "file"))]
    assert run(arguments(base, *out)) == code
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "<i>▫</i>"),
        ("a b", "a<i class=s> </i>b"),
        ("\n\r\t", "<i>↵</i>\n<i>U+000D</i><i>⇥</i>\t"),
        ("\x00\u200b\u00a0\u2028", "<i>U+0000</i><i>U+200B</i><i>U+00A0</i><i>U+2028</i>"),
        ("<b>&\"'", "&lt;b&gt;&amp;&quot;&#x27;"),
        ("é漢😀", "é漢😀"),
    ],
)
def test_no_character_is_unseen_and_none_is_markup(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_the_middle_of_a_long_text_is_left_out(extra):
    half = MOST_CHARACTERS // 2
    page = _text("a" * half + "b" * extra + "c" * half)
    assert (page.count("a" * half), page.count("c" * half), "b" in page) == (1, 1, False)
    assert (f"… {extra:,} characters …" in page) == bool(extra)


def test_a_page_may_name_a_file_whose_name_is_no_utf8():
    name = b"caf\xe9.jsonl".decode(errors="surrogateescape")
    assert r"<p>caf\udce9.jsonl" in render_page("Data", f"<p>{name}").encode().decode()
