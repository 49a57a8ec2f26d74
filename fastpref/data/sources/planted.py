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
from typing import Any

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

_OPPOSITE = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}

_DEFAULT_NUM_ROWS = {"train": 2048, "test": 256, "sft_train": 16384, "sft_test": 256}
# a hash of its text deals each prompt to one split: disjoint for every seed and size
_SPLIT_OF_BUCKET = ("test", "sft_test", *("train",) * 6, *("sft_train",) * 8)


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer, and the wrong one that may be planted in its place."""

    right: str
    wrong: str


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
    split: str, *, num_rows: int | None = None, seed: int = 0, slip_rate: float = 0.35
) -> list[dict[str, Any]]:
    """Demonstrations with wrong answer tokens, for instruction tuning of the embedded model.

    Args:
        split: "train" or "test"; no prompt occurs in the other one or in `planted`.
        num_rows: Number of rows, each with its own prompt; default 16384 (train), 256 (test).
        seed: The rows are a function of split, num_rows, seed and slip_rate.
        slip_rate: Probability that an answer token is wrong, independently of others, in [0, 1].
            A model that imitates such rows learns the tasks and the errors; preference learning
            then has to remove the errors.

    Returns:
        Rows with prompt, chosen (the SFT target) and rejected (answer tokens are wrong where they
        are right in `chosen`, and right where they are wrong).

    Raises:
        ValueError: As generate_rows; slip_rate is out of range.
    """
    _check_split(split)
    if not 0 <= slip_rate <= 1:
        raise ValueError(f"slip_rate must be in [0, 1], got {slip_rate}")
    rows = []
    for prompt, rng in _draw_prompts(f"sft_{split}", num_rows, seed):
        sentence = _solve(prompt)
        positions = _answer_positions(sentence)
        slips = {i for i in positions if rng.random() < slip_rate}
        chosen, _ = _render(sentence, slips)
        rejected, _ = _render(sentence, positions - slips)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def check_answer(prompt: str, response: str) -> bool:
    """Whether the response is the correct sentence, recomputed from the prompt.

    White space around the response does not count.

    Raises:
        ValueError: The prompt is not one of this module's.
    """
    correct, _ = _render(_solve(prompt), set())
    return response.strip() == correct.strip()


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
    positions = _answer_positions(sentence)
    num_planted = rng.randint(1, min(MAX_PLANTED, len(positions)))
    chosen, _ = _render(sentence, set())
    rejected, spans = _render(sentence, set(rng.sample(sorted(positions), num_planted)))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "planted_spans": spans}


def _answer_positions(sentence: Sentence) -> set[int]:
    return {i for i, piece in enumerate(sentence) if isinstance(piece, AnswerToken)}


def _render(sentence: Sentence, planted: set[int]) -> tuple[str, list[list[int]]]:
    """The text with wrong answer tokens at `planted`, and their [start, end) character ranges."""
    text = ""
    spans = []
    for i, piece in enumerate(sentence):
        start = len(text)
        if isinstance(piece, str):
            text += piece
        else:
            text += piece.wrong if i in planted else piece.right
        if i in planted:
            spans.append([start, len(text)])
    return text, spans


def _solve(prompt: str) -> Sentence:
    for family in FAMILIES:
        if match := family.pattern.fullmatch(prompt):
            return family.answer(**match.groupdict())
    raise ValueError(f"prompt: not a question of the planted set: {prompt!r}")


def _following(item: str, pool: Sequence[str]) -> str:
    """The next item of the pool, cyclically."""
    return pool[(pool.index(item) + 1) % len(pool)]


def _calendar(name: str) -> Sequence[str]:
    return DAYS if name in DAYS else MONTHS


def _characters(text: Iterable[str], pool: str) -> Sentence:
    return [AnswerToken(character, _following(character, pool)) for character in text]


def _words(words: Iterable[str], pool_of: Callable[[str], Sequence[str]]) -> Sentence:
    # the space before a word belongs to its token
    one, two, three = (
        AnswerToken(f" {word}", f" {_following(word, pool_of(word))}") for word in words
    )
    return [one, ",", two, " and", three, "."]


def _draw_digits(rng: random.Random) -> dict[str, str]:
    return {"number": "".join(rng.choices(DIGITS, k=rng.randint(4, 6)))}


def _draw_letters(rng: random.Random) -> dict[str, str]:
    return {"letters": "".join(rng.sample(LETTERS, rng.randint(3, 5)))}


def _draw_replacement(rng: random.Random) -> dict[str, str]:
    *text, new = rng.sample(LETTERS, rng.randint(4, 6))
    return {"letters": "".join(text), "old": rng.choice(text), "new": new}


def _draw_sum(rng: random.Random) -> dict[str, int]:
    """Two three-digit numbers that add without a carry."""
    first, total = 0, 0
    for smallest in (1, 0, 0):
        digit = rng.randint(smallest, 9 - smallest)
        first = 10 * first + digit
        total = 10 * total + rng.randint(digit + smallest, 9)
    return {"a": first, "b": total - first}


def _draw_words(rng: random.Random, pool: Iterable[str]) -> dict[str, str]:
    return dict(zip("abc", rng.sample(list(pool), 3), strict=True))


FAMILIES = (
    Family(
        "What is {a} + {b}?",
        _draw_sum,
        lambda a, b: [f" {a} + {b} = ", *_characters(str(int(a) + int(b)), DIGITS), "."],
    ),
    Family(
        "What is the largest digit of {number}?",
        _draw_digits,
        lambda number: [" The largest digit is ", *_characters(max(number), DIGITS), "."],
    ),
    Family(
        "Sort the digits of {number}.",
        _draw_digits,
        lambda number: [" In order they are ", *_characters(sorted(number), DIGITS), "."],
    ),
    Family(
        "What is {letters} backwards?",
        _draw_letters,
        lambda letters: [" Backwards it reads ", *_characters(reversed(letters), LETTERS), "."],
    ),
    Family(
        "Which letters come after {letters}?",
        _draw_letters,
        lambda letters: [
            " The next letters are ",
            *_characters((_following(letter, LETTERS) for letter in letters), LETTERS),
            ".",
        ],
    ),
    Family(
        "Replace {old} by {new} in {letters}.",
        _draw_replacement,
        lambda old, new, letters: [
            " The result is ",
            *_characters(letters.replace(old, new), LETTERS),
            ".",
        ],
    ),
    Family(
        "What comes after {a}, {b} and {c}?",
        lambda rng: _draw_words(rng, (*DAYS, *MONTHS)),
        lambda **names: [
            " They are followed by",
            *_words((_following(name, _calendar(name)) for name in names.values()), _calendar),
        ],
    ),
    Family(
        "What are the opposites of {a}, {b} and {c}?",
        lambda rng: _draw_words(rng, tuple(_OPPOSITE)),
        lambda **words: [
            " The opposites are",
            *_words((_OPPOSITE[word] for word in words.values()), lambda word: tuple(_OPPOSITE)),
        ],
    ),
)
