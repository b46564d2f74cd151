"""Teachers and students: the model families, loading a teacher and making a student.

A new family is one row in FAMILIES. It says where a masked-LM model of that family keeps its body,
its head and its layers. Everything else about a model is left to transformers.
"""

from distilfast.models.families import (
    FAMILIES,
    Family,
    attend,
    check_head,
    family,
    logit_scaling,
    logits,
    logits_at,
    spread,
)
from distilfast.models.fp32_sums import use_fp32_sums
from distilfast.models.student import layers_of, make_student
from distilfast.models.teachers import (
    Teacher,
    choose_attention,
    load_teachers,
    teacher_identity,
)
from distilfast.models.tokenizers import fingerprint, has_words, tokenize, vocabulary_size
from distilfast.models.weights import identity, load_weights, loading, quiet

__all__ = [
    "FAMILIES",
    "Family",
    "Teacher",
    "attend",
    "check_head",
    "choose_attention",
    "family",
    "fingerprint",
    "has_words",
    "identity",
    "layers_of",
    "load_teachers",
    "load_weights",
    "loading",
    "logit_scaling",
    "logits",
    "logits_at",
    "make_student",
    "quiet",
    "spread",
    "teacher_identity",
    "tokenize",
    "use_fp32_sums",
    "vocabulary_size",
]
