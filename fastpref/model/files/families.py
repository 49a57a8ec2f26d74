"""The class to load a checkpoint with; of a multimodal model, only the part that reads text.

A multimodal checkpoint is a wrapper around a language model: a decoder with its embedding and its
head, and beside them towers and projectors for images or audio. Text never passes through those, so
they are not built, and their weights not read: the class is the wrapper's own, with its weight
names, ties and arithmetic, but its instances lack the other parts. An export copies the weights of
these from the source's files.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from fastpref.model.files.paths import ModelSource

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Keys of `auto_map` under which a folder's own code may name its model class."""


def is_wrapper(config: Any) -> bool:
    """Whether a config describes a language model inside a multimodal wrapper."""
    return config.get_text_config() is not config


def has_family(config: Any) -> bool:
    """Whether a class that reads text is known, from transformers or the folder's own code.

    Args:
        config: Of transformers, or of the folder's code, which is only loaded where it may run.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return any(type(config) in mapping for mapping in mappings) or _own_class(config) is not None


def code_options(config: Any, source: ModelSource) -> dict[str, Any]:
    """Options with which `from_config` may run the folder's own code, and only that of the weights'
    revision.
    """
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    own = _own_class(config) if source.trust_remote_code else None
    # code of another repository has revisions of its own; a loaded class is registered already
    is_new = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    if own is not None and source.revision and is_new and "--" not in config.auto_map[own]:
        options["code_revision"] = source.revision
    return options


def find_family(config: Any, source: ModelSource) -> Any:
    """The class to build or load a model with: one of the family, or an auto class of transformers.

    Args:
        config: Of a model for which `has_family` holds.
        source: The model, and whether its code may run.
    """
    own = _own_class(config) if source.trust_remote_code else None
    if own is not None and is_wrapper(config):
        code = get_class_from_dynamic_module(
            config.auto_map[own], config.name_or_path, revision=source.revision
        )
        return text_part(code)
    wrapper = _class_in(MODEL_FOR_MULTIMODAL_LM_MAPPING, config)
    causal = _class_in(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    is_text_alone = causal is not None and causal.__name__ in (config.architectures or ())
    if own is not None or wrapper is None or (causal is not None and not is_wrapper(config)):
        return AutoModelForCausalLM
    # the text-only class saved the weights, under its own names
    if is_text_alone and causal is not wrapper:
        return AutoModelForCausalLM
    return text_part(wrapper)


def _own_class(config: Any) -> str | None:
    """The first of `AUTO_CLASSES` that the folder of a config has code for."""
    given = getattr(config, "auto_map", None) or {}
    return next((name for name in AUTO_CLASSES if name in given), None)


def _class_in(mapping: Any, config: Any) -> Any:
    """The class that a mapping has for a config, None if it has none."""
    classes = mapping.get(type(config), None)
    if not isinstance(classes, list | tuple):
        return classes
    named = [known for known in classes if known.__name__ in (config.architectures or ())]
    return (named or list(classes))[0]


@cache
def text_part(family: Any) -> Any:
    """A subclass of a wrapper's class, whose instances only have the modules that compute text."""

    class TextPart(family):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self._other_parts = _drop_other_parts(self)
            # the files have weights of these, some without the prefix of the base model
            prefix = f"{self.base_model_prefix}."
            stems = [re.escape(name.removeprefix(prefix)) for name in self._other_parts]
            ignored = {rf"(^|\.){stem}(\.|$)" for stem in stems}
            self._keys_to_ignore_on_load_unexpected |= ignored
            inner = _inner_language_model(self)
            if inner is not None:
                self.forward = inner.forward

        @classmethod
        def from_config(
            cls,
            config: Any,
            *,
            trust_remote_code: bool = False,
            code_revision: str | None = None,
            **options: Any,
        ) -> Any:
            return cls._from_config(config, **options)

        def get_output_embeddings(self) -> Any:
            own = super().get_output_embeddings()
            # some wrappers do not return the head of their language model
            inner = (model.get_output_embeddings() for model in _inner_models(self))
            return next((head for head in inner if head is not None), None) if own is None else own

        def set_attn_implementation(self, attn_implementation: Any, **options: Any) -> None:
            # the other parts have no module that could be asked
            parts, text = self.config.sub_configs, self.config.get_text_config()
            names = [name for name in parts if getattr(self.config, name) is text]
            wish = attn_implementation
            if names:
                wish = dict.fromkeys(("", *names), attn_implementation)
            super().set_attn_implementation(wish, **options)

    # messages, saved configs and transformers' lookup tables use these names
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(TextPart, name, getattr(family, name))
    return TextPart


def other_parts(model: Any) -> tuple[str, ...]:
    """Names of the modules and parameters that were removed from a wrapper; () for other models."""
    return getattr(model, "_other_parts", ())


def _drop_other_parts(model: Any) -> tuple[str, ...]:
    """Reduce a wrapper to its decoder, embedding and head, in place; returns the names of removed
    modules that have parameters, and of removed single parameters."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {
        inner
        for module in (model.get_decoder(), *tables)
        if module is not None
        for inner in module.modules()
    }
    around = {module for module in model.modules() if kept.intersection(module.modules())} - kept
    dropped = []
    for path, module in list(model.named_modules()):
        if module not in around:
            continue
        others = [
            name
            for name, child in module.named_children()
            if child not in around and child not in kept and any(True for _ in child.parameters())
        ]
        tensors = {name: own for name, own in module._parameters.items() if own is not None}
        for name in (*others, *tensors):
            delattr(module, name)
            dropped.append(f"{path}.{name}" if path else name)
        for name, own in tensors.items():
            # the initialization of weights accesses it
            setattr(module, name, torch.empty_like(own, device="meta", requires_grad=False))
    return tuple(dropped)


def _inner_language_model(model: Any) -> nn.Module | None:
    """The causal LM inside a wrapper, if it has the head, so that text can bypass the wrapper.

    Llama 4's wrapper, for example, fails after computing logits in some versions of transformers.
    """
    head = model.get_output_embeddings()
    inner = (module for module in _inner_models(model) if head is not None)
    return next((module for module in inner if module.get_output_embeddings() is head), None)


def _inner_models(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel))
