"""Triton's interpreter, where it is on, without what it does again at every call of a function."""

import os
from functools import cache
from types import ModuleType
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter

    languages = (tl, tl.core)

    @cache
    def languages_of(function: Any) -> list[ModuleType]:
        values = function.__globals__.values()
        return [lang for lang in languages if any(value is lang for value in values)]

    def make_interpreted(function: Any, patch_anew: Any = interpreter._patch_lang) -> Any:
        """Looking for what is to be replaced takes half of a test's time, and within a kernel it
        has been replaced."""
        if any(tl.core.is_builtin(lang.load) for lang in languages_of(function)):
            return patch_anew(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = make_interpreted
