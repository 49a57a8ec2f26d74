"""Schemas of the option groups `model packing optim head weights`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastpref.checks import (
    as_count,
    as_number,
    check_choice,
    check_number,
    expand_home,
    take_other_name,
)

DTYPES = ("float32", "bfloat16", "float16")
SAVE_DTYPES = ("checkpoint", "float32")
# attention option -> the package that transformers imports for it
FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
ATTENTIONS = ("auto", "eager", "sdpa", "varlen", "flex", *FLASH_PACKAGES)
CUDA_ATTENTIONS = ("varlen", "flex", *FLASH_PACKAGES)
"""Attention back ends that train on CUDA devices only."""
TEMPLATES = ("normal", "harmless", "harmful")


@dataclass(kw_only=True)
class ModelConfig:
    """Which model to train, in which precision."""

    name_or_path: str
    """Hugging Face folder or hub id of the model; `tiny` is the embedded one."""
    tokenizer_name_or_path: str | None = None
    """Folder or hub id of the tokenizer; null: the model's own."""
    archive: str | None = None
    """Weights to start policy and reference from: a Hugging Face folder, a run folder or a
    seed-format policy.pt; null: the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or its tokenizer, for families that transformers
    lacks; it runs with your permissions. false: such a model is refused."""
    block_name: str | None = None
    """Class of the transformer block that FSDP shards by; null: found from the model."""
    block: str | None = None
    """Another name of block_name."""
    policy_dtype: str = "float32"
    """Master dtype of weights and optimizer state: float32, bfloat16 or float16."""
    fsdp_policy_mp: str | None = "bfloat16"
    """Compute dtype, with or without FSDP; null: compute in policy_dtype. A CPU without units for
    16 bits computes in float32 in any case."""
    reference_dtype: str | None = None
    """Dtype in which the reference is stored; it computes in the policy's. null: policy_dtype if
    that has 16 bits; the checkpoint's if that has 16 bits and computation is in float32, which
    changes no result; else the compute dtype."""
    save_dtype: str | None = None
    """Dtype of LATEST: checkpoint, that of the loaded weights; or float32. null: policy_dtype, in
    which they were trained, so that nothing is lost."""
    attention: str = "auto"
    """auto, eager, sdpa, varlen (torch's own), flex, flash_attention_2, flash_attention_3 or
    flash_attention_4; auto takes the fastest of them that computes correctly here."""
    liger: str = "auto"
    """auto, true or false: on a GPU, rotary embeddings and SwiGLU layers by the package
    liger-kernel and RMS norms by torch's fused one; auto takes them where they compute what the
    model's own layers do and blocks are not compiled."""
    router_aux_loss: str = "auto"
    """Coefficient of the loss that spreads the tokens of a mixture of experts evenly over them:
    auto, or a number >= 0. auto: the checkpoint's, 0 where transformers has no such loss for the
    family. It is added to the policy's loss in training; loss/train is without it."""

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype in which policy and reference compute."""
        return self.fsdp_policy_mp or self.policy_dtype

    @property
    def router_coefficient(self) -> float | None:
        """`router_aux_loss` as a number; None for auto."""
        return as_number("model.router_aux_loss", self.router_aux_loss)

    def __post_init__(self) -> None:
        if not self.name_or_path:
            raise ValueError("model.name_or_path must name a folder or hub id, got ''")
        # as of an unset variable of a shell: the run would start from other weights
        if self.archive == "":
            raise ValueError("model.archive must name a folder or a file, or be null, got ''")
        expand_home(self, "name_or_path", "tokenizer_name_or_path", "archive")
        take_other_name(self, "block_name", "block", group="model.")
        for name in ("policy_dtype", "fsdp_policy_mp", "reference_dtype"):
            dtype = getattr(self, name)
            if dtype is not None:
                check_choice(f"model.{name}", dtype, DTYPES)
        if self.save_dtype is not None:
            check_choice("model.save_dtype", self.save_dtype, SAVE_DTYPES)
        check_choice("model.attention", self.attention, ATTENTIONS)
        # true and false arrive as booleans
        self.liger = str(self.liger).lower()
        check_choice("model.liger", self.liger, ("auto", "true", "false"))
        self.router_aux_loss = str(self.router_aux_loss).lower()
        check_number("model.router_aux_loss", self.router_coefficient, ge=0)
        if self.attention in FLASH_PACKAGES and self.compute_dtype == "float32":
            raise ValueError(
                f"model.attention={self.attention} computes in bfloat16 or float16 only, "
                "got float32; set model.fsdp_policy_mp=bfloat16 or model.attention=sdpa"
            )

    def needing_cuda(self) -> tuple[str, str] | None:
        """An option that needs a CUDA device as set, and a value that does not; None if none."""
        if self.attention in CUDA_ATTENTIONS:
            return f"model.attention={self.attention}", "model.attention=sdpa"
        return ("model.liger=true", "model.liger=auto") if self.liger == "true" else None

    def check_installed(self) -> None:
        """Refuse an attention whose package is not installed.

        Raises:
            ValueError: naming the package.
        """
        package = FLASH_PACKAGES.get(self.attention)
        if package is not None and not _is_installed(package):
            raise ValueError(
                f"model.attention={self.attention} needs the package {package}, "
                "which is not installed; set model.attention=sdpa"
            )


@dataclass(kw_only=True)
class PackingConfig:
    """Sequences one after another in one row, without padding, equal prompts computed once."""

    enabled: bool = True
    """false: right-padded rows, which are also used for a model that cannot be packed."""
    share_prompt: str = "auto"
    """auto: compute a shared prompt, and a shared beginning of its responses, only once, if the
    model's attention can. true: refuse a model that cannot. false: compute each sequence whole."""
    max_tokens: str = "auto"
    """Most tokens that a process computes at once: auto, or a number >= 1. A step with more tokens
    takes more micro-batches, to the same update; a pair with more tokens than this is computed
    alone. auto: what memory holds, up to 32,768 on a GPU and 2,048 on a CPU."""

    @property
    def token_limit(self) -> int | None:
        """`max_tokens` as a number; None for auto."""
        return as_count("packing.max_tokens", self.max_tokens)

    def __post_init__(self) -> None:
        # true and false arrive as booleans
        self.share_prompt = str(self.share_prompt).lower()
        check_choice("packing.share_prompt", self.share_prompt, ("auto", "true", "false"))
        # numbers arrive as numbers
        self.max_tokens = str(self.max_tokens).lower()
        check_number("packing.max_tokens", self.token_limit, ge=1)
        if self.share_prompt == "true" and not self.enabled:
            raise ValueError(
                "packing.share_prompt=true needs packing.enabled=true, got false: padded rows "
                "have a copy of the prompt each"
            )


@dataclass(kw_only=True)
class OptimConfig:
    """Learning-rate schedule, and arguments of the optimizer class; null is torch's default."""

    schedule: str = "constant"
    """After warm-up: constant, or cosine or linear down to min_lr_ratio * lr at the last step."""
    min_lr_ratio: float = 0.0
    """Final learning rate of cosine and linear as a share of lr, in [0, 1]."""
    weight_decay: float | None = None
    """Weight decay, >= 0."""
    betas: list[float] | None = None
    """Two decay rates of the Adam family, each in [0, 1)."""
    eps: float | None = None
    """Added to the denominator, > 0, which is otherwise 0 if all gradients of a weight were 0."""
    momentum: float | None = None
    """Momentum of SGD and RMSprop, in [0, 1)."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of the optimizer's constructor; None is torch's default."""
        names = ("weight_decay", "betas", "eps", "momentum")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        check_choice("optim.schedule", self.schedule, ("constant", "cosine", "linear"))
        check_number("optim.min_lr_ratio", self.min_lr_ratio, ge=0, le=1)
        check_number("optim.weight_decay", self.weight_decay, ge=0)
        check_number("optim.eps", self.eps, gt=0)
        # smaller values are 0 in an optimizer that computes in float32
        check_number("optim.eps", self.eps, ge=2.0**-126)
        check_number("optim.momentum", self.momentum, ge=0, lt=1)
        if self.betas is not None:
            if len(self.betas) != 2:
                raise ValueError(f"optim.betas must be two numbers, got {list(self.betas)}")
            for beta in self.betas:
                check_number("optim.betas", beta, ge=0, lt=1)


@dataclass(kw_only=True)
class HeadConfig:
    """The fused LM head."""

    workspace_mib: str = "auto"
    """Largest temporary memory of the head's loss computation, MiB: auto, or a number >= 1. auto: a
    sixteenth of a GPU's memory, 1,024 at least; 1,024 on a CPU. It changes results by rounding
    only."""

    @property
    def workspace_limit(self) -> int | None:
        """`workspace_mib` as a number; None for auto."""
        return as_count("head.workspace_mib", self.workspace_mib)

    def __post_init__(self) -> None:
        self.workspace_mib = str(self.workspace_mib).lower()
        # the ops' own bound: the number of bytes must fit in 64 bits
        check_number("head.workspace_mib", self.workspace_limit, ge=1, le=2**42)


def _same_folder(first: str | None, second: str | None) -> bool:
    return bool(first and second and Path(first).resolve() == Path(second).resolve())


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    # raised for a dotted name whose parent package is missing
    except ModuleNotFoundError:
        return False


@dataclass(kw_only=True)
class WeightsConfig:
    """task=estimate_weights: token weights for TIS-DPO from two models.

    Computed in the model's compute dtype, but in float32 on a CPU without bfloat16 units: that is
    faster there, and more exact."""

    positive: str | None = None
    """The model that prefers the chosen responses: anything that model.name_or_path takes, or a
    seed-format policy.pt for the architecture of model.name_or_path. Required by the task."""
    negative: str | None = None
    """The model that prefers the rejected ones, named in the same way. Required by the task."""
    output_dir: str | None = None
    """Weighted rows go to <output_dir>/<name>/<split>.jsonl. Required by the task."""
    suffix: str = ""
    """Appended to the dataset's name in output_dir."""
    batch_size: int | None = None
    """Rows scored at once by each process, >= 1; null: packed rows up to packing.max_tokens tokens
    (auto: 8,192 on a GPU, 2,048 on a CPU), padded ones 4 at a time."""
    shard_rows: int = 256
    """Rows between two saves, >= 1: an interruption loses no more."""
    round: int | None = None
    """Decimals that weights are rounded to, >= 0, 2 in the TIS-DPO code; null: not rounded."""
    include_eos: bool = False
    """Give the end-of-sequence token a weight as well, the last one of each list."""
    positive_template: str = "normal"
    """What the positive model reads besides the prompt: normal (nothing), harmless, harmful (texts
    of ours), or a text. It becomes the system message, or stands before a prompt that is a text; if
    it contains {prompt}, it is put around the user's message."""
    negative_template: str = "normal"
    """The same for the negative model."""

    def __post_init__(self) -> None:
        expand_home(self, "positive", "negative", "output_dir")
        check_number("weights.batch_size", self.batch_size, ge=1)
        check_number("weights.shard_rows", self.shard_rows, ge=1)
        check_number("weights.round", self.round, ge=0)
        for name in ("positive_template", "negative_template"):
            template = getattr(self, name)
            # a text has several words: a single one is a misspelt name
            if "{prompt}" not in template and len(template.split()) < 2:
                check_choice(f"weights.{name}", template, TEMPLATES)

    def check_task(self, base_data_dir: str | None) -> None:
        """Check what only task=estimate_weights requires."""
        for name in ("positive", "negative", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"weights.{name} is required by task=estimate_weights")
        if (self.positive, self.positive_template) == (self.negative, self.negative_template):
            raise ValueError(
                "weights.positive and weights.negative must differ in model or template, got "
                f"{self.positive!r} twice: every weight would be 0"
            )
        if not self.suffix and _same_folder(self.output_dir, base_data_dir):
            raise ValueError(
                f"weights.output_dir must not be base_data_dir ({base_data_dir}) without "
                "weights.suffix: the rows read would be overwritten"
            )

    def check_names(self, datasets: Sequence[str]) -> None:
        """Refuse dataset names whose weights would be written outside of `output_dir`."""
        for name in datasets:
            path = Path(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(
                    f"datasets: {name} is a path, and its weights would lie outside of "
                    f"weights.output_dir; set datasets=[{path.name}], and base_data_dir to the "
                    "folder that holds it"
                )
