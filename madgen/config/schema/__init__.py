"""Schema of a job file: frozen dataclasses that validate their values on construction."""

from __future__ import annotations

from madgen.config.schema.backbone import UNETS, BackboneConfig, ControlNetConfig, IpAdapterConfig, LoraConfig
from madgen.config.schema.checks import check_recordable, check_url
from madgen.config.schema.init import InitConfig
from madgen.config.schema.job import Job, require_job
from madgen.config.schema.method import (
    BlendConfig,
    MadConfig,
    MergeConfig,
    MethodConfig,
    NoiseConfig,
    RegionsConfig,
    SyncConfig,
    ViewsConfig,
    share_of_steps,
)
from madgen.config.schema.output import PIXEL_SCORES, SCORES, OutputConfig, QuarantineConfig, SafetyConfig, ScoresConfig
from madgen.config.schema.prompts import PICTURE_FIELDS, PROMPT_FIELDS, PromptsConfig
from madgen.config.schema.run import MonitorConfig, TrainerConfig, WandbConfig
from madgen.config.schema.sampling import AUTO_BATCH, SamplingConfig, SamplingParams

__all__ = [
    "AUTO_BATCH",
    "PICTURE_FIELDS",
    "PIXEL_SCORES",
    "PROMPT_FIELDS",
    "SCORES",
    "UNETS",
    "BackboneConfig",
    "BlendConfig",
    "ControlNetConfig",
    "InitConfig",
    "IpAdapterConfig",
    "Job",
    "LoraConfig",
    "MadConfig",
    "MergeConfig",
    "MethodConfig",
    "MonitorConfig",
    "NoiseConfig",
    "OutputConfig",
    "PromptsConfig",
    "QuarantineConfig",
    "RegionsConfig",
    "SafetyConfig",
    "SamplingConfig",
    "SamplingParams",
    "ScoresConfig",
    "SyncConfig",
    "TrainerConfig",
    "ViewsConfig",
    "WandbConfig",
    "check_recordable",
    "check_url",
    "require_job",
    "share_of_steps",
]
