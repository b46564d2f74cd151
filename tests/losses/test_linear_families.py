"""The fused head at the models that have one: Llama-, Gemma-2- and Granite-like, and BERT.

Each family's own logits are the truth. Some scale them, some cap them, some tie the head to the
embeddings, some have a bias; whoever forgets one of these distils from other logits.
"""

from __future__ import annotations

import pytest
import torch

from distilfast import distillation_loss, linear_distillation_loss
from distilfast.losses import backends

VOCAB, ROWS = 96, (3, 7)
COMMON = {
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


class Model:
    """A model, and what the fused head has to know of it."""

    def __init__(self, name, width, seed, *, tied=True, dtype=torch.float32):
        import transformers as hf

        torch.manual_seed(seed)
        self.scale, self.softcap = 1.0, None
        if name == "bert":
            shape = {
                k: v for k, v in COMMON.items() if "head_dim" not in k and "key_value" not in k
            }
            config = hf.BertConfig(hidden_size=width, **shape, tie_word_embeddings=tied)
            self.model = hf.BertForMaskedLM(config)
        elif name == "gemma2":
            config = hf.Gemma2Config(
                hidden_size=width, **COMMON, tie_word_embeddings=tied, final_logit_softcapping=2.5
            )
            self.model, self.softcap = hf.Gemma2ForCausalLM(config), 2.5
        elif name == "granite":
            config = hf.GraniteConfig(
                hidden_size=width, **COMMON, tie_word_embeddings=tied, logits_scaling=8.0
            )
            self.model, self.scale = hf.GraniteForCausalLM(config), 1 / 8
        else:
            config = hf.LlamaConfig(hidden_size=width, **COMMON, tie_word_embeddings=tied)
            self.model = hf.LlamaForCausalLM(config)
        self.model = self.model.to(dtype).eval()
        self.name = name

    def hidden(self, ids):
        if self.name == "bert":
            states = self.model.bert(ids).last_hidden_state
            return self.model.cls.predictions.transform(states)
        return self.model.model(ids).last_hidden_state

    @property
    def head(self):
        return self.model.get_output_embeddings()

    @property
    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def both_losses(student, teacher, backend, **keywords):
    """(loss, gradients of all parameters) of the model's own logits, and of the fused head."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, ROWS, generator=generator)
    labels = torch.randint(VOCAB, ROWS, generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.5] = -100
    mask = torch.rand(ROWS, generator=generator) < 0.8
    keywords = {"ce_weight": 1.0, "mask": mask, "backend": backend, **keywords}
    with torch.no_grad():
        teacher_logits, teacher_hidden = teacher.model(ids).logits, teacher.hidden(ids)
    found = []
    dense = distillation_loss(student.model(ids).logits, teacher_logits, labels, **keywords)
    fused = linear_distillation_loss(
        student.hidden(ids),
        student.head.weight,
        teacher_hidden,
        teacher.head.weight,
        labels,
        student_bias=student.head.bias,
        teacher_bias=teacher.head.bias,
        logit_scale=(student.scale, teacher.scale),
        logit_softcap=(student.softcap, teacher.softcap),
        chunk_rows=8,
        **keywords,
    )
    for output in (dense, fused):
        gradients = torch.autograd.grad(output.loss, student.trained, allow_unused=True)
        used = [g.flatten() for g in gradients if g is not None]
        found.append((output, torch.cat(used).double()))
    return found


@pytest.fixture(params=[name for name in backends.usable() if name != "triton"])
def host(request):
    """The backends that take seconds for all of these; what the kernels make of a scale or a cap
    is test_heads' business."""
    return request.param


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("teacher", ["llama", "gemma2", "granite", "bert"])
@pytest.mark.parametrize("student", ["llama", "gemma2", "granite", "bert"])
def test_fused_head_equals_the_models_own_logits(host, student, teacher, tied):
    models = Model(student, 32, 1, tied=tied), Model(teacher, 48, 2, tied=not tied)
    (dense, wanted), (fused, got) = both_losses(*models, host, divergence="reverse_kl")
    torch.testing.assert_close(fused[:5], dense[:5], rtol=2e-5, atol=2e-5)
    assert (got - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("student", ["llama", "gemma2", "granite", "bert"])
def test_bf16_models_stay_within_their_rounding(host, student):
    # the models' own logits are rounded after bias, scale and cap; the fused head's once, before
    exact = Model(student, 32, 1), Model("gemma2", 48, 2)
    for model in exact:
        model.model.to(torch.bfloat16).to(torch.float32)
    (_, wanted), _ = both_losses(*exact, host)
    rounded = (
        Model(student, 32, 1, dtype=torch.bfloat16),
        Model("gemma2", 48, 2, dtype=torch.bfloat16),
    )
    (_, dense), (_, fused) = both_losses(*rounded, host)
    error_dense, error_fused = (dense - wanted).norm(), (fused - wanted).norm()
    assert error_fused <= 1.2 * error_dense + 2**-9 * wanted.norm()


@pytest.mark.parametrize("forgotten", ["scale", "softcap"])
def test_forgetting_what_a_head_does_shows(host, forgotten):
    # the tests above can fail: without its scale or cap a teacher is another one
    name = {"scale": "granite", "softcap": "gemma2"}[forgotten]
    student, teacher = Model("llama", 32, 1), Model(name, 48, 2)
    setattr(teacher, forgotten, {"scale": 1.0, "softcap": None}[forgotten])
    (dense, _), (fused, _) = both_losses(student, teacher, host)
    assert abs(fused.kd - dense.kd) > 0.05 * dense.kd
