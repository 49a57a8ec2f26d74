"""`task=audit`: report on the data as training would see it, with length histograms and HTML."""

import logging
from dataclasses import replace
from pathlib import Path

from fastpref.cli.length_table import show_lengths
from fastpref.complete_files import complete_file
from fastpref.config import Config
from fastpref.data.announce import read_splits
from fastpref.data.audit.account import run_audit
from fastpref.data.audit.html import AuditPage
from fastpref.data.audit.report import report_split
from fastpref.data.options import data_options
from fastpref.model.beforehand import load_vocabulary
from fastpref.train.orders import build_train_order, log_mix
from fastpref.train.run_folder import AUDIT_PAGE, check_writable, run_place

logger = logging.getLogger("fastpref")


def audit(config: Config) -> None:
    """Read, check and encode every split that training reads, without loading model weights.

    `audit.html` is written to `run_dir`, which may be the folder of a run, or else to a new folder
    next to the run folders.

    Raises:
        FastprefError: training on this data would fail, or the output folder is not writable.
    """
    place = run_place(config)
    place = replace(place, name=f"audit_{place.name}")
    key, folder = ("run_dir", place.run_dir) if place.run_dir else ("output_dir", place.root)
    check_writable(key, folder)
    place.check_name()
    options = data_options(config)
    read = read_splits(options, config.splits, quiet=False)
    tokenizer, vocab_size = load_vocabulary(config.model, config.adapter)
    splits = run_audit(options, tokenizer, vocab_size=vocab_size, splits=config.splits)
    facts = list(read.facts)
    if config.data.shares is not None:
        order = build_train_order(
            splits[0],
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            n_epochs=config.n_epochs,
            n_examples=config.n_examples,
        )
        facts += log_mix(order, config.datasets)
    reports = [
        report_split(split, rows, tokenizer, options.encode)
        for split, rows in zip(splits, read.rows, strict=True)
    ]
    for report in reports:
        show_lengths(report.counts.split, report.lengths)
    page = AuditPage(options.names, describe_source(tokenizer), facts, read.warnings, reports)
    path = (place.run_dir or place.create(config.to_yaml())) / AUDIT_PAGE
    with complete_file(path) as file:
        file.write(page.render())
    logger.info("rows token by token: %s", path)


def describe_source(tokenizer: object) -> str:
    """Hub id or relative path of a tokenizer; of an absolute path only the last part."""
    name = str(getattr(tokenizer, "name_or_path", ""))
    return Path(name).name if Path(name).is_absolute() else name
