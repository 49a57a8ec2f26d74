"""Schema of the group `plan`: the devices that `task=plan` plans for."""

from dataclasses import dataclass

from fastpref.checks import check_number


@dataclass(kw_only=True)
class PlanConfig:
    """task=plan: the memory that training would take on GPUs, which need not be here."""

    num_gpus: int = 1
    """GPUs that train together, >= 1."""
    memory_gib: float = 80.0
    """Memory of each of them, GiB, > 0 and <= 1,000,000."""

    def __post_init__(self) -> None:
        check_number("plan.num_gpus", self.num_gpus, ge=1)
        check_number("plan.memory_gib", self.memory_gib, gt=0)
        # by itself, to keep the message above short
        check_number("plan.memory_gib", self.memory_gib, le=1_000_000)
