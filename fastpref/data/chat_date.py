"""The day that a chat template prints: one for all of a run, however many days it takes."""

import datetime
from functools import cache
from pathlib import Path

from fastpref.errors import CheckpointError

DATE_VARIABLE = "fastpref_date"
"""Of a template: `date_texts`."""
# transformers makes text of functions among the variables of a template, but a macro can stand for
# one; the line break after it is eaten, so the template reads as if it stood alone
DATE_MACRO = (
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}"
    "{% for code, value in fastpref_date.items() %}"
    "{% set date.text = date.text | replace(code, value) %}{% endfor %}{{ date.text }}"
    "{% endmacro %}\n"
)
DATE_CODES = "aAwdbBmyYHIMSfpjUWGuVcxXDFTRe"
"""Of strftime."""


@cache
def date_texts(date: str) -> dict[str, str]:
    """What each code of strftime stands for on a day, "2026-11-30", at its beginning."""
    day = datetime.datetime.fromisoformat(date)
    codes = [f"%{flag}{code}" for code in DATE_CODES for flag in ("-", "")]
    return {code: day.strftime(code) for code in codes}


def read_date(path: Path) -> str:
    """A day that chat templates were told, from the file that keeps it.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        return str(datetime.date.fromisoformat(path.read_text(encoding="utf-8")))
    except ValueError:
        raise CheckpointError(
            f"{path} is damaged: it holds the day that the chat template was told, YYYY-MM-DD; "
            "write it there, or delete the file for today"
        ) from None
