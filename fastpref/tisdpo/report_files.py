"""What is told of a weights file: a page and a picture beside it."""

import logging
from typing import Any

from fastpref.tisdpo.report import WeightsReport, read_report
from fastpref.tisdpo.report_html import write_html
from fastpref.tisdpo.report_plot import plot_weights
from fastpref.tisdpo.weight_rows import SourceJob

logger = logging.getLogger("fastpref")


def report_on(job: SourceJob, tokenizer: Any) -> WeightsReport:
    """Read a weights file back and write its two pictures."""
    report = read_report(job.path, job.encoded, job.origin, tokenizer)
    write_html(report, job.path.with_name("weights.html"))
    plot_weights(report, job.path.with_name("weights.png"))
    logger.info("wrote %s and weights.png", job.path.with_name("weights.html"))
    return report
