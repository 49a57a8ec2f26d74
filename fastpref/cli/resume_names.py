"""Check of the option names in `resume.allow`."""

from pathlib import Path

from fastpref.cli.options import all_options
from fastpref.config import ResumeConfig
from fastpref.errors import ConfigError
from fastpref.train.opening import names_of_starts
from fastpref.train.resume.differences import unknown_names


def check_resume(resume: ResumeConfig, run_dir: Path | None) -> None:
    """Refuse names in `resume.allow` that no option has or had at an earlier start of the run.

    Args:
        run_dir: Folder of the run to resume; None: a new run, or one not known yet.

    Raises:
        ConfigError: there is no option of that name.
    """
    earlier = names_of_starts(run_dir) if run_dir else ()
    known = [*all_options(), *earlier, "data", "model", "tokenizer"]
    wrong = unknown_names(resume.allow, known)
    if wrong:
        raise ConfigError(f"resume.allow: there is no option {', '.join(wrong)}")
