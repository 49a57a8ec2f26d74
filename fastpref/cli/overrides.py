"""Parse KEY=VALUE arguments into a checked Config, or one message that lists every error.

Hydra composes configs/ for the choices (`loss=dpo`); the values (`loss.beta=0.2`) are then set one
by one, so that every wrong one is reported, with the nearest valid name, before anything is loaded.
"""

import re
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from fastpref.cli.options import (
    CHOICE_GROUPS,
    Option,
    all_options,
    format_value,
    list_choices,
    list_options,
)
from fastpref.cli.other_names import NOT_HERE, OTHER_CHOICES, OTHER_NAMES
from fastpref.cli.wrong_names import explain_choice, explain_key, guess_option, what_counts
from fastpref.config import LOSSES, Config, LossConfig, ModelConfig
from fastpref.config.adapter import ADAPTERS
from fastpref.errors import ConfigError

SHORT = {"resume": "resume.path"}
"""Group names that are shorthands for one of the group's options."""

OWN_CHOICES = ("adapter", "loss", "recipe")
"""Groups that a flag of the same name means; --model names another trainer's model."""

ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,]*?)\s*(?:,|$)""")
"""A list item: in quotes, or up to the next comma; taken literally, without YAML's syntax."""


def read_config(
    arguments: list[str], compose_choices: Callable[[list[str]], DictConfig], config_dir: Path
) -> Config:
    """The configuration that the arguments select; the last value of a repeated key counts.

    Args:
        arguments: KEY=VALUE each. `+KEY=VALUE` and `++KEY=VALUE` mean the same.
        compose_choices: Composes configs/ for choices such as ["loss=dpo"], before any value is
            set.
        config_dir: The folder configs/.

    Raises:
        ConfigError: one line per wrong argument; the first broken rule if all are well-formed.
    """
    pairs, problems = split_arguments(arguments)
    # recipe=null, as in configs/config.yaml, means no recipe: there is no such file
    pairs = {SHORT.get(k, k): text for k, text in pairs.items() if (k, text) != ("recipe", "null")}
    choices = {key: text for key, text in pairs.items() if key in CHOICE_GROUPS}
    wrong_groups = set()
    for group, choice in choices.items():
        if choice not in list_choices(config_dir, group):
            problems.append(explain_choice(group, choice, config_dir))
            wrong_groups.add(group)

    composed = compose_choices([f"{g}={c}" for g, c in choices.items() if g not in wrong_groups])
    loss = OmegaConf.get_type(composed.loss)
    assert loss is not None and issubclass(loss, LossConfig)
    options = list_options(loss)
    for key, text in pairs.items():
        # options of a group whose choice is wrong cannot be judged
        if key not in choices and key.partition(".")[0] not in wrong_groups:
            problem = set_option(composed, options, key, text)
            problems += [problem] if problem else []
    _raise_problems(problems)
    return build_config(composed)


def build_config(composed: DictConfig) -> Config:
    """Convert a composed configuration to its dataclass, checking every rule.

    Raises:
        ConfigError: a required option is missing, or a value breaks a rule.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        _raise_problems([_explain_missing(key) for key in missing])
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    assert isinstance(config, Config)
    return config


def _explain_missing(key: str) -> str:
    option = all_options().get(key)
    # OmegaConf's sign of a missing value, as an item of a list or a value of a mapping
    return f"{key} is required: {option.doc}" if option else f"{key} must not be ???"


def _raise_problems(problems: list[str]) -> None:
    if len(problems) > 1:
        raise ConfigError("\n  ".join([f"{len(problems)} wrong options", *problems]))
    if problems:
        raise ConfigError(problems[0])


def split_arguments(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """KEY=VALUE arguments as {key: text}, in the order of their last occurrences, and one message
    for each other argument."""
    pairs: dict[str, str] = {}
    problems = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.lstrip("+").partition("=")
        if not _is_text(argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            problems.append(
                f"{shown}: has bytes that are no {sys.getfilesystemencoding()}; write it in "
                "that encoding, or set PYTHONUTF8=1 for one that has all characters"
            )
        elif argument.startswith("-"):
            words = [text] * bool(text) if equals else list(takewhile(_is_word, rest))
            rest = rest if equals else rest[len(words) :]
            problems.append(explain_flag(key, words))
        elif argument.startswith("~"):
            problems.append(f"{argument}: an option cannot be removed; give it a value")
        elif not equals or not key:
            problems.append(f"{argument}: options are written KEY=VALUE")
        else:
            # to the end: of a repeated key the last one counts, also against other forms of it
            pairs.pop(key, None)
            pairs[key] = text
    return pairs, problems


def _is_word(argument: str) -> bool:
    """Whether an argument may be a value of the flag before it; negative numbers may."""
    return "=" not in argument and not re.match(r"-(?![\d.])", argument)


def _is_text(argument: str) -> bool:
    """False if bytes are invalid in the locale's encoding: Python keeps them as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def set_option(composed: DictConfig, options: dict[str, Option], key: str, text: str) -> str | None:
    """Set one option from its text; returns an error message, or None.

    Text options take the text literally (`run_dir=/tmp/a=b` needs no quotes; ${KEY} is another
    option's value). Lists are written [a,b], or ['a,b'] for an item with a comma; mappings {a: b}.
    A single entry of a mapping can be set: `data.columns.prompt=question`.
    """
    option = options.get(key)
    group, _, leaf = key.rpartition(".")
    if option is None and group in options and options[group].is_mapping:
        option, key, text = options[group], group, f"{{{leaf}: {text}}}"
    if option is None:
        return explain_key(key, text, options, composed.loss.name)
    try:
        value = _parse_mapping(text) if option.is_mapping else _parse(option, text)
        # keys of a mapping are not in the schema
        OmegaConf.update(composed, key, value, force_add=option.is_mapping)
    # a ValueError too: YAML's own, of a number such as 0x_
    except (ValidationError, YAMLError, ValueError):
        quote = "; a shell leaves it whole in quotes" if option.is_mapping else ""
        return f"{key} must be {option.kind}, got {text}{quote}"
    except OmegaConfBaseException as error:
        return f"{key}={text}: {str(error).splitlines()[0]}"
    return None


def _parse(option: Option, text: str) -> str | list[str] | None:
    """The value before its type is checked: text, list of texts, or None.

    Raises:
        ValidationError: the option is a list and the text is not.
    """
    if text == "null":
        return None
    if not option.is_list:
        return _unquote(text)
    if not re.fullmatch(r"\[.*\]", text.strip()):
        raise ValidationError(text)
    return [_unquote(item) for item in ITEM.findall(text.strip()[1:-1]) if item]


def _parse_mapping(text: str) -> dict[str, Any]:
    """Parse a YAML flow mapping; `{a:b}` without a space after the colon is accepted.

    Raises:
        ValidationError, YAMLError: the text is no mapping.
    """
    if not re.fullmatch(r"\{.*\}", text.strip(), re.DOTALL):
        raise ValidationError(text)
    parsed = _spaced(_read_yaml(text))
    assert isinstance(parsed, dict)
    return parsed


def _read_yaml(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text))


def _spaced(value: Any) -> Any:
    """Parsed YAML, corrected as if a space followed each colon: YAML reads `{a:false}` as a key
    "a:false" without a value."""
    if isinstance(value, list):
        return [_spaced(item) for item in value]
    if not isinstance(value, dict):
        return value
    entries: dict[str, Any] = {}
    for key, item in value.items():
        name, colon, rest = str(key).partition(":")
        is_joined = colon and item is None
        entries[name if is_joined else str(key)] = _spaced(
            _read_yaml(f"{{value: {rest}}}")["value"] if is_joined else item
        )
    return entries


def _unquote(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def explain_flag(flag: str, words: list[str]) -> str:
    """Error message for a flag such as `--learning_rate 0.1`: how to write it as KEY=VALUE.

    Args:
        flag: The flag with its dashes.
        words: Its values; none is what other trainers take for true.
    """
    name, text = flag.lstrip("-").replace("-", "_"), " ".join(words)
    if instead := NOT_HERE.get(name):
        return f"{flag}: no such option; {instead}"
    written = f"{flag}: options are written KEY=VALUE"
    if other := OTHER_CHOICES.get(f"{name}={text or 'true'}".lower()):
        return f"{written}; write {other}"
    options = all_options()
    meant = name if name in (*options, *OWN_CHOICES) else guess_option(name, options)
    option = options.get(meant or "")
    # a mapping option without a mapping as its text is a wrong guess, unless the name is known
    is_guess = option is not None and option.is_mapping and name not in OTHER_NAMES
    if meant is None or (is_guess and not text.startswith("{")):
        return (
            f"{flag}: there are no flags but --help and --cfg (and --version); options are written "
            "KEY=VALUE"
        )
    is_ours = name in (meant, meant.rpartition(".")[2])
    value = _value_of(option, name, words, is_known=is_ours or name in OTHER_NAMES)
    if option is None and not is_ours and value not in ("VALUE", *LOSSES, *ADAPTERS):
        value = None
    counts = "" if is_ours else what_counts(name, meant)
    if value is None:
        return f"{written}; nearest: {meant}{counts}"
    if option and not is_ours and (problem := _problem_with(option, value)):
        return f"{written}; nearest: {meant}{counts}; {problem}"
    return f"{written}; write {meant}={value}{counts}"


def _value_of(option: Option | None, name: str, words: list[str], *, is_known: bool) -> str | None:
    """What follows KEY= for the flag `name`; None if that cannot be said.

    Args:
        option: The option that the flag means; None for a choice such as `loss`.
        words: The values of the flag.
        is_known: Whether the flag has the name of an option, ours or another trainer's.
    """
    is_negated = name.startswith("no_")
    if option and option.type is bool and not words:
        return format_value(not is_negated)
    if is_negated or not (words or is_known):
        return None
    if not words:
        return format_value(option.default) if option else "VALUE"
    if option and option.is_list and not words[0].startswith("["):
        return f"[{','.join(words)}]"
    return " ".join(words)


def _problem_with(option: Option, text: str) -> str | None:
    """Error message for an option's value when all others have their defaults; None for none."""
    loss_name, loss = next(
        (name, loss) for name, loss in LOSSES.items() if option.key in list_options(loss)
    )
    model = ModelConfig(name_or_path="tiny")
    composed = OmegaConf.structured(Config(model=model, loss=loss(name=loss_name)))
    if problem := set_option(composed, list_options(loss), option.key, text):
        return problem
    try:
        build_config(composed)
    except ConfigError as error:
        return str(error)
    return None


def explain_composition(message: str) -> str:
    """Shorten Hydra's message about a file under configs/ to file, key and nearest key."""
    where = re.match(r"In '([^']+)': (?:\w+ raised while.*\n)?(.*)", message)
    if where is None:
        return " ".join(message.split())
    file, what = f"configs/{where[1]}.yaml", where[2]
    key = re.search(r"full_key: (\S+)", message)
    if key is None:
        return f"{file}: {what}"
    if " not in " in what:
        meant = guess_option(key[1], all_options())
        what = "no such option" + (f"; nearest: {meant}" if meant else "")
    return f"{file}: {key[1]}: {what}"
