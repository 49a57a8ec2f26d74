"""A file of estimated token weights and the record beside it that says where they come from."""

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
    """One of the two models that token weights come from."""

    name_or_path: str
    """As the user named it."""
    identity: str
    """Digest of its weights, or its commit on the hub: see `model_identity`."""
    template: str
    """What it read beside the prompts: the text of the template, "" for nothing."""


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """What `{split}.weights.json` beside `{split}.jsonl` holds."""

    source: str
    """File or name of the rows that the weights were estimated for."""
    rows: int
    """Rows of the file."""
    tokens: int
    """Weights of the file, both sides."""
    includes_eos: bool
    """Each list ends with a weight of the end-of-sequence token."""
    round: int | None
    """Decimals that the weights were rounded to."""
    compute_dtype: str
    """Arithmetic of the two models."""
    tokenizer: str
    """`tokenizer_digest` of the tokenizer."""
    positive: ModelOrigin
    negative: ModelOrigin
    fingerprint: str
    """Changes with all that the weights depend on."""
    records: str = ""
    """Digest of the source's records, whose columns the file has."""
    chat_date: str | None = None
    """The day that a chat template which prints the date was told; None where none does."""
    chat_template: str | None = None
    """`template_digest` of data.chat_template."""
    template_kwargs: dict[str, Any] | None = None
    """data.template_kwargs."""
    size_bytes: int = 0
    """Of the file."""

    def explain_mismatch(
        self, tokenizer: str, chat_template: str | None, template_kwargs: dict[str, Any]
    ) -> str:
        """Why a row's tokens may be others than the weights were estimated for.

        Args:
            tokenizer: `tokenizer_digest` of the run that reads them.
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
    """Digest of the Jinja text of data.chat_template; "" where there is none."""
    return "" if chat_template is None else hashlib.sha256(chat_template.encode()).hexdigest()


def sidecar_path(path: Path) -> Path:
    """`train.weights.json` for `train.jsonl`; the split's name may have dots itself."""
    # the longest first: of train.jsonl.gz both are taken off
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.with_name(f"{path.name.removesuffix(suffix)}.weights.json")
    return path.with_name(f"{path.name}.weights.json")


def write_origin(path: Path, origin: WeightsOrigin) -> None:
    """Write the record that stands beside the weights file `path`."""
    with complete_file(sidecar_path(path)) as file:
        file.write(json.dumps(asdict(origin), indent=2) + "\n")


def read_origin(path: Path) -> WeightsOrigin | None:
    """The record beside a data file; None for a file that this program did not write.

    Raises:
        DataError: the record is damaged.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        positive, negative = (ModelOrigin(**fields.pop(side)) for side in ("positive", "negative"))
        return WeightsOrigin(**fields, positive=positive, negative=negative)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{sidecar}: not a record of estimated weights ({error}); delete it if {path.name} "
            "holds weights from elsewhere"
        ) from None


def check_complete(source: str, num_rows: int, origin: WeightsOrigin) -> None:
    """Refuse a weights file that lost rows on its way.

    Raises:
        DataError: naming the last row found and how many there should be.
    """
    if num_rows != origin.rows:
        raise DataError(
            f"{source}:{num_rows}: the file ends here, {origin.rows} rows were written; copy it "
            f"anew, or delete {sidecar_path(Path(source)).name} if rows were taken out on purpose"
        )
