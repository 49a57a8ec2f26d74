"""The stages of `task=tisdpo`: each is a task that can run on its own, with its own config."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.config import (
    Config,
    DPOConfig,
    LossConfig,
    ModelConfig,
    SFTConfig,
    StagesConfig,
    TISDPOConfig,
)
from fastpref.errors import ConfigError

ADAPTED_CONTRAST = 4.0
"""Factor on the learning rate of contrastive adapters, which need a higher rate than all weights to
move as far, and one that decays to zero to settle. `benchmarks/planted_weights.py` compares how
well token weights from both find planted tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One task of the run."""

    name: str
    """Name of its subfolder."""
    what: str
    """Description for the log and the closing report."""
    config: Config


def first_stage(options: StagesConfig) -> str:
    """Name of the first stage."""
    if options.sft_first:
        return "sft"
    return "weights" if options.contrast == "prompt" else "positive"


def build_stages(config: Config, run_dir: Path) -> list[Stage]:
    """The stages in order, each with its own validated config.

    Raises:
        ConfigError: an option of the run is invalid in a stage.
    """
    try:
        return list(_Recipe(config, run_dir).stages())
    except ValueError as error:
        raise ConfigError(str(error)) from None


class _Recipe(NamedTuple):
    """Derives the stages from the config of the run."""

    config: Config
    run_dir: Path

    def stages(self) -> Iterator[Stage]:
        config, options = self.config, self.config.stages
        # only the last model is saved in the user's dtype: stages must not read rounded weights
        model = replace(config.model, save_dtype=None)
        if options.sft_first:
            yield self.training(
                "sft",
                "SFT on the chosen responses",
                loss=SFTConfig(),
                model=model,
                lr=options.sft_lr or config.lr,
                n_epochs=options.sft_n_epochs or config.n_epochs,
            )
            model = trained_model(model, self.run_dir / "sft")
        yield from self.contrast(model)
        yield self.weights(model)
        yield self.training(
            "policy",
            "TIS-DPO on the token weights",
            model=replace(model, save_dtype=config.model.save_dtype),
            base_data_dir=str(self.run_dir / "weights"),
            sample_during_eval=config.sample_during_eval,
            checkpoint=config.checkpoint,
            adapter=config.adapter,
            reverse_dataset=config.reverse_dataset,
        )

    def training(self, name: str, what: str, **changes: Any) -> Stage:
        """A stage of `task=train` in the subfolder `name`, with `changes` to the run's options."""
        config = self.config
        options: dict[str, Any] = {
            "task": "train",
            "run_dir": str(self.run_dir / name),
            # a stopped stage resumes from its own checkpoint
            "resume": replace(config.resume, path="auto"),
            "exp_name": f"{config.exp_name or config.computed_exp_name()}_{name}",
            # only samples and the best checkpoint of the last policy are of interest
            "sample_during_eval": False,
            "checkpoint": replace(config.checkpoint, keep_best=None),
            "adapter": replace(config.adapter, merge=False),
            "reverse_dataset": False,
        }
        return Stage(name=name, what=what, config=replace(config, **(options | changes)))

    def contrast(self, model: ModelConfig) -> list[Stage]:
        """The stages that train the positive and the negative model; none with contrast=prompt.

        They use the pairs as the files have them, whatever `reverse_dataset` says: the loader of
        the last stage reverses weights and texts together.
        """
        config, options = self.config, self.config.stages
        if options.contrast == "prompt":
            return []
        if options.contrast == "dpo":
            assert isinstance(config.loss, TISDPOConfig)
            loss: LossConfig = DPOConfig(beta=options.contrast_beta or config.loss.beta)
            what = {"positive": "DPO on the pairs", "negative": "DPO on the reversed pairs"}
        else:
            loss = SFTConfig()
            what = {
                "positive": "SFT on the chosen responses",
                "negative": "SFT on the rejected responses",
            }
        adapted = config.adapter.trained and options.contrast_lr is None
        schedule = config.optim.schedule
        if adapted and schedule == "constant":
            schedule = "linear"
        return [
            self.training(
                side,
                what[side],
                loss=loss,
                model=model,
                lr=options.contrast_lr or config.lr * (ADAPTED_CONTRAST if adapted else 1),
                optim=replace(config.optim, schedule=schedule),
                n_epochs=options.contrast_n_epochs or config.n_epochs,
                reverse_dataset=side == "negative",
            )
            for side in ("positive", "negative")
        ]

    def weights(self, model: ModelConfig) -> Stage:
        """The stage of `task=estimate_weights` in the subfolder `weights`."""
        start = model.archive or model.name_or_path
        positive, negative = start, start
        what = "token weights from one model under two prompts"
        if self.config.stages.contrast != "prompt":
            positive, negative = (str(self.run_dir / side) for side in ("positive", "negative"))
            what = "token weights from the two models"
        weights = replace(
            self.config.weights,
            positive=positive,
            negative=negative,
            output_dir=str(self.run_dir / "weights"),
            suffix="",
        )
        # a loss that needs no token weights, which the rows do not have yet
        changed = replace(
            self.config, task="estimate_weights", loss=DPOConfig(), model=model, weights=weights
        )
        return Stage(name="weights", what=what, config=changed)


def trained_model(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """Options of the model that a training stage has exported, with the run's precision."""
    return replace(model, name_or_path=str(run_dir), archive=None, revision=None)
