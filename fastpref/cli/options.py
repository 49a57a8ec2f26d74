"""Records of all options, read from the config dataclasses, and the text of --help."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from fastpref.config import LOSSES, Config, LossConfig

CHOICE_GROUPS = ("model", "loss", "transform", "adapter", "recipe")
"""Groups whose choices are files, configs/<group>/<choice>.yaml."""

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_LIST_KINDS = {str: "a list such as [a,b]", float: "a list such as [0.9,0.95]"}
_MAPPING_KIND = "a mapping such as '{a: b, c: d}'"


@dataclass(kw_only=True)
class Option:
    """One option of the command line."""

    key: str
    """Dotted name, `loss.beta`."""
    type: type
    """int, float, bool or str; of an element if is_list; dict for a mapping."""
    is_list: bool
    """The value is a list, [a,b,...]."""
    is_optional: bool
    """null is allowed."""
    default: object
    """The dataclass default; dataclasses.MISSING if the option is required."""
    doc: str
    """Meaning, unit and range, on one line."""

    @property
    def is_mapping(self) -> bool:
        """The value is a mapping, {a: b, ...}."""
        return self.type is dict

    @property
    def kind(self) -> str:
        """The type in words: "an integer or null"."""
        if self.is_mapping:
            return _MAPPING_KIND
        kind = (_LIST_KINDS if self.is_list else _KINDS)[self.type]
        return f"{kind} or null" if self.is_optional else kind


def list_options(loss: type[LossConfig]) -> dict[str, Option]:
    """Every option of a run with the given loss, by dotted key, in the order of the dataclasses."""
    return {option.key: option for option in _walk(Config, "", loss)}


@cache
def all_options() -> dict[str, Option]:
    """The options of all losses merged, by dotted key."""
    merged: dict[str, Option] = {}
    for loss in LOSSES.values():
        merged |= {k: option for k, option in list_options(loss).items() if k not in merged}
    return merged


def losses_with(key: str) -> list[str]:
    """Names of the losses that have the option `key` (`loss.beta`)."""
    return [name for name, schema in LOSSES.items() if key in list_options(schema)]


def list_choices(config_dir: Path, group: str) -> list[str]:
    """The choices of a group: its file names without suffix, sorted."""
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def _comment(path: Path) -> str:
    """The comment at the top of a choice's file, on one line, without directives (`# @package`)."""
    lines = itertools.takewhile(
        lambda line: line.startswith("# "), path.read_text("utf-8").split("\n")
    )
    return " ".join(line[2:] for line in lines if not line.startswith("# @"))


def _walk(schema: type, prefix: str, loss: type[LossConfig]) -> typing.Iterator[Option]:
    hints = typing.get_type_hints(schema)
    docs = _field_docs(schema)
    for field in dataclasses.fields(schema):
        declared = loss if hints[field.name] is LossConfig else hints[field.name]
        key = prefix + field.name
        if dataclasses.is_dataclass(declared):
            assert isinstance(declared, type)
            yield from _walk(declared, key + ".", loss)
        else:
            yield _option(key, declared, field, docs[field.name])


def _option(key: str, declared: typing.Any, field: dataclasses.Field, doc: str) -> Option:
    is_optional = type(None) in typing.get_args(declared)
    if is_optional:
        declared = next(kind for kind in typing.get_args(declared) if kind is not type(None))
    origin = typing.get_origin(declared)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Option(
        key=key,
        type=typing.get_args(declared)[0] if origin is list else origin or declared,
        is_list=origin is list,
        is_optional=is_optional,
        default=default,
        doc=doc,
    )


@cache
def _field_docs(schema: type) -> dict[str, str]:
    """Field name -> its doc, the string after it in the class body, joined to one line."""
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for field, string in zip(body.body, body.body[1:], strict=False):
            match field, string:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = " ".join(doc.split())
    return docs


WIDEST = 96
"""Maximum line width of the help text in characters: longer lines are hard to read."""


def format_help(config_dir: Path, width: int = WIDEST) -> str:
    """Text of --help: usage, the choices of each group, every option with type, default, meaning.

    Args:
        config_dir: The folder configs/.
        width: Terminal width in characters; usage lines and option names are never wrapped.
    """
    wrap = partial(_wrap, width=max(40, min(width, WIDEST)))
    lines = [
        "Train a causal language model on preferences.",
        "",
        "  python train.py                        train the embedded model on its data",
        "  python train.py KEY=VALUE ...          change options",
        "  python train.py KEY=VALUE ... --cfg    print every option's value and stop",
        "  python train.py --version              print the version",
        "",
        "Choices (a file under configs/ sets several options; options given here win):",
    ]
    for group in CHOICE_GROUPS:
        lines.append("")
        for choice in list_choices(config_dir, group):
            about = _comment(config_dir / group / f"{choice}.yaml")
            lines += wrap(f"{group}={choice}  {about}", 2, hanging=4)
    lines += ["", "Options with their defaults, where no choice above sets another value:"]
    for title, options in _sections():
        lines += ["", *wrap(title, 0), *([""] if options else [])]
        for option in options:
            lines.append(f"  {option.key}={format_value(option.default)}  ({option.kind})")
            lines += wrap(option.doc, 6)
    return "\n".join(lines)


def _sections() -> typing.Iterator[tuple[str, list[Option]]]:
    """Title and options of each help section: the root, each group, each loss."""
    options = list_options(LossConfig).values()
    yield _summary(Config), [option for option in options if "." not in option.key]
    for name, declared in typing.get_type_hints(Config).items():
        if declared is LossConfig:
            for loss, schema in LOSSES.items():
                found = [o for o in _walk(schema, "loss.", schema) if o.key != "loss.name"]
                yield f"loss={loss}: {_summary(schema)}", found
        elif dataclasses.is_dataclass(declared):
            assert isinstance(declared, type)
            yield f"{name}: {_summary(declared)}", list(_walk(declared, name + ".", LossConfig))


def _summary(schema: type) -> str:
    return " ".join((schema.__doc__ or "").split())


def _wrap(text: str, indent: int, width: int, *, hanging: int = 0) -> list[str]:
    """Lines of a paragraph; those after its first are indented by `hanging` more."""
    margin, rest = " " * indent, " " * (indent + hanging)
    return textwrap.wrap(
        text, width, initial_indent=margin, subsequent_indent=rest, break_on_hyphens=False
    )


def format_value(value: object) -> str:
    """A value as typed on the command line; `...` for a required option."""
    if value is dataclasses.MISSING:
        return "..."
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {format_value(item)}' for key, item in value.items())}}}"
    return str(value)
