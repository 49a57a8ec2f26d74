"""The stages of `task=tisdpo`: each is a task that exists by itself, with a config of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastpref.config import (
    Config,
    DPOConfig,
    LossConfig,
    ModelConfig,
    SFTConfig,
    TISDPOConfig,
    computed_exp_name,
)
from fastpref.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One task of the run."""

    name: str
    """Of its subfolder."""
    what: str
    """For the log and the closing report."""
    config: Config


def build_stages(config: Config, run_dir: Path) -> list[Stage]:
    """The stages in their order, each with its own checked config.

    Raises:
        ConfigError: an option of the run makes no sense in a stage.
    """
    try:
        return list(_stages(config, run_dir))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _stages(config: Config, run_dir: Path) -> Iterator[Stage]:
    stages = config.stages
    # what the next stage reads is not rounded; only the last model is the user's
    model = replace(config.model, save_dtype=None)
    if stages.sft_first:
        yield training_stage(
            config,
            run_dir,
            "sft",
            "SFT on the chosen responses",
            loss=SFTConfig(),
            model=model,
            lr=stages.sft_lr or config.lr,
            n_epochs=stages.sft_n_epochs or config.n_epochs,
        )
        model = trained_model(model, run_dir / "sft")
    yield from contrast_stages(config, model, run_dir)
    yield weights_stage(config, model, run_dir)
    yield training_stage(
        config,
        run_dir,
        "policy",
        "TIS-DPO on the token weights",
        model=replace(model, save_dtype=config.model.save_dtype),
        base_data_dir=str(run_dir / "weights"),
        sample_during_eval=config.sample_during_eval,
        reverse_dataset=config.reverse_dataset,
    )


def training_stage(config: Config, run_dir: Path, name: str, what: str, **changes: Any) -> Stage:
    """A run of `task=train` in the subfolder `name`."""
    options: dict[str, Any] = {
        "task": "train",
        "run_dir": str(run_dir / name),
        "exp_name": f"{config.exp_name or computed_exp_name(config)}_{name}",
        # only what the last policy says is worth reading
        "sample_during_eval": False,
        "reverse_dataset": False,
    }
    return Stage(name=name, what=what, config=replace(config, **(options | changes)))


def contrast_stages(config: Config, model: ModelConfig, run_dir: Path) -> list[Stage]:
    """The trainings of the positive and the negative model; none where prompts tell them apart.

    The pairs are taken as the files have them, whatever `reverse_dataset` says: it is the loader
    that turns weights and texts round together.
    """
    stages = config.stages
    if stages.contrast == "prompt":
        return []
    if stages.contrast == "dpo":
        assert isinstance(config.loss, TISDPOConfig)
        loss: LossConfig = DPOConfig(beta=stages.contrast_beta or config.loss.beta)
        what = {"positive": "DPO on the pairs", "negative": "DPO on the reversed pairs"}
    else:
        loss = SFTConfig()
        what = {
            "positive": "SFT on the chosen responses",
            "negative": "SFT on the rejected responses",
        }
    return [
        training_stage(
            config,
            run_dir,
            side,
            what[side],
            loss=loss,
            model=model,
            lr=stages.contrast_lr or config.lr,
            n_epochs=stages.contrast_n_epochs or config.n_epochs,
            reverse_dataset=side == "negative",
        )
        for side in ("positive", "negative")
    ]


def weights_stage(config: Config, model: ModelConfig, run_dir: Path) -> Stage:
    """The run of `task=estimate_weights` in the subfolder `weights`."""
    start = model.archive or model.name_or_path
    positive, negative = start, start
    what = "token weights from one model under two prompts"
    if config.stages.contrast != "prompt":
        positive, negative = (str(run_dir / side) for side in ("positive", "negative"))
        what = "token weights from the two models"
    weights = replace(
        config.weights,
        positive=positive,
        negative=negative,
        output_dir=str(run_dir / "weights"),
        suffix="",
    )
    # a loss without weights: the rows have none yet
    changed = replace(
        config, task="estimate_weights", loss=DPOConfig(), model=model, weights=weights
    )
    return Stage(name="weights", what=what, config=changed)


def trained_model(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """The model that a training stage leaves, with the precision of the run's."""
    return replace(model, name_or_path=str(run_dir), archive=None, revision=None)
