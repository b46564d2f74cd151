"""distilfast: distil transformers fast, with results that can be trusted.

The losses need only torch. Import the driver's modules (train, models, data, ...) by name.
"""

from distilfast._version import __version__
from distilfast.losses import (
    DetailedOutput,
    DistillationLoss,
    DistillationOutput,
    combine_teachers,
    distillation_loss,
    hidden_cosine_loss,
)
from distilfast.losses.linear import linear_distillation_loss

__all__ = [
    "DetailedOutput",
    "DistillationLoss",
    "DistillationOutput",
    "__version__",
    "combine_teachers",
    "distillation_loss",
    "hidden_cosine_loss",
    "linear_distillation_loss",
]
