"""Schema of the group `stages`: the stages of `task=tisdpo` before it trains on token weights."""

from dataclasses import dataclass

from fastpref.checks import check_choice, check_number

CONTRASTS = ("dpo", "sft", "prompt")


@dataclass(kw_only=True)
class StagesConfig:
    """task=tisdpo: the stages before TIS-DPO itself (arXiv:2410.04350); null is the run's own."""

    contrast: str = "dpo"
    """Where the positive and the negative model come from: dpo (trained on the pairs and on the
    reversed pairs), sft (on the chosen and on the rejected responses), or prompt (one model under
    weights.positive_template and weights.negative_template)."""
    contrast_lr: float | None = None
    """Learning rate of the two contrastive models, > 0. null with adapters: four times the run's,
    decaying to zero if the run's is constant."""
    contrast_n_epochs: int | None = None
    """Passes over the data of each contrastive model, >= 1."""
    contrast_beta: float | None = None
    """loss.beta of the contrastive models if contrast=dpo, > 0."""
    sft_first: bool = False
    """For a base model: train it on the chosen responses (SFT) before everything else."""
    sft_lr: float | None = None
    """Learning rate of that first stage, > 0."""
    sft_n_epochs: int | None = None
    """Passes over the data of that first stage, >= 1."""

    def __post_init__(self) -> None:
        check_choice("stages.contrast", self.contrast, CONTRASTS)
        for name in ("contrast_lr", "contrast_beta", "sft_lr"):
            check_number(f"stages.{name}", getattr(self, name), gt=0)
        for name in ("contrast_n_epochs", "sft_n_epochs"):
            check_number(f"stages.{name}", getattr(self, name), ge=1)

    def check_task(self, loss: str, positive_template: str, negative_template: str) -> None:
        """Check what task=tisdpo requires of other groups."""
        if loss != "tisdpo":
            raise ValueError(f"task=tisdpo needs loss=tisdpo, got loss={loss}")
        if self.contrast == "prompt" and positive_template == negative_template:
            raise ValueError(
                "stages.contrast=prompt needs weights.positive_template and "
                f"weights.negative_template to differ, got {positive_template!r} twice"
            )
