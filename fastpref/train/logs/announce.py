"""Log lines before a run's first step: what it will do, and what a user may not expect."""

import logging
from collections.abc import Sequence

from fastpref.batches.loader import Loader
from fastpref.config import AdapterConfig, ModelConfig, TransformConfig
from fastpref.distributed import World
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import Objective

logger = logging.getLogger("fastpref")


def announce(
    objective: Objective,
    world: World,
    model: ModelConfig,
    datasets: Sequence[str],
    transform: TransformConfig,
    *,
    adapters: bool,
) -> None:
    """Log what the run will do, and warn of what a user may not expect."""
    logger.info(
        "%s of %s on %s: %d x %s, %s, arithmetic in %s",
        objective.title,
        model.name_or_path,
        ", ".join(datasets),
        world.size,
        world.device.type,
        "adapters in float32" if adapters else f"weights in {model.policy_dtype}",
        model.compute_dtype,
    )
    if objective.needs.weights and transform.method == "binary":
        logger.warning(
            "transform.method=binary at %g percent: %g percent of a response's tokens weigh 1, "
            "the others 0, whatever their estimated weights; transform=paper uses the estimates",
            transform.binary.top_percent,
            transform.binary.top_percent,
        )


def announce_tokens(loader: Loader, world: World) -> None:
    """Log how many tokens packing and prompt sharing save, or padding adds, in the first steps."""
    if not world.is_main:
        return
    steps = min(32, loader.order.num_steps)
    in_data, computed = loader.savings(world.data_size, steps)
    logger.info(
        "first %d steps: %s tokens in the data, %s computed, %.0f %% %s",
        steps,
        f"{in_data:,}",
        f"{computed:,}",
        100 * abs(1 - computed / in_data),
        "saved" if computed <= in_data else "more, for padding",
    )


def announce_adapters(policy: TokenScorer, options: AdapterConfig) -> None:
    """Log which part of the model is trained, if that is adapters."""
    if policy.adapters is None:
        return
    trained = sum(parameter.numel() for parameter in policy.adapters.trained())
    logger.info(
        "%s of rank %d beside %d layers: %s parameters are trained, in float32; the model stays as "
        "it is%s, and is the reference%s",
        "LoRA" if not options.quantized else "QLoRA",
        policy.adapters.config.r,
        policy.adapters.num_layers,
        f"{trained:,}",
        ", its linear layers in 4 bits" if options.quantized else "",
        " with the adapter that training starts from" if policy.adapters.continued else "",
    )
