"""Schema of the group `adapter`: low-rank adapters trained on a frozen model."""

from dataclasses import dataclass
from importlib.util import find_spec

from fastpref.checks import check_choice, check_number

ADAPTERS = ("none", "lora", "qlora")
INITS = ("kaiming", "gaussian")
"""Inits that leave the model unchanged until the first update."""
CHANGING_INITS = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga", "mica", "orthogonal")
"""Other inits of peft: they change the base, or the adapters do not start at exactly zero."""
ALL_LINEAR = "all-linear"
"""peft's name for all linear layers."""
BASES = ("auto", "replicated", "sharded")


@dataclass(kw_only=True)
class AdapterConfig:
    """Low-rank matrices trained on a frozen model (LoRA, arXiv:2106.09685).

    The reference is the same model without them, or with the adapters that it came with, so there
    is one model in memory. They are trained in float32, whatever the model computes in.
    """

    kind: str = "none"
    """Set by adapter=NAME. none: train all weights of the model. lora: low-rank adapters. qlora:
    the same with the frozen linear layers in 4 bits, on a GPU."""
    r: int | None = None
    """Rank, >= 1; null: 16, or that of the adapter that the model comes with."""
    alpha: float | None = None
    """The adapters' product is multiplied by alpha/r, > 0; null: twice the rank, or that of the
    adapter that the model comes with."""
    use_rslora: bool = False
    """Multiply by alpha/sqrt(r) instead (arXiv:2312.03732)."""
    dropout: float = 0.0
    """Dropout of an adapter's input in training, in [0, 1). Above 0, policy and reference differ
    from the first step on."""
    target_modules: list[str] | None = None
    """Ends of the names of linear layers, such as [q_proj,v_proj]; null or [all-linear]: all in the
    transformer blocks, and all experts."""
    target_parameters: list[str] | None = None
    """Ends of the names of matrices that are not layers of their own, such as a mixture's
    [experts.gate_up_proj]; null: none, if target_modules is given."""
    init: str = "kaiming"
    """First values of matrix A: kaiming or gaussian. Matrix B starts at zero."""
    ensure_weight_tying: bool = False
    """Train one adapter for an embedding and the head that is tied to it."""
    base: str = "auto"
    """With several processes: replicated, each has the whole frozen model; sharded, by FSDP.
    auto: replicated if that takes at most half of a device's memory."""
    merge: bool = False
    """Also write LATEST-merged, the model with the adapters in its weights."""

    @property
    def trained(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.kind != "none"

    @property
    def quantized(self) -> bool:
        """Whether the frozen model's layers are in 4 bits."""
        return self.kind == "qlora"

    def check_installed(self) -> None:
        """Refuse 4-bit layers if the package that computes them is not installed.

        Raises:
            ValueError: naming the package.
        """
        if self.quantized and find_spec("bitsandbytes") is None:
            raise ValueError(
                "adapter=qlora needs the package bitsandbytes: pip install bitsandbytes"
            )

    def __post_init__(self) -> None:
        check_choice("adapter", self.kind, ADAPTERS)
        # far beyond any model's width, where a rank is no longer low
        check_number("adapter.r", self.r, ge=1, le=2**20)
        check_number("adapter.alpha", self.alpha, gt=0)
        check_number("adapter.dropout", self.dropout, ge=0, lt=1)
        check_choice("adapter.base", self.base, BASES)
        if self.quantized and self.base == "sharded":
            raise ValueError(
                "adapter.base=sharded: layers in 4 bits cannot be sharded; leave it out with "
                "adapter=qlora, or choose adapter=lora"
            )
        if self.init in CHANGING_INITS:
            raise ValueError(
                f"adapter.init={self.init} would start with another model than its reference; "
                f"choose {' or '.join(INITS)}"
            )
        check_choice("adapter.init", self.init, INITS)
        if self.target_modules == [ALL_LINEAR]:
            self.target_modules = None
        for name in ("target_modules", "target_parameters"):
            targets = getattr(self, name)
            if targets is not None and not (targets and all(targets)):
                raise ValueError(f"adapter.{name} must name at least one, got {list(targets)}")
