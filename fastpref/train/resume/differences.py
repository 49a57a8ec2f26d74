"""Options that differ between two starts of one run, and what each difference does to its
results."""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from fastpref.checks import nearest
from fastpref.config import Config
from fastpref.errors import ConfigError

WITHOUT_EFFECT = (
    *("task", "exp_name", "output_dir", "run_dir", "local_run_dir", "local_dirs", "debug"),
    *("eval_every", "eval_batch_size", "n_eval_examples", "do_first_eval"),
    *("sample_during_eval", "n_eval_model_samples", "minimum_log_interval_secs"),
    *("fsdp_port", "checkpoint", "resume", "parallel", "on_nonfinite", "wandb", "tensorboard"),
    *("weights", "stages", "plan", "data.cache_dir", "data.num_proc", "reference.cache_dir"),
    *("model.save_dtype", "adapter.merge"),
)
"""Options and groups of options that no update depends on."""
ROUNDING = (
    *("trainer", "gradient_accumulation_steps", "activation_checkpointing", "compile", "packing"),
    *("head", "model.attention", "model.liger", "model.reference_dtype", "reference.mode"),
    *("model.block_name", "model.block", "adapter.base"),
)
"""Options of how the numbers are computed: they stay the same up to rounding."""
BY_CONTENT = (
    *("datasets", "base_data_dir", "reverse_dataset", "max_length", "max_prompt_length"),
    *("data.on_error", "data.strict", "data.max_dropped", "data.truncation"),
    *("data.truncation_mode", "data.eos_weight", "data.allow_roles", "data.chat_template"),
    *("data.columns", "data.split_names", "data.config_names", "data.template_kwargs"),
    *("data.test_fraction", "data.deduplicate"),
    *("transform", "model.name_or_path", "model.archive", "model.revision"),
    "model.tokenizer_name_or_path",
)
"""Options of which data or model is read: their contents are compared instead, by fingerprints."""
LENGTH = ("n_epochs", "n_examples")
"""Options of where a run ends: under a schedule that decays to the end they change every rate."""

OF_A_MACHINE = ("base_data_dir", "data.cache_dir", "data.num_proc")
"""Options that may differ between ranks: the rows that are read are compared instead."""


GONE = "no option of this run"
"""Value shown for an option that only the other start's loss or version of fastpref has."""


class Difference(NamedTuple):
    """An option or a fingerprint that has changed."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.before}, is {self.now}"


def list_differences(before: Any, now: Any) -> list[Difference]:
    """Options of two nested configs that differ, with dotted keys.

    An option that `before` lacks, as of an earlier version, counts as its default.
    """
    return _differences(before, now, defaults_of(Config), "")


def defaults_of(schema: type) -> dict[str, Any]:
    """Defaults of a schema's options, as nested dicts; options without one are left out."""
    found: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        if field.default_factory is not MISSING:
            value = field.default_factory()
            found[field.name] = _as_options(value)
        elif field.default is not MISSING:
            found[field.name] = field.default
        elif is_dataclass(hints[field.name]):
            found[field.name] = defaults_of(hints[field.name])
    return found


def _as_options(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _differences(before: Any, now: Any, defaults: Any, prefix: str) -> list[Difference]:
    found: list[Difference] = []
    for key in sorted(before.keys() | now.keys()):
        default = defaults.get(key)
        old, new = before.get(key, default), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = default if isinstance(default, dict) else {}
            found += _differences(old, new, inner, f"{prefix}{key}.")
        elif old != new and key not in now:
            found.append(Difference(prefix + key, old, GONE))
        elif old != new:
            found.append(Difference(prefix + key, old, new))
    return found


def is_among(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of `names`, or in a group that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def effect_of(difference: Difference, schedule: str) -> str:
    """What a difference does to the rest of a run, in words; "" if it changes the results.

    Args:
        schedule: The learning-rate schedule, `optim.schedule`.
    """
    key = difference.key
    if is_among(key, WITHOUT_EFFECT):
        return "no effect on the updates"
    if is_among(key, ROUNDING):
        return "the same numbers up to rounding"
    if is_among(key, BY_CONTENT):
        return "judged by the rows and weights themselves"
    if key in LENGTH and schedule == "constant":
        return "the run ends elsewhere"
    return ""


def may_change_memory(difference: Difference) -> bool:
    """Whether a step may take more or less memory because of a difference."""
    return not is_among(difference.key, (*WITHOUT_EFFECT, *BY_CONTENT, *LENGTH))


def is_of_state(difference: Difference, *, adapted: bool) -> bool:
    """Whether the saved state does not fit a run with the new value, even if that is allowed.

    Args:
        adapted: Whether adapters are trained; their master weights are always float32.
    """
    key, before, now = difference
    if key == "adapter.kind":
        return "none" in (before, now)
    return key == "optimizer" or (key == "model.policy_dtype" and not adapted)


def check_same_options(of_ranks: Sequence[dict[str, Any]]) -> None:
    """Refuse ranks that were started with different options.

    Args:
        of_ranks: All options of each rank, by rank.

    Raises:
        ConfigError: naming the first rank that differs from rank 0, and its options that do.
    """
    for rank, options in enumerate(of_ranks):
        found = list_differences(of_ranks[0], options)
        lines = [
            f"{key}={now}, and rank 0 {key}={before}"
            for key, before, now in found
            if not is_among(key, OF_A_MACHINE)
        ]
        if lines:
            raise ConfigError(f"rank {rank} was started with {'; '.join(lines)}")


def dotted(options: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a nested config, including those of its groups."""
    for key, value in options.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def unknown_names(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names that are neither options nor groups, each with the nearest known one, if any."""
    groups = {key.rpartition(".")[0] for key in known if "." in key}
    usable = sorted({*known, *groups})
    return [
        f"{name} (nearest: {meant})" if (meant := nearest(name, usable)) else name
        for name in names
        if name not in usable
    ]
