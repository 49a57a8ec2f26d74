"""Fix the date that a chat template prints, so that a run of several days renders one date."""

import datetime
from functools import cache
from pathlib import Path

from fastpref.errors import CheckpointError

DATE_VARIABLE = "fastpref_date"
"""Template variable that holds `date_texts`."""
# replaces transformers' strftime_now: functions passed as template variables are turned into text,
# but a macro can shadow one. Its trailing line break is stripped, so the output does not change
DATE_MACRO = (
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}"
    "{% for code, value in fastpref_date.items() %}"
    "{% set date.text = date.text | replace(code, value) %}{% endfor %}{{ date.text }}"
    "{% endmacro %}\n"
)
DATE_CODES = "aAwdbBmyYHIMSfpjUWGuVcxXDFTRe"
"""Format codes of strftime."""


@cache
def date_texts(date: str) -> dict[str, str]:
    """strftime code -> its text at midnight of a date such as "2026-11-30"."""
    day = datetime.datetime.fromisoformat(date)
    codes = [f"%{flag}{code}" for code in DATE_CODES for flag in ("-", "")]
    return {code: day.strftime(code) for code in codes}


def read_date(path: Path) -> str:
    """Read the file that stores the date given to chat templates.

    Raises:
        CheckpointError: the file holds no ISO date.
    """
    try:
        return str(datetime.date.fromisoformat(path.read_text(encoding="utf-8")))
    except ValueError:
        raise CheckpointError(
            f"{path} is damaged: it holds the day that the chat template was told, YYYY-MM-DD; "
            "write it there, or delete the file for today"
        ) from None
