"""Warnings, given once before training, about options that do not do what they seem to.

None of them is an error. Each method looks at one subject, and gives the numbers and a remedy with
each warning.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import Parameter

from fastpref.batches.loader import Loader
from fastpref.batches.order import GlobalOrder
from fastpref.checkpoint.state import local_part
from fastpref.config import (
    AdapterConfig,
    Config,
    PlanConfig,
    ReferenceConfig,
    StagesConfig,
    TransformConfig,
    WeightsConfig,
)
from fastpref.distributed import World
from fastpref.train.logs.idle import RULES, block_rules
from fastpref.train.run import Run

STEPS_OF_LR = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
"""Optimizers that change a weight by about the learning rate, whatever the gradient's scale."""

LOW_LR_OF_ADAPTERS = 2e-6
"""Learning rate below which adapters of usual rank hardly move in a run of some thousand steps."""

WORTH_SAYING = 0.1
"""Least share of weights that a step leaves unchanged for which a warning is given."""


def advise(run: Run) -> list[str]:
    """The warnings about a run that has been built; every rank calls this."""
    order, advice = run.train.order, Advice(replace(run.config, model=run.model))
    share = unmoved_share(run.policy.trained(), run.config.lr, run.world)
    return [
        *advice.on_progress(run.state.step, order.num_steps),
        *advice.on_schedule(order.num_steps),
        *advice.on_examples(order),
        *(advice.on_held_out(run.eval.order) if run.eval else ()),
        *advice.on_micro_batches(run.train, run.world.data_size),
        *advice.on_precision(share),
        *advice.on_adapter(),
        *advice.on_reference(),
    ]


class Advice(NamedTuple):
    """Warnings about the options of a config, one method per subject."""

    config: Config

    def on_progress(self, step: int, num_steps: int) -> Iterator[str]:
        """A resumed run that has all its steps."""
        if step >= num_steps:
            yield (
                f"all {num_steps} optimizer steps are done: nothing is left to train, the model is "
                "written again; a larger n_epochs or n_examples goes on"
            )

    def on_schedule(self, num_steps: int) -> Iterator[str]:
        """Warm-up that takes the whole run; decay that never begins."""
        config = self.config
        warmup, schedule = config.warmup_steps, config.optim.schedule
        if warmup >= num_steps:
            yield (
                f"warmup_steps={warmup}, but the run has {num_steps} optimizer steps: the learning "
                f"rate ends at {100 * num_steps / (warmup + 1):.3g} % of lr={config.lr:g}; "
                f"set warmup_steps below {num_steps}"
            )
        if schedule == "constant":
            if config.optim.min_lr_ratio:
                yield (
                    f"optim.min_lr_ratio={config.optim.min_lr_ratio:g} has no effect with "
                    "optim.schedule=constant; cosine and linear end there"
                )
        elif warmup >= num_steps - 1:
            yield (
                f"optim.schedule={schedule} has no effect: warmup_steps={warmup} of {num_steps} "
                "optimizer steps leave none to decay in"
            )

    def on_examples(self, order: GlobalOrder) -> Iterator[str]:
        """A run that ends before or after the requested number of examples."""
        config = self.config
        wanted = config.n_examples
        if wanted is None:
            return
        whole_batches = order.num_steps * order.batch_size
        if config.n_epochs is not None and config.n_epochs * order.num_rows < wanted:
            yield (
                f"n_examples={wanted}, but n_epochs={config.n_epochs} ends the run after "
                f"{min(whole_batches, config.n_epochs * order.num_rows)}; n_epochs=null takes as "
                "many passes as n_examples needs"
            )
        elif wanted < whole_batches and config.data.drop_last:
            yield (
                f"n_examples={wanted} is rounded up to {whole_batches}, whole batches of "
                f"batch_size={order.batch_size}"
            )

    def on_held_out(self, order: GlobalOrder) -> Iterator[str]:
        """More or fewer rows evaluated or sampled from than requested."""
        config = self.config
        wanted = config.n_eval_examples
        evaluated = min(order.num_rows, order.num_steps * order.batch_size)
        if evaluated < wanted:
            yield (
                f"n_eval_examples={wanted}, but the test split has {evaluated} rows: taking them "
                "all"
            )
        elif evaluated > wanted:
            yield (
                f"n_eval_examples={wanted} is rounded up to {evaluated}, whole batches of "
                f"eval_batch_size={order.batch_size}"
            )
        if config.sample_during_eval and config.n_eval_model_samples > order.num_rows:
            yield (
                f"n_eval_model_samples={config.n_eval_model_samples}, but the test split has "
                f"{order.num_rows} rows: one sample for each"
            )

    def on_micro_batches(self, loader: Loader, num_ranks: int) -> Iterator[str]:
        """Ranks without rows; a number of micro-batches that rows do not allow or that another
        option decides."""
        config = self.config
        rows, asked = config.batch_size, config.gradient_accumulation_steps
        if rows < num_ranks:
            yield (
                f"batch_size={rows}: {num_ranks - rows} of {num_ranks} processes have nothing to "
                f"compute; from batch_size={num_ranks} on all have"
            )
        if asked == 1:
            return
        if config.packing.token_limit is None:
            yield (
                f"gradient_accumulation_steps={asked} has no effect with packing.max_tokens=auto, "
                "which takes as few micro-batches as memory allows, to the same update; a number "
                "there divides a step further"
            )
            return
        steps = range(min(32, loader.order.num_steps))
        counts = [len(loader.plan(step, num_ranks)[1]) for step in steps]
        if max(counts) < asked:
            yield (
                f"gradient_accumulation_steps={asked}, but batch_size={rows} in a world of "
                f"{num_ranks} is enough for {max(counts)} micro-batches"
            )
        elif min(counts) > asked:
            yield (
                f"gradient_accumulation_steps={asked} has no effect: packing.max_tokens="
                f"{config.packing.max_tokens} takes at least {min(counts)} micro-batches a step"
            )

    def on_precision(self, share: float) -> Iterator[str]:
        """Updates and gradients too small for their dtypes.

        Args:
            share: See `unmoved_share`.
        """
        config = self.config
        model = config.model
        if share >= WORTH_SAYING:
            optimizer = config.optimizer
            taken = f", about what {optimizer} takes" if optimizer in STEPS_OF_LR else ""
            way_out = "a larger lr moves more of them"
            if model.policy_dtype != "float32":
                way_out = (
                    "model.policy_dtype=float32 keeps such steps, "
                    f"model.fsdp_policy_mp={model.compute_dtype} the arithmetic"
                )
            yield (
                f"{100 * share:.3g} % of the weights stand still under a step as large as "
                f"lr={config.lr:g}{taken}: it is less than half a unit in the last place of "
                f"their {model.policy_dtype}; {way_out}"
            )
        if model.compute_dtype == "float16":
            yield (
                "arithmetic in float16: gradients below 6e-8 become zero, as losses are not "
                "scaled; model.fsdp_policy_mp=bfloat16 has the range of float32"
            )

    def on_adapter(self) -> Iterator[str]:
        """Options that suit training all weights but not adapters; dropout in adapters."""
        config = self.config
        if not config.adapter.trained:
            return
        if config.lr < LOW_LR_OF_ADAPTERS and config.optimizer in STEPS_OF_LR:
            yield (
                f"lr={config.lr:g} is small for adapters, whose second matrices start at zero: "
                "recipe=dpo_lora has one that was tried"
            )
        model, merges = config.model, config.adapter.merge
        idle = {
            "policy_dtype": model.policy_dtype != "float32" and model.fsdp_policy_mp is not None,
            "reference_dtype": model.reference_dtype is not None,
            "save_dtype": model.save_dtype is not None and not merges,
        }
        for name in (name for name, is_idle in idle.items() if is_idle):
            yield (
                f"model.{name} has no effect with adapters, which are float32 beside one model in "
                f"{model.compute_dtype}"
            )
        if config.adapter.dropout:
            yield (
                f"adapter.dropout={config.adapter.dropout:g}: policy and reference differ by noise "
                "from the first step on, and the first loss is not that of equal models"
            )

    def on_reference(self) -> Iterator[str]:
        """Reference options without a reference, without its cache, or without it in memory."""
        config, reference = self.config, self.config.reference
        if not config.loss.needs.reference:
            if reference != ReferenceConfig():
                yield (
                    f"the options reference.* have no effect with loss={config.loss.name}, which "
                    "has no reference"
                )
            return
        if reference.mode == "auto":
            chosen = "cache" if config.caches_reference else "online"
            yield f"reference.mode=auto is {chosen} here: n_epochs={config.n_epochs}"
        if reference.cache_dir is not None and not config.caches_reference:
            yield "reference.cache_dir has no effect: the reference computes in every step"
        if config.model.reference_dtype is not None and config.caches_reference:
            yield "model.reference_dtype has no effect: no reference is held"

    def on_idle(self, given: Collection[str]) -> Iterator[str]:
        """Options on the command line that have no effect because of another option.

        Args:
            given: Keys of all options on the command line.
        """
        config = self.config
        for rule in (*RULES, *block_rules(config.transform)):
            named = [key for key in rule.options.split() if key in given]
            if named and rule.is_idle(config):
                yield f"{', '.join(named)} has no effect: {rule.why.format(c=config)}"

    def on_task(self) -> Iterator[str]:
        """Groups of options that were set but are not read by the task.

        To be called on the config as the user gave it.
        """
        config = self.config
        scores = config.task in ("estimate_weights", "tisdpo")
        if not scores and config.weights != WeightsConfig():
            yield (
                f"the options weights.* have no effect with task={config.task}; "
                "task=estimate_weights or a recipe of TIS-DPO reads them"
            )
        if not config.adapter.trained and config.adapter != AdapterConfig():
            yield (
                "the options adapter.* have no effect with adapter=none, which trains all weights; "
                "adapter=lora trains adapters"
            )
        reads_quantized = config.task == "estimate_weights" and config.adapter.quantized
        if config.task in ("estimate_weights", "audit") and not (
            reads_quantized or config.adapter == AdapterConfig()
        ):
            yield (
                f"adapter={config.adapter.kind} has no effect with task={config.task}, which "
                "trains nothing; models that are adapter folders are read as they are"
            )
        data = config.data
        names = {
            "shares": data.shares is not None,
            "test_fraction": data.test_fraction > 0,
            "deduplicate": data.deduplicate,
        }
        if config.task == "estimate_weights" and any(names.values()):
            given = ", ".join(f"data.{name}" for name, is_given in names.items() if is_given)
            yield (
                f"{given}: no effect with task=estimate_weights, which gives weights to every row "
                "of the files; training on them then divides and mixes"
            )
        if config.task != "tisdpo" and config.stages != StagesConfig():
            yield (
                f"the options stages.* have no effect with task={config.task}; task=tisdpo reads "
                "them"
            )
        if config.task != "plan" and config.plan != PlanConfig():
            yield f"the options plan.* have no effect with task={config.task}; task=plan reads them"
        if config.task != "tisdpo" and config.transform != TransformConfig():
            if config.task in ("plan", "estimate_weights"):
                yield (
                    f"the options transform.* have no effect with task={config.task}; training "
                    "takes them to its token weights"
                )
            elif not config.loss.needs.weights:
                yield (
                    f"the options transform.* have no effect with loss={config.loss.name}, which "
                    "takes no token weights"
                )


@torch.no_grad()
def unmoved_share(parameters: Iterable[Parameter], lr: float, world: World) -> float:
    """Share of all weights that adding or subtracting lr leaves unchanged, in [0, 1].

    Args:
        parameters: The trained parameters, sharded or not, in their master dtype.
        lr: The peak learning rate.
        world: The ranks that hold the shards.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=world.device)
    for parameter in parameters:
        weights = local_part(parameter)
        still = (weights + lr == weights) & (weights - lr == weights)
        counts[0] += still.sum()
        counts[1] += still.numel()
    unmoved, total = world.sum(counts).tolist()
    return unmoved / total
