"""TIS-DPO token weights: from log-ratios in a data file to one weight per response token."""

import hashlib
import random
from collections.abc import Callable, Sequence
from inspect import signature
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpref.checks import TIES, check_choice, check_number, hint

Array = NDArray[np.float64]


def transform_weights(weights: Sequence[float], method: str, **params: Any) -> list[float]:
    """Turn the sign-corrected log-ratios of one response into token weights (TIS-DPO).

        origin                w
        binary                1 for the top int(n · top_percent / 100) values, else 0
        threshold             clamp(w, lower_threshold, upper_threshold)
        threshold_and_scale   clamp(w, min_val, max_val), mapped onto [min_scale, max_scale]
        random                uniform in [min_val, max_val], independent of w
        rank_based            ascending rank i of n: min_scale + i / (n - 1) · range; 1 if n = 1
        paper                 k · exp(clamp(w, L, U)) (arXiv:2410.04350)

    Ties with `ties="seed"` (as in the TIS-DPO code): `binary` gives 0 to all values tied across
    the cut, `rank_based` ranks equal values by position. With `ties="equal"`, `binary` gives tied
    values 1 and `rank_based` the mean of their ranks: equal values get equal weights.

    Args:
        weights: One finite value per response token without EOS: +log(π⁺/π⁻) of a chosen
            response, -log(π⁺/π⁻) of a rejected one, in nats.
        method: One of the names above.
        params: The method's own parameters, by the names above. `random` also takes
            `rng: random.Random`; the default is Python's global generator.

    Returns:
        One weight per input value.

    Raises:
        ValueError: an input or a result is not finite, the method or a parameter is unknown, or
            bounds are reversed, out of range or cause a division by zero.
    """
    if not isinstance(method, str):
        raise ValueError(f"transform.method must be a name, got {method!r}")
    check_choice("transform.method", method, TRANSFORMS)
    transform = TRANSFORMS[method]
    known = list(signature(transform).parameters)[1:]
    for name, value in params.items():
        if name not in known:
            raise ValueError(
                f"transform.{method} has no parameter {name!r}, only {', '.join(known) or 'none'}"
                f"{hint(name, known)}"
            )
        if name == "rng" and not isinstance(value, random.Random | None):
            raise ValueError(f"transform.random.rng must be a random.Random, got {value!r}")
        if name not in ("ties", "rng"):
            if not isinstance(value, Real):
                raise ValueError(f"transform.{method}.{name} must be a number, got {value!r}")
            check_number(f"transform.{method}.{name}", float(value))
    values = _finite_numbers(weights)
    # overflow is reported below with the weight and its place, so no numpy warning
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        transformed = transform(values, **params)
    if not np.isfinite(transformed).all():
        place = int(np.argmin(np.isfinite(transformed)))
        raise ValueError(
            f"transform.{method} makes {transformed[place]} of the weight {values[place]} at place "
            f"{place} with {params}: its parameters must give finite weights"
        )
    return transformed.tolist()


def _finite_numbers(weights: Sequence[float]) -> Array:
    """A response's weights as an array; ValueError unless they are a list of finite numbers."""
    try:
        values = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"weights must be a list of finite numbers: {error}") from error
    if values.ndim != 1:
        raise ValueError(f"weights must be a list of numbers, got the shape {values.shape}")
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"weights must be finite, got {values[place]} at place {place}")
    return values


def _origin(weights: Array) -> Array:
    return weights


def _binary(weights: Array, top_percent: float = 100, ties: str = "seed") -> Array:
    check_choice("transform.binary.ties", ties, TIES)
    check_number("transform.binary.top_percent", top_percent, ge=0, le=100)
    num_kept = int(len(weights) * top_percent / 100)
    if num_kept >= len(weights):
        return np.ones(len(weights))
    if num_kept == 0:
        return np.zeros(len(weights))
    descending = np.sort(weights)[::-1]
    if ties == "equal":
        return (weights >= descending[num_kept - 1]).astype(np.float64)
    return (weights > descending[num_kept]).astype(np.float64)


def _threshold(
    weights: Array, upper_threshold: float = 1.0, lower_threshold: float = -1.0
) -> Array:
    _check_bounds(
        "threshold", "lower_threshold", lower_threshold, "upper_threshold", upper_threshold
    )
    return weights.clip(lower_threshold, upper_threshold)


def _threshold_and_scale(
    weights: Array,
    min_val: float = -1.5,
    max_val: float = 1.5,
    min_scale: float = 0.7,
    max_scale: float = 1.3,
) -> Array:
    _check_bounds("threshold_and_scale", "min_val", min_val, "max_val", max_val)
    _check_bounds("threshold_and_scale", "min_scale", min_scale, "max_scale", max_scale)
    if min_val == max_val:
        raise ValueError(
            f"transform.threshold_and_scale: min_val must be < max_val, both are {min_val}"
        )
    slope = (max_scale - min_scale) / (max_val - min_val)
    return min_scale + (weights.clip(min_val, max_val) - min_val) * slope


def _random(
    weights: Array,
    min_val: float = 0.7,
    max_val: float = 1.3,
    rng: random.Random | None = None,
) -> Array:
    _check_bounds("random", "min_val", min_val, "max_val", max_val)
    # Python's generator, one draw per token: the same stream as in the TIS-DPO code
    uniform = random.uniform if rng is None else rng.uniform
    return np.array([uniform(min_val, max_val) for _ in weights], dtype=np.float64)


def _rank_based(
    weights: Array, min_scale: float = 0.7, max_scale: float = 1.3, ties: str = "seed"
) -> Array:
    check_choice("transform.rank_based.ties", ties, TIES)
    _check_bounds("rank_based", "min_scale", min_scale, "max_scale", max_scale)
    if len(weights) == 1:
        return np.ones(1)
    ranks = np.empty(len(weights))
    ranks[np.argsort(weights, kind="stable")] = np.arange(len(weights))
    if ties == "equal":
        _, group, count = np.unique(weights, return_inverse=True, return_counts=True)
        ranks = (np.bincount(group, weights=ranks) / count)[group]
    return min_scale + ranks / max(1, len(weights) - 1) * (max_scale - min_scale)


def _paper(weights: Array, k: float = 1.0, L: float = -0.5, U: float = 1.5) -> Array:
    _check_bounds("paper", "L", L, "U", U)
    check_number("transform.paper.k", k, gt=0)
    return k * np.exp(weights.clip(L, U))


def _check_bounds(method: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if not low <= high:
        raise ValueError(f"transform.{method}: {low_name}={low} must not exceed {high_name}={high}")


TRANSFORMS: dict[str, Callable[..., Array]] = {
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
    """Correct the signs of one row's weights and transform them, before any truncation.

    A file has -log(π⁺/π⁻) of each token for both responses, so the chosen list is negated. Chosen
    and rejected mean the roles in the *file*: with `reverse_dataset` π⁺ and π⁻ change roles
    together with the responses, and the prepared lists are swapped without further changes.

    Args:
        chosen_weight, rejected_weight: The file's lists, in nats.
        method, params: See `transform_weights`.
        row_seed: Seed of the method `random`: weights depend on it alone, not on earlier draws.

    Returns:
        The prepared chosen and rejected lists, in their original lengths.
    """
    if method == "random":
        params = {**params, "rng": random.Random(row_seed)}
    signed = ([-weight for weight in chosen_weight], rejected_weight)
    return [transform_weights(weights, method, **params) for weights in signed]


def align_weights(
    weights: list[float], num_tokens: int, eos_weight: float | None, *, has_eos: bool = False
) -> list[float]:
    """Weights of the response tokens that remain after appending EOS and truncating.

    Args:
        weights: Prepared weights of the untruncated response.
        num_tokens: Remaining tokens, EOS included, >= 1.
        eos_weight: Weight of EOS if it was not truncated. None: the file's, if `has_eos`; else the
            rule of the TIS-DPO code: the last remaining token, EOS or not, gets weight 0.
        has_eos: Whether the last of `weights` belongs to EOS.

    Returns:
        `num_tokens` weights.
    """
    if has_eos:
        last = weights[-1] if eos_weight is None else eos_weight
        return [*weights[:-1], last][:num_tokens]
    if eos_weight is None:
        return [*weights[: num_tokens - 1], 0.0]
    return [*weights, eos_weight][:num_tokens]


def token_digest(
    prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]
) -> str:
    """Digest of the tokens that a row's weights were estimated for, 16 hexadecimal digits.

    Stored in every row of a file of estimated weights, to refuse weights whose tokens have changed
    because the text or the tokenizer did.
    """
    digest = hashlib.blake2b(digest_size=8)
    for ids in (prompt_ids, chosen_ids, rejected_ids):
        # with the length: moving a token from one part to the next must change the digest
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return digest.hexdigest()
