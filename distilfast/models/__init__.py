"""Teachers and students: take a model apart, load a teacher, make a student from its layers or load
one.

Models are taken apart by following their own code (`parts.py`), and students are proven against
their teacher (`proof.py`), so a family need not be known by name. What only one family does with
its layers is a row in `exceptions.py`.
"""

from distilfast.models.attention import check_causal, packs
from distilfast.models.casting import cast, kept_buffers
from distilfast.models.fp32_sums import use_fp32_sums
from distilfast.models.heads import check_head
from distilfast.models.layers import depth, valid_choice
from distilfast.models.parts import Head, Parts, attend, spread, take_apart
from distilfast.models.positions import longest_steady_text, most_positions, set_padding
from distilfast.models.pretrained import load_student, student_identity
from distilfast.models.student import (
    checkpoint_activations,
    kept_layers,
    layers_of,
    make_student,
)
from distilfast.models.teachers import (
    Teacher,
    choose_attention,
    load_teachers,
    teacher_identity,
    teacher_objective,
)
from distilfast.models.tokenizers import fingerprint, has_words, tokenize, vocabulary_size
from distilfast.models.weights import identity, load_weights, loading, quiet

__all__ = [
    "Head",
    "Parts",
    "Teacher",
    "attend",
    "cast",
    "check_causal",
    "check_head",
    "checkpoint_activations",
    "choose_attention",
    "depth",
    "fingerprint",
    "has_words",
    "identity",
    "kept_buffers",
    "kept_layers",
    "layers_of",
    "load_student",
    "load_teachers",
    "load_weights",
    "loading",
    "longest_steady_text",
    "make_student",
    "most_positions",
    "packs",
    "quiet",
    "set_padding",
    "spread",
    "student_identity",
    "take_apart",
    "teacher_identity",
    "teacher_objective",
    "tokenize",
    "use_fp32_sums",
    "valid_choice",
    "vocabulary_size",
]
