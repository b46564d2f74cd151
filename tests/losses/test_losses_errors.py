"""Bad calls: every ValueError of docs/losses.md says the argument, what was expected, what came."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from oracle import INF, NAN, logits_pair, make_labels, value_error

from distilfast import (
    DistillationLoss,
    combine_teachers,
    distillation_loss,
    hidden_cosine_loss,
    linear_distillation_loss,
)

WEIGHTS = ("kd_weight", "ce_weight", "cos_weight", "mse_weight")


@pytest.fixture
def call(backend, device):
    """distillation_loss of a (2, 3, 11) pair with labels, one argument of which a test spoils."""
    student, teacher = logits_pair((2, 3, 11), device=device)
    arguments = {
        "student_logits": student,
        "teacher_logits": teacher,
        "labels": make_labels((2, 3), 11, "all", device),
        "ce_weight": 1.0,
        "backend": backend,
    }

    def call(**changes):
        return distillation_loss(**{**arguments, **changes})

    call()  # unspoiled it works
    return call


# Shapes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("teacher_logits", shape) for shape in ((3, 2, 11), (2, 4, 11), (6, 11), (11,))),
        # (2,) and () would broadcast, silently giving every token the same label
        *(("labels", shape) for shape in ((3, 2), (6,), (2, 3, 1), (2,), ())),
        *(("mask", shape) for shape in ((3, 2), (6,), (2, 3, 1), (3,), ())),
    ],
)
def test_another_leading_shape_is_refused(call, device, name, shape):
    dtype = {"labels": torch.int64, "mask": torch.bool}.get(name)
    lead = shape[:-1] if name == "teacher_logits" else shape
    with value_error(name, "2, 3", str(lead).strip("(,)")):
        call(**{name: torch.ones(shape, dtype=dtype, device=device)})


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_logits_without_a_vocabulary_are_refused(call, device, name):
    with value_error(name):
        call(**{name: torch.tensor(1.0, device=device)})


@pytest.mark.parametrize("name", ["kd_normalizer", "ce_normalizer"])
@pytest.mark.parametrize("shape", [(1,), (2, 3)], ids=str)
def test_normalizer_with_dimensions_is_refused(call, device, name, shape):
    with value_error(name, str(shape).strip("(,)")):
        call(**{name: torch.ones(shape, device=device)})


# The vocabulary


def test_different_vocabularies_need_vocab_size(call, device):
    # padding a smaller vocabulary in silence scores columns that do not exist
    with value_error("vocab_size", 11, 13):
        call(teacher_logits=torch.randn(2, 3, 13, device=device))


@pytest.mark.parametrize("vocab_size", [12, 999])
def test_vocab_size_beyond_the_logits_is_refused(call, device, vocab_size):
    with value_error("vocab_size", vocab_size, 11):
        call(vocab_size=vocab_size)
    with value_error("vocab_size", vocab_size, 11):  # the teacher is wide enough, alone
        call(vocab_size=vocab_size, teacher_logits=torch.randn(2, 3, 1000, device=device))


# Dtypes and devices


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("student_logits", dtype) for dtype in (torch.int64, torch.bool, torch.complex64)),
        *(("teacher_logits", dtype) for dtype in (torch.int64, torch.bool, torch.complex64)),
        *(("labels", dtype) for dtype in (torch.float32, torch.int32, torch.bool)),
        # an attention mask of int64 is asked to say what it means
        *(("mask", dtype) for dtype in (torch.int64, torch.uint8, torch.complex64)),
    ],
)
def test_another_dtype_is_refused(call, device, name, dtype):
    shape = (2, 3, 11) if name.endswith("logits") else (2, 3)
    expected = {"labels": "int64", "mask": "; use .bool"}.get(name, "")
    with value_error(name, expected, str(dtype).removeprefix("torch.")):
        call(**{name: torch.ones(shape, device=device).to(dtype)})


def test_tensor_in_place_of_a_number_is_named_by_its_shape(call):
    with value_error("kd_weight: expected a finite number >= 0, got a tensor of shape 5, 2"):
        call(kd_weight=torch.ones(5, 2))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("teacher_logits", torch.float32), ("labels", torch.int64), ("mask", torch.bool)],
)
def test_tensor_on_another_device_is_refused(call, device, name, dtype):
    shape = (2, 3, 11) if name == "teacher_logits" else (2, 3)
    with value_error(name, "meta", device):
        call(**{name: torch.empty(shape, dtype=dtype, device="meta")})


# Numbers and names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (0.0, -1.5, NAN, INF, -INF)),
        *((name, value) for name in WEIGHTS for value in (-0.5, NAN, INF)),
        *(("vocab_size", value) for value in (0, -5)),
        *(("jsd_beta", value) for value in (0.0, 1.0, -0.25, 1.5, NAN)),
    ],
)
def test_number_out_of_range_is_refused(call, name, value):
    with value_error(name, value):
        call(**{"divergence": "jsd", name: value})


def test_all_weights_zero_is_refused(call):
    with value_error(*WEIGHTS):
        call(**dict.fromkeys(WEIGHTS, 0.0))


def test_ce_weight_without_labels_is_refused(call):
    with value_error("ce_weight", "labels"):
        call(labels=None)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("labels", {"ce_weight": 0.0}),
        ("ce_normalizer", {"ce_weight": 0.0, "labels": None}),
        ("mask", {"kd_weight": 0.0}),
        ("kd_normalizer", {"kd_weight": 0.0}),
    ],
)
def test_argument_that_nothing_reads_is_refused(call, device, name, weights):
    # a mask that ce alone leaves unread, or labels without a weight, look as if they counted
    given = {"mask": torch.ones(2, 3, device=device), "kd_normalizer": 6, "ce_normalizer": 6}
    with value_error(name, "expected None", *weights.keys() & set(WEIGHTS)):
        call(**weights, **{k: v for k, v in given.items() if k == name})


@pytest.mark.parametrize(
    "name", ["teacher_hidden", "teacher_weight", "teacher_bias", "teacher_weights", "labels"]
)
def test_argument_that_nothing_reads_is_refused_by_the_fused_head(name):
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    given = {
        "teacher_hidden": hidden,
        "teacher_weight": weight,
        "teacher_bias": torch.ones(5),
        "teacher_weights": [1.0],
        "labels": torch.ones(2, dtype=torch.int64),
    }
    of_a_teacher = {k: v for k, v in given.items() if k != name and name == "labels"}
    weights = {"kd_weight": float(name == "labels"), "ce_weight": float(name != "labels")}
    arguments = {
        **dict.fromkeys(("teacher_hidden", "teacher_weight")),
        **of_a_teacher,
        **({} if name == "labels" else {"labels": given["labels"]}),
        name: given[name],
    }
    with value_error(name, "expected None"):
        linear_distillation_loss(hidden, weight, **arguments, **weights)


@pytest.mark.parametrize("name", ["kd_normalizer", "ce_normalizer"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_normalizer_without_mean_is_refused(call, name, reduction):
    with value_error(name, "mean", reduction):
        call(**{name: 8}, reduction=reduction)


@pytest.mark.parametrize("value", [-0.5, NAN, INF], ids=str)
def test_row_weight_must_be_finite_and_not_negative(call, device, value):
    if device != "cpu":
        pytest.skip("reading the mask would wait for the GPU")
    mask = torch.ones(2, 3)
    mask[1, 2] = value
    with value_error("mask", value):
        call(mask=mask)


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("divergence", "kl", "forward_kl"),
        ("divergence", "Forward_KL", "forward_kl"),
        ("reduction", "batchmean", "mean"),
        ("reduction", None, "none"),
        ("backend", "numpy", "torch"),
    ],
)
def test_unknown_name_is_refused_with_the_known_ones(call, name, value, known):
    with value_error(name, value, known):
        call(**{name: value})


def test_unknown_keyword_is_refused(call):
    with pytest.raises(TypeError, match="temprature"):
        call(temprature=2.0)


# Sharded tensors


@pytest.fixture
def one_rank_mesh():
    """A process group of this process alone: enough to make a DTensor."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    if dist.is_initialized():
        pytest.skip("a process group is already there")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "labels", "mask"])
def test_dtensor_is_refused(one_rank_mesh, name):
    # local shards look like whole rows: the softmax would run over a part of the vocabulary
    from torch.distributed.tensor import Shard, distribute_tensor

    student, teacher = logits_pair((2, 11))
    arguments = {
        "student_logits": student,
        "teacher_logits": teacher,
        "labels": make_labels((2,), 11, "all"),
        "mask": torch.ones(2),
    }
    shard = distribute_tensor(arguments[name], one_rank_mesh, [Shard(arguments[name].dim() - 1)])
    with value_error(name, "DTensor"):
        distillation_loss(**{**arguments, name: shard}, ce_weight=1.0, backend="torch")


def test_dtensor_is_refused_by_the_other_losses(one_rank_mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, other = logits_pair((2, 6))
    weight = torch.randn(11, 6)
    shard_of = {  # the tensor-parallel head is the usual way to get one
        name: distribute_tensor(tensor, one_rank_mesh, [Shard(0)])
        for name, tensor in {"hidden": hidden, "weight": weight}.items()
    }
    with value_error("student_hidden", "DTensor"):
        hidden_cosine_loss(shard_of["hidden"], other, backend="torch")
    with value_error("student_weight", "DTensor"):
        linear_distillation_loss(hidden, shard_of["weight"], other, weight, backend="torch")
    with value_error("teacher_hidden", "DTensor"):
        linear_distillation_loss(hidden, weight, shard_of["hidden"], weight, backend="torch")
    with value_error("DTensor"):
        combine_teachers([hidden, shard_of["hidden"]], temperature=2.0)


# The module


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"kd_weight": -1.0}, "kd_weight"),
        ({"mse_weight": NAN}, "mse_weight"),
        ({"kd_weight": 0.0}, "kd_weight"),  # nothing is left
        ({"divergence": "tv"}, "divergence"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"backend": "numpy"}, "backend"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
    ids=str,
)
def test_module_refuses_bad_keywords_at_construction(keywords, name):
    # a typo in a recipe shows before the data are read, not at the first step
    with value_error(name):
        DistillationLoss(**keywords)


def test_module_refuses_unknown_keywords_at_construction():
    with pytest.raises((TypeError, ValueError), match="temprature"):
        DistillationLoss(temprature=2.0)


def test_module_without_labels_is_refused_at_the_call(backend, device):
    student, teacher = logits_pair((2, 11), device=device)
    module = DistillationLoss(ce_weight=1.0, backend=backend)
    with value_error("ce_weight", "labels"):
        module(student, teacher)
