"""The schema of a run, and its documentation: one YAML file, every key also on the command line.

Each class checks its own values; what needs more than one class is checked in `Config`. A wrong
value is a `ConfigError` of one line: the key, what was expected, what came.
"""

from distilfast.config.parsing import RECIPES, parse, to_yaml
from distilfast.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    MaskingConfig,
    OptimizerConfig,
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
