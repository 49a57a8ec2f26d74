"""Triton's interpreter, where it is on, without what it does again at every call of a function."""

import os
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

import numpy as np


def patching_once(interpreter: ModuleType, patch: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's way of replacing Triton's language by itself, without the search that
    takes a third of a test's time: where a kernel calls a function, the language is replaced."""
    tl = interpreter.tl

    @cache
    def languages_of(function: Any) -> list[ModuleType]:
        values = function.__globals__.values()
        return [lang for lang in (tl, tl.core) if any(value is lang for value in values)]

    def patch_once(function: Any) -> Any:
        if any(tl.core.is_builtin(lang.load) for lang in languages_of(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    return patch_once


def made_once(init: Callable[..., None], key: Callable[..., Any], own: tuple[str, ...]) -> Any:
    """A class's `__init__` where all that it sets but `own`, its arguments, follows from a key."""
    made: dict[Any, dict[str, Any]] = {}

    @wraps(init)
    def init_once(self: Any, *args: Any) -> None:
        of_key = key(*args)
        if of_key not in made:
            init(self, *args)
            made[of_key] = dict(vars(self))
        vars(self).update(made[of_key], **dict(zip(own, args, strict=False)))

    return init_once


def types_once(core: ModuleType) -> None:
    """Types of blocks, and what a tensor has of its type: half of a test's time."""
    block_type, tensor = core.block_type, core.tensor
    block_type.__init__ = made_once(
        block_type.__init__,
        lambda element_ty, shape: (element_ty.name, *(getattr(d, "value", d) for d in shape)),
        own=("element_ty",),
    )
    tensor.__init__ = made_once(tensor.__init__, lambda _, type: type.name, own=("handle", "type"))


def of_one_type_at_once(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Operands of one type are what they are, without a comparison of their shapes."""

    @wraps(broadcast)
    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.type.name == rhs.type.name else broadcast(self, lhs, rhs)

    return broadcast_others


def by_name(numpy_type_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Without a table of all types at every look into it."""
    found: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = numpy_type_of(dtype)
        return found[dtype.name]

    return numpy_type


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    types_once(core)
    TritonSemantic.broadcast_impl_value = of_one_type_at_once(TritonSemantic.broadcast_impl_value)
    # Triton 3.6 takes what is no number for the larger one, a GPU the other
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(
        lhs, rhs, np.fmax
    )
    # private names: another version may do without them
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        # every sum of integers once more in 64 bits, for an assertion that only debug looks at
        object.__setattr__(options, "sanitize_overflow", False)
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patching_once(interpreter, interpreter._patch_lang)
