"""A weights file before any model weights are loaded: its tokens, shards and fingerprint."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastpref.config import PackingConfig, WeightsConfig
from fastpref.data.chat import ChatFormat, check_chat_template, current_date, prints_date
from fastpref.data.options import DataOptions
from fastpref.data.source import Rows
from fastpref.data.weights_file import WeightsOrigin, template_digest
from fastpref.distributed import World
from fastpref.scoring.shards import Shards, rows_digest
from fastpref.scoring.side import Side, check_rows
from fastpref.tisdpo.settings import scoring_settings
from fastpref.tisdpo.source_tokens import encode_under_templates
from fastpref.tisdpo.weight_rows import SourceJob, begun_date, shards_folder, written_date


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Options of an estimation, besides its models and its rows."""

    weights: WeightsConfig
    data: DataOptions
    packing: PackingConfig
    chat_date: str = ""
    """The date for a chat template that prints it, in files not begun yet; "": today."""

    def path_of(self, rows: Rows) -> Path:
        """The path of a source's weights file."""
        folder = Path(str(self.weights.output_dir)) / f"{rows.name}{self.weights.suffix}"
        # under the split name by which training with the same options finds it
        split = rows.counts.split
        return folder / f"{self.data.split_names.get(split, split)}.jsonl"


def open_job(
    options: JobOptions, sides: Sequence[Side], rows: Rows, tokenizer: Any, world: World
) -> SourceJob:
    """Prepare a weights file, with the chat template rendered for the right date.

    If the template prints the date, it gets the day on which the estimation began: the date of the
    file if that is finished, of the shards if an estimation was stopped, else the given one or
    today.

    Raises:
        DataError, ConfigError, CheckpointError: see `build_job`.
    """
    chat = options.data.encode.chat(tokenizer)
    if rows.has_chats:
        check_chat_template(tokenizer, chat.template, chat.arguments)
    path = options.path_of(rows)
    if not (rows.has_chats and prints_date(tokenizer, chat.template)):
        return build_job(options, sides, rows, chat, path)
    given = options.chat_date
    begun = world.on_main(lambda: begun_date(path) or given or current_date(tokenizer))
    written = world.on_main(partial(written_date, path))
    job = build_job(options, sides, rows, replace(chat, date=written or begun), path)
    if written in ("", begun) or world.on_main(job.is_finished):
        return job
    return build_job(options, sides, rows, replace(chat, date=begun), path)


def build_job(
    options: JobOptions, sides: Sequence[Side], rows: Rows, chat: ChatFormat, path: Path
) -> SourceJob:
    """Encode a source's rows under all templates, and derive its shards and its fingerprint.

    Raises:
        DataError: a row has no prompt token, the chat template refuses it, or it is longer than a
            model's position table.
        ConfigError: the chat template cannot render any conversation.
        CheckpointError: a token id is beyond a model's embedding.
    """
    weights, data = options.weights, options.data
    rows, encoded, counts = encode_under_templates(
        rows,
        list(dict.fromkeys(["", *(side.origin.template for side in sides)])),
        chat.tokenizer,
        # whole pairs, not truncated or reversed
        replace(
            data.encode,
            sft=False,
            weighted=False,
            reverse_dataset=False,
            max_length=sys.maxsize,
            chat_date=chat.date,
        ),
        include_eos=weights.include_eos,
        max_dropped=data.read.max_dropped,
    )
    settings = scoring_settings(sides, chat, weights=weights, packing=options.packing)
    prints, shards = {}, {}
    for side in sides:
        template, identity = side.origin.template, side.origin.identity
        check_rows(rows, encoded[template], side)
        tokens = rows_digest(encoded[template])
        prints[side.label] = fingerprint([settings, tokens, identity, template])
        folder = shards_folder(path) / f"{side.label}-{prints[side.label][:16]}"
        shards[side.label] = Shards.of(folder, encoded[template], weights.shard_rows)
    origin = WeightsOrigin(
        source=rows.source,
        rows=len(rows.dataset),
        tokens=sum(len(row.chosen_ids) + len(row.rejected_ids) for row in encoded[""]),
        includes_eos=weights.include_eos,
        round=weights.round,
        compute_dtype=sides[0].model.compute_dtype,
        tokenizer=settings["tokenizer"],
        positive=sides[0].origin,
        negative=sides[1].origin,
        fingerprint=fingerprint([prints, weights.round]),
        chat_date=chat.date,
        chat_template=template_digest(chat.template),
        template_kwargs=dict(chat.arguments),
    )
    return SourceJob(
        rows=rows, path=path, encoded=encoded[""], counts=counts, shards=shards, origin=origin
    )


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
