"""A run: everything that the loop works on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.batches.loader import Loader
from fastpref.config import Config
from fastpref.distributed import World
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.export import ExportPlan
from fastpref.train.metrics import MetricsLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that the loop works on."""

    config: Config
    world: World
    run_dir: Path
    tokenizer: Any
    train: Loader
    eval: Loader | None
    policy: TokenScorer
    reference: TokenScorer | None
    step_loss: StepLoss
    optimizer: Optimizer
    scheduler: LambdaLR
    log: MetricsLog
    export: ExportPlan | None
    """On rank 0."""
