"""The configuration of a run. It is one YAML file; every key can also be set on the command line.

A wrong value raises a `ConfigError` of one line: the key, the expected value and the given one.
"""

from distilfast.config.learning import BatchConfig, LossConfig, OptimizerConfig
from distilfast.config.parsing import RECIPES, parse, to_yaml
from distilfast.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    MaskingConfig,
    SourceSpec,
    StudentConfig,
    TeacherSpec,
    ZeroConfig,
)
from distilfast.errors import ConfigError

__all__ = [
    "RECIPES",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "LossConfig",
    "MaskingConfig",
    "OptimizerConfig",
    "SourceSpec",
    "StudentConfig",
    "TeacherSpec",
    "ZeroConfig",
    "parse",
    "to_yaml",
]
