"""Datasets of the Hugging Face hub: any by its id, and the built-in `hh`, `shp` and `se`.

Preference rows are derived from the records of these three as in the DPO repository.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import datasets

from fastpref.checks import listed
from fastpref.data.layouts.rows import ASSISTANT_TURN
from fastpref.data.sources.readers import read_batches
from fastpref.errors import DataError, is_shortage
from fastpref.forks import forks_end_with_us
from fastpref.host import available_cores

MIN_SCORE_RATIO = 2
SE_TEST_SHARE = 0.01
SE_SEED = 42

Records = Sequence[dict[str, Any]]


def hub_rows(name: str, split: str, cache_dir: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a built-in hub dataset, downloaded on first use.

    Args:
        name: One of `HUB_SETS`.
        split: train or test.
        cache_dir: Cache folder of `datasets`; None for its default.

    Raises:
        DataError: the hub cannot be reached or has no such split.
    """
    path, derive = HUB_SETS[name]
    # se has no test split of its own: it is cut from train
    there = "train" if name == "se" else split
    records = load_from_hub(path, None, there, cache_dir, name=name)
    return derive(_split_se(records, split) if name == "se" else records)


def hub_records(
    hub_id: str, config: str | None, split: str, cache_dir: str | None
) -> Iterator[tuple[int, Any]]:
    """Records of a split of any hub dataset, numbered from 1.

    Raises:
        DataError: the hub cannot be reached or has no such split.
    """
    table = load_from_hub(hub_id, config, split, cache_dir).with_format("arrow")
    yield from read_batches(table.iter(batch_size=1000), hub_id)


def hub_state(hub_id: str, config: str | None, split: str, cache_dir: str | None) -> str:
    """Fingerprint of a split of a hub dataset, to detect changes.

    Raises:
        DataError: the hub cannot be reached or has no such split.
    """
    return str(load_from_hub(hub_id, config, split, cache_dir)._fingerprint)


@cache
def hub_splits(hub_id: str, config: str | None, cache_dir: str | None) -> tuple[str, ...]:
    """Names of the splits of a hub dataset; the answer is cached in memory.

    Raises:
        DataError: the hub cannot be reached.
    """
    try:
        return tuple(datasets.get_dataset_split_names(hub_id, config, cache_dir=cache_dir))
    except Exception as error:
        raise _unreachable(hub_id, config, "", error) from error


def hh_rows(records: Records) -> Iterator[dict[str, Any]]:
    """Anthropic HH: whole dialogues, whose prompt `split_dialogues` finds later."""
    for record in records:
        yield {"chosen": record["chosen"], "rejected": record["rejected"]}


def shp_rows(records: Records) -> Iterator[dict[str, Any]]:
    """Stanford Human Preferences: pairs in which one side scores at least twice the other.

    The SFT target is the best-scored response of a prompt, the first one on ties; a repeated
    response keeps its first score.
    """
    scores: dict[str, dict[str, int]] = {}
    for record in records:
        if _is_clear(record):
            seen = scores.setdefault(record["history"], {})
            for side in "AB":
                seen.setdefault(record[f"human_ref_{side}"], record[f"score_{side}"])
    targets = {history: max(seen, key=seen.__getitem__) for history, seen in scores.items()}
    for record in records:
        if _is_clear(record):
            winner, loser = "AB" if record["labels"] == 1 else "BA"
            yield {
                "prompt": _dialogue_prompt(record["history"]),
                "chosen": " " + record[f"human_ref_{winner}"],
                "rejected": " " + record[f"human_ref_{loser}"],
                "sft_target": " " + targets[record["history"]],
            }


def se_rows(records: Records) -> Iterator[dict[str, Any]]:
    """Stack Exchange: all pairs of answers to a question, the one of higher `pm_score` chosen.

    On equal scores the later answer is chosen. A repeated question replaces the earlier one, in
    the earlier one's place. The SFT target is the best answer, the first one on ties.

    Args:
        records: With HTML stripped: `question`, and `answers` with `text` and `pm_score`.
    """
    last = {record["question"]: index for index, record in enumerate(records)}
    for record in records:
        index = last.pop(record["question"], None)
        if index is None:
            continue
        answers = records[index]["answers"]
        if not answers:
            continue
        best = max(answers, key=lambda answer: answer["pm_score"])
        for one, two in combinations(answers, 2):
            winner, loser = (one, two) if one["pm_score"] > two["pm_score"] else (two, one)
            yield {
                "prompt": _dialogue_prompt(record["question"]),
                "chosen": " " + winner["text"],
                "rejected": " " + loser["text"],
                "sft_target": " " + best["text"],
            }


HUB_SETS: dict[str, tuple[str, Callable[[Records], Iterator[dict[str, Any]]]]] = {
    "hh": ("Anthropic/hh-rlhf", hh_rows),
    "shp": ("stanfordnlp/SHP", shp_rows),
    "se": ("HuggingFaceH4/stack-exchange-preferences", se_rows),
}
"""Name -> hub id, and the function that derives preference rows from a split's records."""


def strip_html(html: str) -> str:
    """Paragraphs and code of a Stack Exchange post, joined by blank lines.

    Only top-level elements count. `p` gives its own text, without that of inline elements; `pre`
    and `code` give `<code>…</code>`; lists, quotes and headings are left out.
    """
    from bs4 import BeautifulSoup, Tag
    from bs4.element import NavigableString

    parts = []
    for element in BeautifulSoup(html, "html.parser").children:
        if not isinstance(element, Tag):
            continue
        if element.name == "p":
            parts.append("".join(child for child in element if isinstance(child, NavigableString)))
        elif element.name in ("pre", "code"):
            blocks = [element] if element.name == "code" else element.find_all("code")
            parts.extend(f"<code>{block.get_text()}</code>" for block in blocks)
    return "\n\n".join(parts)


def _dialogue_prompt(text: str) -> str:
    return f"\n\nHuman: {text}{ASSISTANT_TURN}"


def _is_clear(record: dict[str, Any]) -> bool:
    low, high = sorted((record["score_A"], record["score_B"]))
    # multiplied, not divided: a score may be 0
    return high > 0 and high >= MIN_SCORE_RATIO * low


def _split_se(records: datasets.Dataset, split: str) -> Records:
    records = records.shuffle(seed=SE_SEED)
    num_test = int(len(records) * SE_TEST_SHARE)
    bounds = range(num_test) if split == "test" else range(num_test, len(records))
    # ten million posts: hours in one process
    with forks_end_with_us():
        return records.select(bounds).map(
            _strip_record, num_proc=available_cores(), desc=f"stripping HTML of se {split}"
        )


def _strip_record(record: dict[str, Any]) -> dict[str, Any]:
    answers = [answer | {"text": strip_html(answer["text"])} for answer in record["answers"]]
    return {"question": strip_html(record["question"]), "answers": answers}


def load_from_hub(
    hub_id: str, config: str | None, split: str, cache_dir: str | None, *, name: str = ""
) -> datasets.Dataset:
    """A split of a hub dataset, downloaded on first use.

    Args:
        hub_id: Its id.
        config: Its configuration; None for the only or default one.
        split: Name of the split on the hub.
        cache_dir: Cache folder of `datasets`; None for its default.
        name: Our name of a built-in dataset, for error messages.

    Raises:
        DataError: the hub cannot be reached or has no such split.
    """
    try:
        return datasets.load_dataset(hub_id, config, split=split, cache_dir=cache_dir)
    # the hub client raises errors of many unrelated classes; each means that there is no data
    except Exception as error:
        raise _unreachable(hub_id, config, split, error, name=name) from error


def _unreachable(
    hub_id: str, config: str | None, split: str, error: Exception, *, name: str = ""
) -> DataError:
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    # says nothing of the hub
    if is_shortage(cause):
        raise cause from None
    # `datasets` raises a ValueError for a wrong configuration: only then ask the hub again
    configs = _other_configs(hub_id, config) if isinstance(error, ValueError) else []
    if configs:
        rule = f"has no configuration {config!r}, only" if config else "has several configurations:"
        return DataError(
            f"datasets: {hub_id} {rule} {listed(configs)}; "
            f"data.config_names={{{hub_id}: NAME}} chooses one"
        )
    # records of shp and se are converted only when read from the hub
    rows = "rows of prompt, chosen and rejected" if name in ("shp", "se") else "rows"
    reason = str(error).strip().split("\n")[0][:200]
    name, called = name or hub_id, f"{name} is {hub_id}" if name else hub_id
    what = f", whose split {split!r} could not be read" if split else " could not be read"
    other = (
        "" if not split or name != hub_id else f", data.split_names={{{split}: NAME}} another split"
    )
    return DataError(
        f"datasets: {called} on the Hugging Face hub{what} ({type(error).__name__}: {reason}); a "
        f"local folder works too: set base_data_dir=DIR with {rows} in DIR/{name}/"
        f"{split or 'train'}.jsonl{other}"
    )


def _other_configs(hub_id: str, config: str | None) -> list[str]:
    """All configurations of a dataset that lacks the requested one; [] if the configuration is
    not the cause of the failure."""
    try:
        configs = datasets.get_dataset_config_names(hub_id)
    # the client fails again: its first error is reported
    except Exception:
        return []
    if config is None:
        has_default = datasets.get_dataset_default_config_name(hub_id) is not None
        return [] if has_default else configs
    return [] if config in configs else configs
