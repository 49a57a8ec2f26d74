"""A run: everything that the loop works on."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpref.batches.loader import Loader
from fastpref.config import Config, ModelConfig
from fastpref.distributed import World
from fastpref.memory.repetition import Repetition
from fastpref.model.own_reference import OwnReference
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.export.plan import ExportPlan
from fastpref.train.logs.metrics import MetricsLog
from fastpref.train.resume.start import Start
from fastpref.train.state import RunState
from fastpref.train.updates import Updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that the loop works on."""

    config: Config
    model: ModelConfig
    """The options of the model, with the arithmetic of this device."""
    world: World
    run_dir: Path
    tokenizer: Any
    train: Loader
    eval: Loader | None
    policy: TokenScorer
    reference: TokenScorer | OwnReference | None
    """What is sampled from beside the policy before the first update."""
    step_loss: StepLoss
    repetition: Repetition
    """What to do where memory runs out."""
    updates: Updates
    log: MetricsLog
    state: RunState
    """Where it stands; counted on with every step."""
    start: Start
    """What it goes on from."""
    fingerprints: dict[str, str]
    """Of data, tokenizer and model."""
    export: ExportPlan | None
    """On rank 0."""
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Since it was put together."""
        return time.perf_counter() - self.started
