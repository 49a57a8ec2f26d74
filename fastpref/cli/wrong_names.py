"""Error messages for choices and options that do not exist, with what was probably meant."""

from pathlib import Path

from fastpref.checks import hint, nearest
from fastpref.cli.options import Option, all_options, list_choices, losses_with
from fastpref.cli.other_names import NOT_HERE, OTHER_CHOICES, OTHER_NAMES, OTHER_UNITS, UNREAD
from fastpref.config import METHODS


def explain_choice(group: str, choice: str, config_dir: Path) -> str:
    """Error message for an unknown choice such as `loss=tdpoo`: all choices, and the nearest."""
    choices = list_choices(config_dir, group)
    other = OTHER_CHOICES.get(f"{group}={choice.lower()}")
    advice = f"; write {other}" if other else hint(choice, choices)
    if group == "transform" and choice in METHODS:
        advice = f"; write transform.method={choice}"
    if group == "model" and "nearest" not in advice and not other:
        advice = f"; for any other model write model=blank_model model.name_or_path={choice}"
    return f"{group}={choice}: there is no such {group}, only {', '.join(choices)}{advice}"


def explain_key(key: str, text: str, options: dict[str, Option], loss: str) -> str:
    """Error message for an option `key` that a run with `loss` lacks, with a suggestion."""
    group, _, leaf = key.rpartition(".")
    if (loss, key) in UNREAD:
        return (
            f"{key}: loss={loss} has no {leaf}; it had no effect in the repository that listed "
            "it, leave it out"
        )
    if others := losses_with(key):
        return f"{key}: loss={loss} has no {leaf}; it belongs to loss={', '.join(others)}"
    members = [name for name in options if name.startswith(key + ".")]
    if members and key not in OTHER_NAMES:
        is_switch = f"{key}.enabled" in members and text.lower() in ("true", "false")
        advice = f"; write {key}.enabled={text.lower()}" if is_switch else ""
        return f"{key}={text}: {key} is a group of options: {', '.join(members)}{advice}"
    if instead := NOT_HERE.get(leaf.replace("-", "_")):
        return f"{key}: no such option; {instead}"
    meant = guess_option(key, options)
    advice = "; `python train.py --help` lists the options"
    if meant:
        advice = f"; nearest: {meant}{what_counts(leaf, meant)}"
    if other := OTHER_CHOICES.get(f"{leaf.replace('-', '_')}={text}".lower()):
        advice += f"; write {other}"
    if group == "loss":
        return f"{key}: loss={loss} has no option {leaf}{advice}"
    return f"{key}: no such option{advice}"


def guess_option(key: str, options: dict[str, Option]) -> str | None:
    """The option that `key` may have meant, or None.

    Tried in turn: another trainer's name, the last part of the key, the nearest spelling within
    its group, the nearest spelling of any option.
    """
    key = key.replace("-", "_")
    group, _, leaf = key.rpartition(".")
    siblings = [name for name in options if group and name.rpartition(".")[0] == group]
    # options of other losses are included: explain_key explains them if given in full
    by_leaf = {name.rpartition(".")[2]: name for name in [*all_options(), *options]}
    del by_leaf["name"]
    names = by_leaf | OTHER_NAMES | {name: name for name in options}
    spelt = nearest(key, names)
    return (
        OTHER_NAMES.get(key)
        or OTHER_NAMES.get(leaf)
        or by_leaf.get(leaf)
        or nearest(key, siblings)
        or (names[spelt] if spelt else None)
    )


def what_counts(name: str, meant: str) -> str:
    """What the option `meant` counts where another trainer's of about this name counts something
    else, as the end of an error message; "" if they count the same."""
    others = [other for other in OTHER_UNITS if OTHER_NAMES[other] == meant]
    spelt = nearest(name.replace("-", "_"), others)
    return f"; it counts {OTHER_UNITS[spelt]}" if spelt else ""
