"""The schema of a run: every option's type, default, unit, meaning and check.

Enters: what train.py composed. Leaves: a checked `Config`. To be changed here: an option.
Nothing here imports torch, so that a wrong option is refused before anything heavy is loaded.
"""

from fastpref.config.groups import (
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    TensorboardConfig,
    TrackerOptions,
    WandbConfig,
    WeightsConfig,
)
from fastpref.config.loss import (
    LOSSES,
    METHODS,
    DPOConfig,
    IPOConfig,
    LossConfig,
    LossNeeds,
    SFTConfig,
    SimPOConfig,
    TDPOConfig,
    TISDPOConfig,
    TransformConfig,
)
from fastpref.config.run import (
    Config,
)
from fastpref.config.stages import (
    StagesConfig,
)
from fastpref.config.survival import CheckpointConfig, ParallelConfig, ResumeConfig

__all__ = [
    "LOSSES",
    "METHODS",
    "CheckpointConfig",
    "Config",
    "DPOConfig",
    "DataConfig",
    "HeadConfig",
    "IPOConfig",
    "LossConfig",
    "LossNeeds",
    "ModelConfig",
    "OptimConfig",
    "PackingConfig",
    "ParallelConfig",
    "ResumeConfig",
    "SFTConfig",
    "SimPOConfig",
    "StagesConfig",
    "TDPOConfig",
    "TISDPOConfig",
    "TensorboardConfig",
    "TrackerOptions",
    "TransformConfig",
    "WandbConfig",
    "WeightsConfig",
]
