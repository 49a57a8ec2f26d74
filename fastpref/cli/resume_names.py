"""The names that `resume.allow` may hold."""

from pathlib import Path

from fastpref.cli.options import all_options
from fastpref.config import ResumeConfig
from fastpref.errors import ConfigError
from fastpref.train.opening import names_of_starts
from fastpref.train.resume.differences import unknown_names


def check_resume(resume: ResumeConfig, run_dir: Path | None) -> None:
    """Refuse names that no option has, and none had when the run was started.

    Args:
        run_dir: That is gone on with; None: a new run, or whose options are not known yet.

    Raises:
        ConfigError: naming the option.
    """
    earlier = names_of_starts(run_dir) if run_dir else ()
    known = [*all_options(), *earlier, "data", "model", "tokenizer"]
    wrong = unknown_names(resume.allow, known)
    if wrong:
        raise ConfigError(f"resume.allow: there is no option {', '.join(wrong)}")
