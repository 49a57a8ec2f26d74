"""Sidecar file of estimated token weights, `{split}.weights.json`, that records their origin."""

import datetime
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpref.complete_files import complete_file
from fastpref.data.sources.readers import SUFFIXES
from fastpref.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ModelOrigin:
    """One of the two models that token weights were estimated with."""

    name_or_path: str
    """As given by the user."""
    identity: str
    """Digest of its weights, or its commit on the hub: see `model_identity`."""
    template: str
    """Text of the template that its prompts were put into; "" for none."""


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """Contents of `{split}.weights.json`, the sidecar of `{split}.jsonl`."""

    source: str
    """File or name of the dataset that the weights were estimated for."""
    rows: int
    """Rows of the weights file."""
    tokens: int
    """Token weights in the file, chosen and rejected together."""
    includes_eos: bool
    """Each list ends with a weight of the end-of-sequence token."""
    round: int | None
    """Decimal places that the weights were rounded to; None: not rounded."""
    compute_dtype: str
    """dtype that the two models computed in."""
    tokenizer: str
    """`tokenizer_digest` of the tokenizer."""
    positive: ModelOrigin
    negative: ModelOrigin
    fingerprint: str
    """Changes with everything that the weights depend on."""
    records: str = ""
    """Digest of the source's records, whose columns the file copies."""
    chat_date: str | None = None
    """Date given to a chat template that prints it, "2026-11-30"; None if none does."""
    chat_template: str | None = None
    """`template_digest` of data.chat_template; None: not recorded."""
    template_kwargs: dict[str, Any] | None = None
    """data.template_kwargs; None: not recorded."""
    size_bytes: int = 0
    """Size of the weights file in bytes."""

    def explain_mismatch(
        self, tokenizer: str, chat_template: str | None, template_kwargs: dict[str, Any]
    ) -> str:
        """Explain why a row's tokens differ from those that the weights were estimated for.

        Args:
            tokenizer: `tokenizer_digest` of the run that reads the weights.
            chat_template: Jinja text of its data.chat_template; None for the tokenizer's own.
            template_kwargs: Its data.template_kwargs.
        """
        if tokenizer == self.tokenizer:
            if self.chat_template not in (None, template_digest(chat_template)):
                return "they were estimated with another data.chat_template"
            if self.template_kwargs not in (None, template_kwargs):
                return f"they were estimated with data.template_kwargs={self.template_kwargs}"
            return "the row, or how it is rendered, was changed since they were estimated"
        return (
            f"they were estimated with the tokenizer of {self.positive.name_or_path} "
            f"({self.tokenizer[:12]}), this run's is another one ({tokenizer[:12]})"
        )


def template_digest(chat_template: str | None) -> str:
    """SHA-256 digest of the Jinja text of data.chat_template; "" if it is not set."""
    return "" if chat_template is None else hashlib.sha256(chat_template.encode()).hexdigest()


def sidecar_path(path: Path) -> Path:
    """`train.weights.json` for `train.jsonl`; the split's name may contain dots."""
    # longest suffix first: .jsonl.gz is removed as a whole
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.with_name(f"{path.name.removesuffix(suffix)}.weights.json")
    return path.with_name(f"{path.name}.weights.json")


def write_origin(path: Path, origin: WeightsOrigin) -> None:
    """Write the sidecar of the weights file `path`."""
    with complete_file(sidecar_path(path)) as file:
        file.write(json.dumps(asdict(origin), indent=2) + "\n")


def read_origin(path: Path) -> WeightsOrigin | None:
    """Read the sidecar of a data file; None if it has none.

    Raises:
        DataError: the sidecar is damaged.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        positive, negative = (ModelOrigin(**fields.pop(side)) for side in ("positive", "negative"))
        origin = WeightsOrigin(**fields, positive=positive, negative=negative)
        # only these are used as more than texts and numbers to compare
        if origin.chat_date is not None:
            datetime.date.fromisoformat(origin.chat_date)
        if not isinstance(origin.tokenizer, str):
            raise TypeError("tokenizer is no text")
        return origin
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{sidecar}: not a record of estimated weights ({error}); delete it if {path.name} "
            "holds weights from elsewhere"
        ) from None


def check_complete(source: str, num_rows: int, origin: WeightsOrigin) -> None:
    """Refuse a weights file that was truncated, as by an interrupted copy.

    Raises:
        DataError: the number of rows is not the one recorded.
    """
    if num_rows != origin.rows:
        raise DataError(
            f"{source}:{num_rows}: the file ends here, {origin.rows} rows were written; copy it "
            f"anew, or delete {sidecar_path(Path(source)).name} if rows were taken out on purpose"
        )
