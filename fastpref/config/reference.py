"""Schema of the group `reference`: where the reference's log-probabilities come from."""

from dataclasses import dataclass

from fastpref.checks import check_choice, expand_home
from fastpref.config.loss import LossConfig

MODES = ("online", "cache", "auto")


@dataclass(kw_only=True)
class ReferenceConfig:
    """The reference model that the policy is compared with, for losses that have one."""

    mode: str = "online"
    """online: the reference computes in every step. cache: every row is scored once, before the
    first step, by the model that training starts from; no reference is held or computed after
    that. For losses of log-ratios alone (dpo, ipo, tisdpo without token_level). auto: cache for
    them if n_epochs is above 1, else online."""
    cache_dir: str | None = None
    """Where the log-probabilities are kept, by model and by row, for other runs to find;
    null: <output_dir>/reference-logps."""

    def __post_init__(self) -> None:
        check_choice("reference.mode", self.mode, MODES)
        expand_home(self, "cache_dir")

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse mode=cache for a loss that needs more than log-probabilities.

        Raises:
            ValueError: the loss needs the reference's distribution over the vocabulary.
        """
        if self.mode == "cache" and loss.needs.kl is not None:
            raise ValueError(
                f"reference.mode=cache keeps log-probabilities of response tokens, and the KL of "
                f"loss={loss.name} needs those of every word; set reference.mode=online"
            )

    def is_cached(self, loss: LossConfig, n_epochs: int | None) -> bool:
        """Whether a run's reference is scored before its first step.

        Args:
            loss: The run's loss options.
            n_epochs: Passes over the data; None if only n_examples limits them.
        """
        if self.mode == "online" or not loss.needs.reference or loss.needs.kl is not None:
            return False
        return self.mode == "cache" or (n_epochs or 1) > 1
