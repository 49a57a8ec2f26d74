"""TIS-DPO token weights: from the log-ratios in a data file to one weight per response token."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastpref.checks import check_choice


def transform_weights(weights: Sequence[float], method: str, **params: Any) -> list[float]:
    """Turn the sign-corrected log-ratios of one response into token weights (TIS-DPO).

        origin                w
        binary                1 for the top int(n · top_percent / 100) values, else 0; a value
                              tied across that cut gets 0 everywhere
        threshold             clamp(w, lower_threshold, upper_threshold)
        threshold_and_scale   clamp(w, min_val, max_val), mapped onto [min_scale, max_scale]
        random                uniform in [min_val, max_val], whatever w is
        rank_based            ascending stable rank i of n: min_scale + i / (n - 1) · range;
                              1 if n = 1
        paper                 k · exp(clamp(w, L, U)) (arXiv:2410.04350)

    Args:
        weights: One finite value per response token without EOS: +log(π⁺/π⁻) of a chosen
            response, -log(π⁺/π⁻) of a rejected one, in nats.
        method: One of the names above.
        params: The method's own parameters, by the names above. `random` also takes
            `rng: random.Random`; without it the global generator of `random` is drawn from.

    Returns:
        As many weights as came in.

    Raises:
        ValueError: unknown method, or bounds that are reversed or divide by zero.
    """
    check_choice("transform.method", method, TRANSFORMS)
    return TRANSFORMS[method](weights, **params)


def _origin(weights: Sequence[float]) -> list[float]:
    return [float(weight) for weight in weights]


def _binary(weights: Sequence[float], top_percent: float = 100) -> list[float]:
    num_kept = int(len(weights) * top_percent / 100)
    if num_kept >= len(weights):
        return [1.0] * len(weights)
    highest_left_out = sorted(weights, reverse=True)[num_kept]
    return [1.0 if weight > highest_left_out else 0.0 for weight in weights]


def _threshold(
    weights: Sequence[float], upper_threshold: float = 1.0, lower_threshold: float = -1.0
) -> list[float]:
    _check_bounds(
        "threshold", "lower_threshold", lower_threshold, "upper_threshold", upper_threshold
    )
    return [float(min(max(weight, lower_threshold), upper_threshold)) for weight in weights]


def _threshold_and_scale(
    weights: Sequence[float],
    min_val: float = -1.5,
    max_val: float = 1.5,
    min_scale: float = 0.7,
    max_scale: float = 1.3,
) -> list[float]:
    _check_bounds("threshold_and_scale", "min_val", min_val, "max_val", max_val)
    if min_val == max_val:
        raise ValueError(
            f"transform.threshold_and_scale: min_val must be < max_val, both are {min_val}"
        )
    slope = (max_scale - min_scale) / (max_val - min_val)
    return [min_scale + (min(max(w, min_val), max_val) - min_val) * slope for w in weights]


def _random(
    weights: Sequence[float],
    min_val: float = 0.7,
    max_val: float = 1.3,
    rng: random.Random | None = None,
) -> list[float]:
    _check_bounds("random", "min_val", min_val, "max_val", max_val)
    uniform = random.uniform if rng is None else rng.uniform
    return [uniform(min_val, max_val) for _ in weights]


def _rank_based(
    weights: Sequence[float], min_scale: float = 0.7, max_scale: float = 1.3
) -> list[float]:
    if len(weights) == 1:
        return [1.0]
    scaled = [0.0] * len(weights)
    ascending = sorted(range(len(weights)), key=weights.__getitem__)
    for rank, position in enumerate(ascending):
        scaled[position] = min_scale + rank / (len(weights) - 1) * (max_scale - min_scale)
    return scaled


def _paper(
    weights: Sequence[float], k: float = 1.0, L: float = -0.5, U: float = 1.5
) -> list[float]:
    _check_bounds("paper", "L", L, "U", U)
    return [k * math.exp(min(max(weight, L), U)) for weight in weights]


def _check_bounds(method: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if not low <= high:
        raise ValueError(f"transform.{method}: {low_name}={low} must not exceed {high_name}={high}")


TRANSFORMS: dict[str, Callable[..., list[float]]] = {
    "origin": _origin,
    "binary": _binary,
    "threshold": _threshold,
    "threshold_and_scale": _threshold_and_scale,
    "random": _random,
    "rank_based": _rank_based,
    "paper": _paper,
}


def prepare_weights(
    chosen_weight: Sequence[float],
    rejected_weight: Sequence[float],
    method: str,
    params: dict[str, Any],
    *,
    row_seed: str,
) -> list[list[float]]:
    """Sign step and transform of one row, over its full untruncated token lists.

    A file holds -log(π⁺/π⁻) of each token on both sides, so the chosen list is negated. The sign
    belongs to the side in the *file*: with `reverse_dataset` π⁺ and π⁻ change roles together
    with the texts, and the prepared lists are swapped as they are.

    Args:
        chosen_weight, rejected_weight: The file's lists, in nats.
        method, params: See `transform_weights`.
        row_seed: What `random` draws from: equal seeds give equal weights, whatever else was
            drawn before.

    Returns:
        The prepared chosen and rejected lists, as long as they came in.
    """
    if method == "random":
        params = {**params, "rng": random.Random(row_seed)}
    signed = ([-weight for weight in chosen_weight], rejected_weight)
    return [transform_weights(weights, method, **params) for weights in signed]


def align_weights(weights: list[float], num_tokens: int, eos_weight: float | None) -> list[float]:
    """Weights of the response tokens that are left after EOS was appended and truncation done.

    Args:
        weights: Prepared weights of the untruncated response without EOS.
        num_tokens: Tokens left, EOS included, >= 1.
        eos_weight: Weight of EOS where it survived. None is the rule of the TIS-DPO code: the
            last token that is left weighs 0, be it EOS or the last survivor of a truncation.

    Returns:
        `num_tokens` weights.
    """
    if eos_weight is None:
        return [*weights[: num_tokens - 1], 0.0]
    return [*weights, eos_weight][:num_tokens]


def weights_sidecar(path: Path) -> Path:
    """What stands beside a file of estimated weights and says where they come from."""
    split = path.name.split(".")[0]
    return path.with_name(f"{split}.weights.json")
