"""The configuration of a run: what may be written, what it means, and what is said when it is wrong."""

from mtl.config.run import (
    AugmentConfig,
    ClassificationConfig,
    DataConfig,
    DepthConfig,
    NormalsConfig,
    RunConfig,
    SegmentationConfig,
    SettingError,
    TaskConfig,
    TrunkConfig,
    load_config,
    mistake_of,
)
from mtl.config.source import ConfigError
from mtl.config.watch import TrackingConfig

__all__ = [
    "AugmentConfig",
    "ClassificationConfig",
    "ConfigError",
    "DataConfig",
    "DepthConfig",
    "NormalsConfig",
    "RunConfig",
    "SegmentationConfig",
    "SettingError",
    "TaskConfig",
    "TrackingConfig",
    "TrunkConfig",
    "load_config",
    "mistake_of",
]
