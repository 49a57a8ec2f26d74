"""The report of token weights: its numbers, a page without network, a picture."""

import json
import re
import warnings
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastpref.batch import EncodedRow
from fastpref.data.sources.planted import generate_rows
from fastpref.data.weights_file import ModelOrigin, WeightsOrigin
from fastpref.model.files.paths import resolve_model
from fastpref.tisdpo.planted_tokens import roc_auc
from fastpref.tisdpo.report import (
    Example,
    WeighedToken,
    WeightsReport,
    histogram,
    read_report,
    token_texts,
)
from fastpref.tisdpo.report_html import write_html
from fastpref.tisdpo.report_plot import drawn, lay_out, plot_weights
from fastpref.train.logs.report import try_to_draw

pytestmark = pytest.mark.looks_at_pictures


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("tiny"))


def make_report(num_words: int = 3) -> WeightsReport:
    def tokens(sign: int) -> list[WeighedToken]:
        words = ["<b>&", *[f" word{i}" for i in range(num_words)], "$x$\n"]
        return [
            WeighedToken(text=text, weight=sign * i / 7, raw=-i / 7, is_planted=i == 2)
            for i, text in enumerate(words)
        ]

    example = Example(prompt="A <script>?", chosen=tokens(1), rejected=tokens(-1))
    return WeightsReport(
        title="set, train",
        positive="good",
        negative="bad under “You <lie>”",
        num_rows=1,
        chosen=np.array([0.5, 1.0, 0.0]),
        rejected=np.array([-0.5, 0.25]),
        examples=[example],
        auc=0.75,
    )


class Outline(HTMLParser):
    """Collects the tags of a page and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.hovers: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.hovers += [value for name, value in attrs if name == "data-w"]


def test_the_page_stands_alone_and_shows_every_raw_value(tmp_path):
    write_html(make_report(), tmp_path / "weights.html")
    page = (tmp_path / "weights.html").read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert not outline.links and not {"script", "link", "img"} & set(outline.tags)
    assert not re.search(r"https?:|url\(|@import", page)
    assert outline.hovers[1] == "weight +0.143   in the file -0.143"
    assert len(outline.hovers) == 10 and outline.tags.count("svg") == 2
    # texts of rows are shown, not obeyed
    assert "A &lt;script&gt;?" in page and "&lt;b&gt;&amp;" in page and "&lt;lie&gt;" in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(("num_words", "num_columns"), [(3, 2), (40, 1)])
def test_short_pairs_stand_in_two_columns_and_nothing_leaves_the_picture(
    tmp_path, num_words, num_columns
):
    report = make_report(num_words)
    columns = lay_out(report.examples)
    assert len(columns) == num_columns
    for column in columns:
        for _, content in column:
            text = content if isinstance(content, str) else "".join(t.text for t in content)
            assert len(text) <= 104 / num_columns
    plot_weights(report, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def strange_report() -> WeightsReport:
    """Characters without a glyph, invisible ones, and a token wider than the picture."""

    def tokens(*texts: str) -> list[WeighedToken]:
        return [WeighedToken(text=text, weight=0.5, raw=0.5, is_planted=False) for text in texts]

    example = Example(
        prompt="\N{GRINNING FACE} $x_$ " + "p" * 300,
        chosen=tokens("\N{CJK UNIFIED IDEOGRAPH-6F22}", "\N{RIGHT-TO-LEFT OVERRIDE}", "\0", "ok"),
        rejected=tokens("-" * 300, "\r\n", ""),
    )
    return replace(make_report(), title="$a_$, train", examples=[example])


def test_tokens_that_cannot_be_drawn_are_boxes_and_none_leaves_the_picture(tmp_path):
    report = strange_report()
    [[[_, prompt], *_], *_] = lay_out(report.examples)
    assert prompt.startswith("□ $x_$ ppp") and prompt.endswith("p…") and len(prompt) <= 50
    texts = [drawn(token.text) for token in report.examples[0].chosen]
    assert texts == ["□", "□", "□", "ok"]
    long, line_break, nothing = (drawn(token.text) for token in report.examples[0].rejected)
    assert long == "-" * 39 + "…" and (line_break, nothing) == ("□↵", "·")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_weights(report, tmp_path / "weights.png")


def test_a_picture_that_cannot_be_written_is_only_missed(tmp_path, caplog):
    picture = tmp_path / "weights.png"
    picture.mkdir()
    assert not try_to_draw(partial(plot_weights, make_report()), picture)
    assert f"no weights.png: CheckpointError: {picture}: cannot be written" in caplog.text


def test_a_long_word_breaks_wherever_the_page_has_text(tmp_path):
    report = replace(make_report(), examples=strange_report().examples)
    write_html(report, tmp_path / "weights.html")
    page = (tmp_path / "weights.html").read_text(encoding="utf-8")
    body, cell = (
        re.search(rf"^{re.escape(name)} {{([^}}]*)}}", page, re.M)[1]
        for name in ("body", "td:first-child, th:first-child")
    )
    assert "overflow-wrap: anywhere" in body and "white-space: pre-wrap" in cell


def test_a_bar_that_dwarfs_the_others_is_cut():
    weights = np.concatenate([np.zeros(90), np.full(5, 0.9), np.full(5, -3.0)])
    edges, shares, highest = histogram(weights, 1.0)
    assert shares.sum() == pytest.approx(1) and shares[len(shares) // 2] == 0.9
    # what lies beyond the limit is in the outer bar
    assert shares[0] == 0.05 and edges[0] == -1.0
    assert highest == pytest.approx(0.065)


def test_roc_auc_counts_ties_half():
    is_positive = np.array([True, False, True, False])
    assert roc_auc(np.array([3.0, 1.0, 2.0, 0.0]), is_positive) == 1.0
    assert roc_auc(np.array([0.0, 0.0, 0.0, 0.0]), is_positive) == 0.5
    assert roc_auc(np.array([1.0, 1.0, 2.0, 0.0]), is_positive) == 0.875
    assert roc_auc(np.array([0.0, 1.0, 2.0, 3.0]), is_positive) == 0.25


@pytest.mark.parametrize("includes_eos", [False, True])
def test_the_roc_auc_of_planted_tokens_is_one_where_these_alone_weigh(
    tmp_path, tokenizer, includes_eos
):
    end = [tokenizer.eos_token_id] if includes_eos else []
    encoded, lines = [], []
    for row in generate_rows("train", num_rows=32):
        prompt, chosen, rejected = (
            tokenizer(row[field], add_special_tokens=False)["input_ids"]
            for field in ("prompt", "chosen", "rejected")
        )
        chosen, rejected = chosen + end, rejected + end
        encoded.append(EncodedRow(prompt, chosen, rejected))
        weights = [float(a != b) for a, b in zip(chosen, rejected, strict=True)]
        lines.append(json.dumps(row | {"chosen_weight": weights, "rejected_weight": weights}))
    model = ModelOrigin(name_or_path="model", identity="", template="")
    origin = WeightsOrigin(
        source="planted",
        rows=len(lines),
        tokens=0,
        includes_eos=includes_eos,
        round=None,
        compute_dtype="float32",
        tokenizer="",
        positive=model,
        negative=model,
        fingerprint="",
    )
    # as data.split_names calls it
    path = tmp_path / "train_prefs.jsonl"
    path.write_text("\n".join(lines))
    assert read_report(path, encoded, origin, tokenizer).auc == 1


def test_token_texts_make_up_the_text(tokenizer):
    text = " In order they are 1245, naïve €5 \N{GRINNING FACE}."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    # a character that is spread over tokens belongs to the last of them
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in texts)
