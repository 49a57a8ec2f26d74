"""Triton's interpreter, where it is on, without what it does again at every call of a function."""

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any


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


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    # private names: another version may do without them
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patching_once(interpreter, interpreter._patch_lang)
