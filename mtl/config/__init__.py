"""The configuration of a run: its keys and types, how it is read, and the messages about mistakes in it."""

from mtl.config.data import AugmentConfig, DataConfig, FileData, GeneratedData, OwnData
from mtl.config.errors import ConfigError, SettingError
from mtl.config.evaluate import EvaluateConfig
from mtl.config.head import HeadConfig
from mtl.config.init_from import InitFromConfig
from mtl.config.schema import RunConfig, config_of, load_config, mistake_of
from mtl.config.tasks import (
    ClassificationConfig,
    DepthConfig,
    DistillConfig,
    EdgesConfig,
    KeypointsConfig,
    LossConfig,
    MetricConfig,
    MultiLabelConfig,
    NormalsConfig,
    OrdinalConfig,
    OwnTaskConfig,
    RegressionConfig,
    SaliencyConfig,
    SegmentationConfig,
    TaskConfig,
)
from mtl.config.teacher import TeacherConfig
from mtl.config.tracking import TrackingConfig
from mtl.config.trunk import TrunkConfig
from mtl.config.types import Strict

__all__ = [
    "AugmentConfig",
    "ClassificationConfig",
    "ConfigError",
    "DataConfig",
    "DepthConfig",
    "DistillConfig",
    "EdgesConfig",
    "EvaluateConfig",
    "FileData",
    "GeneratedData",
    "HeadConfig",
    "InitFromConfig",
    "KeypointsConfig",
    "LossConfig",
    "MetricConfig",
    "MultiLabelConfig",
    "NormalsConfig",
    "OrdinalConfig",
    "OwnData",
    "OwnTaskConfig",
    "RegressionConfig",
    "RunConfig",
    "SaliencyConfig",
    "SegmentationConfig",
    "SettingError",
    "Strict",
    "TaskConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrunkConfig",
    "config_of",
    "load_config",
    "mistake_of",
]
