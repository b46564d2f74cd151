"""The losses over the vocabulary and over hidden states. They need torch alone."""

from distilfast.losses.arguments import normalize_weights
from distilfast.losses.dense import (
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
    "combine_teachers",
    "distillation_loss",
    "hidden_cosine_loss",
    "linear_distillation_loss",
    "normalize_weights",
]
