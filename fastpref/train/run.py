"""A run: everything that the training loop works on."""

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
    """Everything that the training loop works on."""

    config: Config
    model: ModelConfig
    """The model options, with dtypes resolved for this device."""
    world: World
    run_dir: Path
    tokenizer: Any
    train: Loader
    eval: Loader | None
    policy: TokenScorer
    reference: TokenScorer | OwnReference | None
    """Sampled from besides the policy before the first update; None: only the policy is."""
    step_loss: StepLoss
    repetition: Repetition
    """Recomputes a step in smaller micro-batches when memory runs out."""
    updates: Updates
    log: MetricsLog
    state: RunState
    """Progress counters, updated after every step."""
    start: Start
    """What the run starts or resumes from."""
    fingerprints: dict[str, str]
    """Digests of data, tokenizer and model."""
    export: ExportPlan | None
    """How the trained model is exported; None on every rank but 0."""
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Seconds since the run was built."""
        return time.perf_counter() - self.started
