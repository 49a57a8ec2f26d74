import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data.encode_row import EncodeOptions, truncate


def options(**changed):
    values = {
        "sft": False,
        "weighted": False,
        "max_length": 10,
        "max_prompt_length": 4,
        "truncation": "seed",
        "truncation_mode": "auto",
        "reverse_dataset": False,
        "eos_weight": None,
        "transform_method": "origin",
        "transform_params": {},
        "seed": 0,
        "chat_template": None,
        "on_error": "raise",
        "strict": False,
    }
    return EncodeOptions(**values | changed)


@pytest.mark.parametrize(
    ("truncation", "lengths", "expected"),
    [
        ("seed", (4, 6, 2), (4, 6, 2)),
        # the seed's own example: a short prompt leaves budget unused
        ("seed", (1, 20, 20), (1, 6, 6)),
        ("seed", (8, 3, 3), (4, 3, 3)),
        # the prompt cut suffices, the responses keep more than max_length - max_prompt_length
        ("seed", (5, 6, 2), (4, 6, 2)),
        # the longer response triggers the cut, the shorter one is below it
        ("seed", (8, 9, 7), (4, 6, 6)),
        ("fill", (1, 20, 20), (1, 9, 9)),
        ("fill", (8, 9, 5), (4, 6, 5)),
        ("fill", (2, 9, 7), (2, 8, 7)),
        ("drop", (4, 6, 2), (4, 6, 2)),
        ("drop", (5, 6, 2), None),
    ],
)
def test_truncation_follows_its_rule(truncation, lengths, expected):
    prompt, chosen, rejected = (list(range(length)) for length in lengths)
    cut = truncate(prompt, [chosen, rejected], options(truncation=truncation), keep_end=False)
    assert (cut and (len(cut[0]), *map(len, cut[1]))) == expected


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 40), min_size=1, max_size=2),
    st.sampled_from(["seed", "fill"]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
)
def test_nothing_exceeds_max_length_and_nothing_is_cut_to_nothing(
    prompt_length, lengths, truncation, max_prompt_length, room, keep_end
):
    bounds = {"max_prompt_length": max_prompt_length, "max_length": max_prompt_length + room}
    prompt, responses = list(range(prompt_length)), [list(range(length)) for length in lengths]
    kept_prompt, kept = truncate(
        prompt, responses, options(truncation=truncation, **bounds), keep_end=keep_end
    )
    assert kept_prompt
    assert all(1 <= len(response) <= bounds["max_length"] - len(kept_prompt) for response in kept)
    at = len(prompt) - len(kept_prompt) if keep_end else 0
    assert kept_prompt == prompt[at : at + len(kept_prompt)]
    assert all(part == full[: len(part)] for part, full in zip(kept, responses, strict=True))
    if prompt_length + max(lengths) <= bounds["max_length"]:
        assert (kept_prompt, kept) == (prompt, responses)
