"""The embedded preference set `planted`: short tasks, correct answers and planted wrong tokens.

Every question can be answered from its text alone. The chosen response is the correct sentence;
the rejected one is the same sentence with one to three answer tokens replaced, and `planted_spans`
says where. Every digit, capital letter and word of an answer is one token of the tokenizer in
`assets/tiny`, so a span is a token and all other tokens of a pair agree.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

TINY_MODEL_DIR = Path(__file__).parent / "assets" / "tiny"
"""Hugging Face folder of the shipped model: about one million parameters, instruction-tuned."""

PROMPT_TEMPLATE = "Question: {question}\nAnswer:"
MAX_PLANTED = 3

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
OPPOSITES = (
    *(("big", "small"), ("hot", "cold"), ("fast", "slow"), ("high", "low"), ("old", "new")),
    *(("light", "dark"), ("wet", "dry"), ("hard", "soft"), ("long", "short"), ("full", "empty")),
    *(("rich", "poor"), ("loud", "quiet"), ("open", "closed"), ("near", "far"), ("thick", "thin")),
)

_NEXT = {
    name: following
    for names in (DAYS, MONTHS)
    for name, following in zip(names, (*names[1:], names[0]), strict=True)
}
_OPPOSITE = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}

_DEFAULT_NUM_ROWS = {"train": 2048, "test": 256, "sft_train": 8192, "sft_test": 256}
# a hash of its text deals each prompt to one split: disjoint for every seed and size
_SPLIT_OF_BUCKET = ("test", "sft_test", *("train",) * 6, *("sft_train",) * 8)


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer: its text, and the wrong texts that may be planted in its place."""

    text: str
    wrong: tuple[str, ...]


Sentence = list[str | AnswerToken]


@dataclass(frozen=True)
class Family:
    """One kind of task: its question with named {fields}, how to draw them, how to answer."""

    question: str
    draw: Callable[[random.Random], dict[str, Any]]
    answer: Callable[..., Sentence]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the prompts of this family; its groups are the fields."""
        pieces = re.split(r"\{(\w+)\}", PROMPT_TEMPLATE.format(question=self.question))
        return re.compile(
            "".join(rf"(?P<{p}>\w+)" if i % 2 else re.escape(p) for i, p in enumerate(pieces))
        )


def generate_rows(
    split: str, *, num_rows: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Preference pairs of the set `planted`, the task families in turn.

    Args:
        split: "train" or "test"; their prompts never coincide.
        num_rows: Number of rows, each with its own prompt; default 2048 (train), 256 (test).
        seed: The rows are a function of split, num_rows and seed; fewer rows are a prefix.

    Returns:
        Rows with prompt, chosen, rejected (text; responses start with a space) and
        planted_spans: the [start, end) character ranges of the wrong tokens in `rejected`,
        ascending, one to three of them. Elsewhere chosen and rejected agree token by token.

    Raises:
        ValueError: The split is unknown, or has fewer different prompts than num_rows.
    """
    _check_split(split)
    return [_pair(prompt, rng) for prompt, rng in _draw_prompts(split, num_rows, seed)]


def generate_sft_rows(
    split: str, *, num_rows: int | None = None, seed: int = 0, wrong_share: float = 0.5
) -> list[dict[str, Any]]:
    """Demonstrations for the SFT stage, of mixed quality.

    Args:
        split: "train" or "test"; no prompt occurs in the other one or in `planted`.
        num_rows: Number of rows, each with its own prompt; default 8192 (train), 256 (test).
        seed: The rows are a function of split, num_rows, seed and wrong_share.
        wrong_share: Probability that the response to imitate is a wrong one, in [0, 1]. It
            leaves the model uncertain: what preference learning then has to mend.

    Returns:
        Rows with prompt, chosen (the response to imitate) and rejected (a wrong one).

    Raises:
        ValueError: As generate_rows; wrong_share is out of range.
    """
    _check_split(split)
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"wrong_share must be in [0, 1], got {wrong_share}")
    rows = []
    for prompt, rng in _draw_prompts(f"sft_{split}", num_rows, seed):
        pair = _pair(prompt, rng)
        imitated = "rejected" if rng.random() < wrong_share else "chosen"
        rows.append({"prompt": prompt, "chosen": pair[imitated], "rejected": pair["rejected"]})
    return rows


def check_answer(prompt: str, response: str) -> bool:
    """Whether the response is the correct sentence, recomputed from the prompt.

    White space around the response does not count.

    Raises:
        ValueError: The prompt is none of this module's.
    """
    return response.strip() == _text(_solve(prompt)).strip()


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")


def _draw_prompts(
    split: str, num_rows: int | None, seed: int
) -> Iterator[tuple[str, random.Random]]:
    num_rows = _DEFAULT_NUM_ROWS[split] if num_rows is None else num_rows
    rng = random.Random(f"planted {split} {seed}")
    seen: set[str] = set()
    for family in cycle(FAMILIES):
        if len(seen) >= num_rows:
            return
        # a split is at least a sixteenth of the prompts: 2000 misses mean that it is used up
        for _ in range(2000):
            question = family.question.format(**family.draw(rng))
            prompt = PROMPT_TEMPLATE.format(question=question)
            bucket = zlib.crc32(prompt.encode()) % len(_SPLIT_OF_BUCKET)
            if prompt not in seen and _SPLIT_OF_BUCKET[bucket] == split:
                break
        else:
            raise ValueError(f"num_rows: fewer than {num_rows} different prompts in {split}")
        seen.add(prompt)
        yield prompt, rng


def _pair(prompt: str, rng: random.Random) -> dict[str, Any]:
    sentence = _solve(prompt)
    positions = [i for i, piece in enumerate(sentence) if isinstance(piece, AnswerToken)]
    num_planted = rng.randint(1, min(MAX_PLANTED, len(positions)))
    planted = set(rng.sample(positions, num_planted))
    rejected = ""
    spans = []
    for i, piece in enumerate(sentence):
        start = len(rejected)
        if isinstance(piece, AnswerToken) and i in planted:
            rejected += rng.choice(piece.wrong)
            spans.append([start, len(rejected)])
        else:
            rejected += _text([piece])
    chosen = _text(sentence)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "planted_spans": spans}


def _solve(prompt: str) -> Sentence:
    for family in FAMILIES:
        if match := family.pattern.fullmatch(prompt):
            return family.answer(**match.groupdict())
    raise ValueError(f"prompt: not a question of the planted set: {prompt!r}")


def _text(sentence: Sentence) -> str:
    return "".join(piece if isinstance(piece, str) else piece.text for piece in sentence)


def _answer_token(text: str, pool: Iterable[str]) -> AnswerToken:
    return AnswerToken(text, tuple(other for other in pool if other != text))


def _characters(text: Iterable[str], pool: str) -> Sentence:
    return [_answer_token(character, pool) for character in text]


def _list_of_words(words: Sequence[str], pools: Iterable[Iterable[str]]) -> Sentence:
    # the space before a word belongs to its token
    one, two, three = (
        _answer_token(f" {word}", [f" {other}" for other in pool])
        for word, pool in zip(words, pools, strict=True)
    )
    return [one, ",", two, " and", three, "."]


def _draw_string(rng: random.Random, pool: str, shortest: int, longest: int) -> str:
    return "".join(rng.choices(pool, k=rng.randint(shortest, longest)))


def _draw_words(rng: random.Random, pool: Iterable[str]) -> dict[str, str]:
    return dict(zip("abc", rng.sample(list(pool), 3), strict=True))


def _draw_count(rng: random.Random) -> dict[str, str]:
    letters = "".join(rng.sample(LETTERS, 3))
    text = _draw_string(rng, letters, 5, 7)
    return {"letter": rng.choice(text), "text": text}


def _draw_replacement(rng: random.Random) -> dict[str, str]:
    text = _draw_string(rng, LETTERS, 4, 6)
    old = rng.choice(text)
    return {"text": text, "old": old, "new": rng.choice(LETTERS.replace(old, ""))}


def _names_of_same_kind(name: str) -> Sequence[str]:
    return DAYS if name in DAYS else MONTHS


FAMILIES = (
    Family(
        "What is {a} + {b}?",
        lambda rng: {"a": rng.randint(10, 99), "b": rng.randint(10, 99)},
        lambda a, b: [f" {a} + {b} = ", *_characters(str(int(a) + int(b)), DIGITS), "."],
    ),
    Family(
        "Sort the digits of {number}.",
        lambda rng: {"number": _draw_string(rng, DIGITS, 4, 6)},
        lambda number: [" In order they are ", *_characters(sorted(number), DIGITS), "."],
    ),
    Family(
        "What is {text} backwards?",
        lambda rng: {"text": _draw_string(rng, LETTERS, 4, 6)},
        lambda text: [" Backwards it reads ", *_characters(reversed(text), LETTERS), "."],
    ),
    Family(
        "What is the largest digit of {number}?",
        lambda rng: {"number": _draw_string(rng, DIGITS, 4, 6)},
        lambda number: [" The largest digit is ", *_characters(max(number), DIGITS), "."],
    ),
    Family(
        "What comes after {a}, {b} and {c}?",
        lambda rng: _draw_words(rng, _NEXT),
        lambda **names: [
            " They are followed by",
            *_list_of_words(
                [_NEXT[name] for name in names.values()],
                [_names_of_same_kind(name) for name in names.values()],
            ),
        ],
    ),
    Family(
        "What are the opposites of {a}, {b} and {c}?",
        lambda rng: _draw_words(rng, _OPPOSITE),
        lambda **adjectives: [
            " The opposites are",
            *_list_of_words([_OPPOSITE[a] for a in adjectives.values()], [_OPPOSITE] * 3),
        ],
    ),
    Family(
        "How often does {letter} occur in {text}?",
        _draw_count,
        lambda letter, text: [
            f" {letter} occurs ",
            *_characters(str(text.count(letter)), DIGITS[1:]),
            " times.",
        ],
    ),
    Family(
        "Replace {old} by {new} in {text}.",
        _draw_replacement,
        lambda old, new, text: [
            " The result is ",
            *_characters(text.replace(old, new), LETTERS),
            ".",
        ],
    ),
)
