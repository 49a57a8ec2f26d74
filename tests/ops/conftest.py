"""Triton's interpreter, where it is on, without what it does again at every call of a function."""

import os
from functools import cache
from types import ModuleType
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter

    @cache
    def languages_of(function: Any) -> list[ModuleType]:
        values = function.__globals__.values()
        return [lang for lang in (tl, tl.core) if any(value is lang for value in values)]

    def patch_once(function: Any, patch: Any = getattr(interpreter, "_patch_lang", None)) -> Any:
        """Looking for what is to be replaced takes half of a test's time, and a function that a
        kernel calls finds it replaced."""
        if any(tl.core.is_builtin(lang.load) for lang in languages_of(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    # private names: another version may do without them
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once
