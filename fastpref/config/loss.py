"""Schemas of the groups `loss` and `transform`, the transform of token weights."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from fastpref.checks import TIES, check_choice, check_number


class LossNeeds(NamedTuple):
    """What a loss needs besides the policy's log-probabilities."""

    pairs: bool = True
    """Chosen and rejected responses; False: one response, the SFT target."""
    reference: bool = True
    """The reference's log-probabilities."""
    weights: bool = False
    """Token weights, which multiply log-ratios and KL."""
    kl: str | None = None
    """Direction of the KL of every token, as in `token_logps_and_kl`; None: no KL."""
    metrics_kl: str | None = None
    """Direction of a KL that only some metrics report; the loss itself has none."""


@dataclass(kw_only=True)
class LossConfig:
    """Options of every loss; each loss is a subclass, so another loss's option is an error."""

    name: str
    """Name of the loss: set by loss=NAME, not an option of its own."""

    def __init_subclass__(cls) -> None:
        # a case of build_objective for one loss would match a subclass of it too
        if cls.__base__ is not LossConfig:
            raise TypeError(
                f"{cls.__name__} must derive from LossConfig alone, got {cls.__bases__}"
            )

    @property
    def needs(self) -> LossNeeds:
        """What the loss needs from data and models."""
        return LossNeeds()

    @property
    def held_out_names(self) -> list[str]:
        """Names in metrics.jsonl of the held-out metrics that this loss gives."""
        needs, pair = self.needs, ("chosen", "rejected")
        names = ["loss/eval", "logps_eval/chosen"]
        if needs.pairs:
            names += ["logps_eval/rejected", *(f"rewards_eval/{name}" for name in pair)]
            names += ["rewards_eval/accuracies", "rewards_eval/margins"]
        if needs.kl is not None:
            names += [f"kl_eval/{name}" for name in (*pair, "margin")]
        if needs.weights:
            names += [f"logps_eval/{name}_unweighted" for name in pair]
        return names

    def __post_init__(self) -> None:
        if LOSSES.get(self.name) is not type(self):
            raise ValueError(
                f"loss.name={self.name} does not fit {type(self).__name__}; choose the loss by "
                "loss=NAME"
            )
        for name, bounds in LOSS_BOUNDS.items():
            check_number(f"loss.{name}", getattr(self, name, None), **bounds)


@dataclass(kw_only=True)
class SFTConfig(LossConfig):
    """Supervised fine-tuning: -log p(response | prompt), summed over tokens."""

    name: str = "sft"

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(pairs=False, reference=False)


@dataclass(kw_only=True)
class DPOConfig(LossConfig):
    """Direct preference optimization (arXiv:2305.18290); label_smoothing > 0 is cDPO."""

    name: str = "dpo"
    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    label_smoothing: float = 0.0
    """Probability that a pair is mislabelled, in [0, 0.5)."""
    reference_free: bool = False
    """Leave the reference out of the loss (the logged rewards still use it)."""
    token_level: bool = False
    """Multiply each token's log-probability by its token weight in the row."""

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(weights=self.token_level)


@dataclass(kw_only=True)
class IPOConfig(LossConfig):
    """Identity preference optimization (arXiv:2310.12036) on summed log-probabilities."""

    name: str = "ipo"
    beta: float = 0.1
    """Regularisation: the margin of log-ratios is pulled to 1/(2 beta) nats, > 0."""


@dataclass(kw_only=True)
class SimPOConfig(LossConfig):
    """Simple preference optimization (arXiv:2405.14734): means over tokens, no reference."""

    name: str = "simpo"
    beta: float = 2.0
    """Scale of the mean log-probability of a response's tokens, > 0; 2 to 10 in the paper."""
    gamma: float = 1.0
    """Target margin of the chosen reward over the rejected one, >= 0; 0.3 to 5 in the paper."""

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(reference=False)


@dataclass(kw_only=True)
class TDPOConfig(LossConfig):
    """Token-level DPO with KL(reference || policy) terms (arXiv:2404.11999)."""

    name: str = "tdpo"
    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    alpha: float = 0.5
    """Weight of the KL difference in TDPO2, >= 0; TDPO1 does not use it."""
    if_tdpo2: bool = True
    """true: TDPO2 (the chosen KL is detached). false: TDPO1."""
    kl_metrics_every: int = 10
    """TDPO1: optimizer steps between metrics lines with KL and log-probabilities, >= 1. The loss
    does not need them, and they cost half as many operations again in the head."""

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(kl="reference_policy")


@dataclass(kw_only=True)
class TISDPOConfig(LossConfig):
    """Token-level importance-sampling DPO on estimated token weights (arXiv:2410.04350)."""

    name: str = "tisdpo"
    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    alpha: float = 0.5
    """Weight of the KL(policy || reference) difference, >= 0; used with token_level=true."""
    token_level: bool = False
    """Add the weighted KL term. Token weights multiply the log-ratios either way."""
    kl_metrics_every: int = 10
    """Without token_level: optimizer steps between metrics lines with KL, >= 1. The loss does not
    need it, and it may take further passes over the vocabulary."""

    @property
    def needs(self) -> LossNeeds:
        direction = "policy_reference"
        if self.token_level:
            return LossNeeds(weights=True, kl=direction)
        return LossNeeds(weights=True, metrics_kl=direction)


LOSS_BOUNDS: dict[str, dict[str, float]] = {
    "beta": {"gt": 0},
    "label_smoothing": {"ge": 0, "lt": 0.5},
    "alpha": {"ge": 0},
    "gamma": {"ge": 0},
    "kl_metrics_every": {"ge": 1},
}
"""Bounds of the losses' options, by name; they hold in every loss that has the option."""
LOSSES: dict[str, type[LossConfig]] = {
    vars(loss)["name"]: loss for loss in LossConfig.__subclasses__()
}
"""Loss schemas by the NAME of loss=NAME, in the order of the classes above."""


def _check_ordered(prefix: str, block: object, low: str, high: str) -> None:
    """Both bounds finite and low < high: equal bounds divide by zero or silence the weights."""
    for name in (low, high):
        check_number(f"{prefix}.{name}", getattr(block, name))
    if not getattr(block, low) < getattr(block, high):
        raise ValueError(
            f"{prefix}.{low} must be < {prefix}.{high}, "
            f"got {getattr(block, low)} and {getattr(block, high)}"
        )


@dataclass(kw_only=True)
class BinaryTransform:
    """1 for the largest weights of a response, 0 for the rest."""

    top_percent: float = 100.0
    """Share of the tokens that get 1, percent, in (0, 100]."""
    ties: str = "seed"
    """A value tied across the cut gets 0 (seed, as in the TIS-DPO code) or 1 (equal)."""

    def __post_init__(self) -> None:
        check_number("transform.binary.top_percent", self.top_percent, gt=0, le=100)
        check_choice("transform.binary.ties", self.ties, TIES)


@dataclass(kw_only=True)
class ThresholdTransform:
    """Clip to [lower_threshold, upper_threshold]."""

    upper_threshold: float = 1.0
    """Largest weight, nats."""
    lower_threshold: float = -1.0
    """Smallest weight, nats, < upper_threshold."""

    def __post_init__(self) -> None:
        _check_ordered("transform.threshold", self, "lower_threshold", "upper_threshold")


@dataclass(kw_only=True)
class ThresholdAndScaleTransform:
    """Clip to [min_val, max_val], then map that range linearly to [min_scale, max_scale]."""

    min_val: float = -1.5
    """Smallest weight before scaling, nats."""
    max_val: float = 1.5
    """Largest weight before scaling, nats, > min_val."""
    min_scale: float = 0.7
    """Weight that min_val becomes."""
    max_scale: float = 1.3
    """Weight that max_val becomes, > min_scale."""

    def __post_init__(self) -> None:
        _check_ordered("transform.threshold_and_scale", self, "min_val", "max_val")
        _check_ordered("transform.threshold_and_scale", self, "min_scale", "max_scale")


@dataclass(kw_only=True)
class RandomTransform:
    """Uniform in [min_val, max_val] whatever the weight: the ablation."""

    min_val: float = 0.7
    """Smallest weight drawn."""
    max_val: float = 1.3
    """Largest weight drawn, > min_val."""

    def __post_init__(self) -> None:
        _check_ordered("transform.random", self, "min_val", "max_val")


@dataclass(kw_only=True)
class RankBasedTransform:
    """The rank of a token in its response, spread over [min_scale, max_scale]."""

    min_scale: float = 0.7
    """Weight of the lowest rank."""
    max_scale: float = 1.3
    """Weight of the highest rank, > min_scale."""
    ties: str = "seed"
    """Equal values are ranked by position (seed, as in the TIS-DPO code) or get the mean of their
    ranks (equal)."""

    def __post_init__(self) -> None:
        _check_ordered("transform.rank_based", self, "min_scale", "max_scale")
        check_choice("transform.rank_based.ties", self.ties, TIES)


@dataclass(kw_only=True)
class PaperTransform:
    """k exp(clamp(w, L, U)) of the sign-corrected log-ratio w (arXiv:2410.04350)."""

    k: float = 1.0
    """Factor of every weight, > 0."""
    L: float = -0.5
    """Smallest log-ratio, nats."""
    U: float = 1.5
    """Largest log-ratio, nats, > L."""

    def __post_init__(self) -> None:
        check_number("transform.paper.k", self.k, gt=0)
        _check_ordered("transform.paper", self, "L", "U")


METHODS = ("origin", "binary", "threshold", "threshold_and_scale", "random", "rank_based", "paper")


@dataclass(kw_only=True)
class TransformConfig:
    """How a file's token weights become the weights of the loss, per response."""

    method: str = "binary"
    """origin, binary, threshold, threshold_and_scale, random, rank_based or paper; only the block
    of that name is used. binary at 100 percent makes every weight 1."""
    binary: BinaryTransform = field(default_factory=BinaryTransform)
    """Options of method binary."""
    threshold: ThresholdTransform = field(default_factory=ThresholdTransform)
    """Options of method threshold."""
    threshold_and_scale: ThresholdAndScaleTransform = field(
        default_factory=ThresholdAndScaleTransform
    )
    """Options of method threshold_and_scale."""
    random: RandomTransform = field(default_factory=RandomTransform)
    """Options of method random."""
    rank_based: RankBasedTransform = field(default_factory=RankBasedTransform)
    """Options of method rank_based."""
    paper: PaperTransform = field(default_factory=PaperTransform)
    """Options of method paper."""

    def __post_init__(self) -> None:
        check_choice("transform.method", self.method, METHODS)

    def params(self) -> dict[str, Any]:
        """The chosen method's parameters by name; {} for `origin`, no `ties` if that is seed."""
        params = {} if self.method == "origin" else asdict(getattr(self, self.method))
        if params.get("ties") == "seed":
            del params["ties"]
        return params

    def label(self) -> str:
        """Method and parameters as the TIS-DPO repository writes them into a run's name."""
        params = self.params()
        # an option that the repository lacks is marked if it is used
        ending = "_ties" if params.pop("ties", None) else ""
        if self.method == "binary":
            return f"binary{self.binary.top_percent:g}{ending}"
        # the repository names the scale, not the clipping bounds
        if self.method == "threshold_and_scale":
            params = {name: params[name] for name in ("min_scale", "max_scale")}
        return self.method + "_".join(str(value) for value in params.values()) + ending
