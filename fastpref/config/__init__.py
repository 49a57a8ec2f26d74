"""The schema of a run: every option's type, default, unit, meaning and check.

Enters: options composed by train.py. Leaves: a checked `Config`. To be changed here: options.
Nothing here imports torch, so that a wrong option is refused before anything heavy is loaded.
"""

from fastpref.config.adapter import AdapterConfig
from fastpref.config.data import DataConfig
from fastpref.config.groups import (
    HeadConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
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
from fastpref.config.plan import PlanConfig
from fastpref.config.reference import ReferenceConfig
from fastpref.config.run import Config, TrainingOptions
from fastpref.config.stages import StagesConfig
from fastpref.config.survival import CheckpointConfig, ParallelConfig, ResumeConfig
from fastpref.config.trackers import TensorboardConfig, TrackerOptions, WandbConfig

__all__ = [
    "LOSSES",
    "METHODS",
    "AdapterConfig",
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
    "PlanConfig",
    "ReferenceConfig",
    "ResumeConfig",
    "SFTConfig",
    "SimPOConfig",
    "StagesConfig",
    "TDPOConfig",
    "TISDPOConfig",
    "TensorboardConfig",
    "TrackerOptions",
    "TrainingOptions",
    "TransformConfig",
    "WandbConfig",
    "WeightsConfig",
]
