"""Models of many families: taken apart, and students of some of their layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from distilfast import models
from distilfast.config import Config, ConfigError, DataConfig, StudentConfig
from distilfast.driver import checks
from distilfast.models import layers, parts, proof, student, twin

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2, "head_dim": 8}
ALTERNATING = ["full_attention", "sliding_attention"] * 3
MODERNBERT = {**SIZES, **IDS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
# Each: the class, the fields of its configuration, and what its parts are.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "RoBERTa": ("RobertaForMaskedLM", SIZES, {"chain": ("lm_head",)}),
    "ELECTRA": (
        "ElectraForMaskedLM",
        {**SIZES, "embedding_size": 16},
        {"chain": ("generator_predictions",)},
    ),
    "ALBERT": ("AlbertForMaskedLM", {**SIZES, "embedding_size": 16}, {"chain": ("predictions",)}),
    "ModernBERT": ("ModernBertForMaskedLM", MODERNBERT, {"chain": ("head",)}),
    "ESM": (
        "EsmForMaskedLM",
        {**SIZES, "pad_token_id": 1, "mask_token_id": 4},
        {"bias": "lm_head.bias"},
    ),
    "XLM": (
        "XLMWithLMHeadModel",
        {"vocab_size": 96, "emb_dim": 32, "n_layers": 6, "n_heads": 4},
        {},
    ),
    "OPT": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
        {"body": "model.decoder"},
    ),
    "Qwen2": (
        "Qwen2ForCausalLM",
        {**GROUPED, "layer_types": ALTERNATING, "use_sliding_window": True, "sliding_window": 16},
        {"chain": ()},
    ),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {**GROUPED, "layer_types": ALTERNATING, "sliding_window": 16},
        {"softcap": 30.0},
    ),
    "Granite": ("GraniteForCausalLM", {**GROUPED, "logits_scaling": 8.0}, {"scale": 0.125}),
    "Cohere": ("CohereForCausalLM", {**GROUPED, "logit_scale": 0.25}, {"scale": 0.25}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 6,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 3]],
            "window_size": 32,
        },
        {},
    ),
    "GPT-2, scaled": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 6,
            "n_head": 4,
            "scale_attn_by_inverse_layer_idx": True,
        },
        {},
    ),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        {},
    ),
    "MiniCPM3": (
        "MiniCPM3ForCausalLM",
        {
            **{k: v for k, v in GROUPED.items() if k not in ("head_dim", "num_key_value_heads")},
            "dim_model_base": 16,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        {"scale": 0.5},
    ),
}
CUTS = ([0, 2, 5], [0, 3, 4])


def make(kind: str, **changes: Any) -> Any:
    """A model whose layers, biases and norms all show in its logits."""
    name, fields, _ = KINDS[kind]
    architecture = getattr(transformers, name)
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def student_of(teacher: Any, kept: Any, **settings: Any) -> Any:
    config = StudentConfig(layers=kept, architecture="same", **settings)
    return models.make_student(teacher, config, 1)


@torch.no_grad()
def own_logits(model: Any, text: Tensor) -> Tensor:
    model.eval()
    return model(text, attention_mask=torch.ones_like(text), use_cache=False).logits


# --- Parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_found(kind: str) -> None:
    """And give the model's own logits, which `check_head` computes."""
    found = models.check_head("the model", make(kind))
    for name, wanted in KINDS[kind][2].items():
        assert getattr(found, name) == wanted


def test_nothing_of_a_model_changes_when_it_is_taken_apart() -> None:
    """Neither its mode nor its configuration nor its weights nor its forwards."""
    model = make("ESM").train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    models.check_head("the model", model)
    assert model.training
    assert config == model.config.to_dict()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_features_run_the_hooks_of_the_modules_on_the_way() -> None:
    """DeepSpeed's fetch partitioned weights. The head itself is not called."""
    model, called = make("RoBERTa"), []
    found = models.take_apart(model)
    for name in ("lm_head", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: called.append(name))
    made = found.features(torch.randn(3, 32))
    assert made.shape == (3, 32)
    assert called == ["lm_head.dense", "lm_head.layer_norm", "lm_head"]


def test_model_is_whole_again_after_an_error_in_its_head() -> None:
    model = make("RoBERTa")
    found, decoder = models.take_apart(model), model.lm_head.decoder
    with pytest.raises(RuntimeError, match="shapes"):
        found.features(torch.randn(3, 31))
    assert model.lm_head.decoder is decoder
    assert "forward" not in model.lm_head.__dict__


REFUSED = {
    "an encoder or a decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "a head that is one product": lambda: transformers.DebertaForMaskedLM(
        transformers.DebertaConfig(**SIZES, legacy=False)
    ),
    "logits of": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_model_without_such_parts_is_refused(why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^the model: expected {why}") as refused:
        models.take_apart(REFUSED[why]())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", parts.ALL_TO_ALL)
@torch.no_grad()
def test_mask_of_four_dimensions_is_taken_as_it_is(kind: str) -> None:
    """Where `attend` makes one, it means the same, to the bit."""
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    ids, mask = proof.text(model), torch.ones(2, 24, dtype=torch.int64)
    mask[1, -5:] = 0
    hidden = [model.base_model(ids, attention_mask=m)[0] for m in (mask, models.spread(mask))]
    assert torch.equal(hidden[0][mask.bool()], hidden[1][mask.bool()])
    unmasked = model.base_model(ids)[0]
    assert not torch.allclose(unmasked[1, 0], hidden[0][1, 0])


def test_softcap_that_the_class_does_not_read_is_noticed() -> None:
    """Its logits are so small that a softcap of 30 would not show."""
    model = make("Granite", logits_scaling=1e4)
    assert float(own_logits(model, proof.text(model)).abs().max()) < 30 / 180
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match=r"^the model: expected a granite with a softcap of 30, "):
        models.check_head("the model", model)
    capped = make("Gemma2")
    with torch.no_grad():
        capped.model.norm.weight.fill_(-1 + 1e-4)  # a Gemma's norm multiplies by 1 + its weight
    assert float(own_logits(capped, proof.text(capped)).abs().max()) < 30 / 180
    assert models.check_head("the model", capped).softcap == 30


# --- Students -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_student_of_all_layers_has_the_teachers_logits(kind: str) -> None:
    """To the bit."""
    teacher = make(kind)
    text = proof.text(teacher)
    assert torch.equal(own_logits(student_of(teacher, "all"), text), own_logits(teacher, text))


@pytest.mark.parametrize("kind", KINDS)
def test_student_is_the_teacher_without_the_dropped_layers(kind: str, tmp_path: Any) -> None:
    """The truth is a teacher whose dropped layers are taken out of its list, or add nothing. The
    student trains, and plain transformers loads it with the same logits."""
    teacher = make(kind)
    text = proof.text(teacher)
    for kept in CUTS:
        student = student_of(teacher, kept, dropout=0.0)
        torch.testing.assert_close(
            own_logits(student, text), proof.bypassed(teacher, kept, text), rtol=1e-4, atol=1e-4
        )
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    before = own_logits(student, text)
    student.train()(text).logits.square().mean().backward()
    optimizer.step()
    trained = own_logits(student, text)
    assert not torch.equal(before, trained)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    torch.testing.assert_close(own_logits(loaded, text), trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("Qwen2", [0, 2, 5]),
        ("Gemma2", [0, 2, 5]),
        ("GPT-Neo", [0, 2, 5]),
        ("Qwen2-MoE", [0, 2, 5]),
        ("ModernBERT", [0, 3, 4]),
    ],
)
def test_field_that_is_cut_off_is_noticed(
    kind: str, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the number of layers alone gives: the kinds of the first layers."""
    for name, empty in (("LISTS", ()), ("INDICES", ()), ("FIELDS", {})):
        monkeypatch.setattr(layers, name, empty)
    monkeypatch.setattr(layers, "_follows", lambda *_: False)
    teacher = make(kind)
    with pytest.raises(ConfigError, match=r"^student\.layers: expected "):
        student_of(teacher, kept)


def test_weights_of_another_layer_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = layers.keep_weights
    monkeypatch.setattr(layers, "keep_weights", lambda m, c, kept: keep(m, c, [0, 2, 4]))
    with pytest.raises(ConfigError, match=r"difference of .* with layers \[0, 2, 5\]"):
        student_of(make("RoBERTa"), [0, 2, 5])


def test_teacher_in_bf16_has_a_student_in_fp32() -> None:
    teacher = make("Qwen2").bfloat16()
    made = student_of(teacher, [0, 3, 4])
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    text = proof.text(teacher)
    whole = student_of(teacher, "all").eval()
    assert all(
        torch.equal(p, q)
        for p, q in zip(whole.parameters(), teacher.float().parameters(), strict=True)
    )
    wanted = proof.bypassed(whole, [0, 3, 4], text)
    torch.testing.assert_close(own_logits(made, text), wanted, rtol=1e-4, atol=1e-4)


def test_windows_are_as_before_the_proof() -> None:
    teacher = make("Gemma2")
    student = student_of(teacher, [0, 1, 4])
    for model in (teacher, student):
        assert model.config.sliding_window == 16
        windows = {m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")}
        assert windows == {16, None}
    assert student.config.layer_types == [ALTERNATING[i] for i in (0, 1, 4)]


def test_layer_that_has_to_stay_is_named() -> None:
    teacher = make("ModernBERT")
    with pytest.raises(ConfigError, match=r"such as \[0, 3, 4\], got \[1, 3, 4\]: layer 0 has to"):
        student_of(teacher, [1, 3, 4])


def test_what_a_class_says_is_one_line() -> None:
    """To a dropout that it does not have, and to a proof that its configuration does not allow."""
    torch.manual_seed(0)
    differential = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**GROUPED))
    with pytest.raises(ConfigError, match=r"^student: .* a diffllama accepts, got [^\n]*$"):
        student_of(differential, [0, 2], dropout=0.1)
    windows = {i: {"sliding_window": 8} for i in range(5)}
    config = transformers.NeoMMEConfig(**{**GROUPED, "head_dim": 16}, per_layer_config=windows)
    neomme = transformers.NeoMMEForMaskedLM(config)
    with pytest.raises(ConfigError, match=r"^student\.layers: .* a neomme .*bypassed, [^\n]*$"):
        student_of(neomme, [0, 2, 5])


@pytest.mark.parametrize("encoder_layers", [2, 4])
def test_encoder_decoder_is_refused_by_name(encoder_layers: int) -> None:
    """Also one whose two stacks differ in depth, where the decoder's alone could be cut."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=encoder_layers, decoder_layers=2, **heads
    )
    teacher = transformers.BartForConditionalGeneration(config)
    with pytest.raises(ConfigError, match=r"^student\.layers: .* got a bart, which has both"):
        student_of(teacher, [0])


def test_last_layer_of_full_attention_stays() -> None:
    """Gemma 4 would make any last layer one of full attention. `alternate` gives way to it, and the
    nearest choice is one that is taken."""
    fields = {**GROUPED, "layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 2}
    config = transformers.Gemma4TextConfig(**fields, sliding_window=8, global_head_dim=8)
    teacher = transformers.Gemma4ForCausalLM(config).eval()
    for kept in ([0, 1, 2], [0, 2, 3]):
        nearest, why = models.valid_choice(teacher, kept)
        assert nearest == [*kept[:2], 4]
        assert why is not None
        with pytest.raises(ConfigError, match=rf"such as \[{nearest[0]}, .*full attention"):
            student_of(teacher, kept)
        assert models.valid_choice(teacher, nearest) == (nearest, None)


def test_dropout_of_zero_is_zero_in_every_module() -> None:
    for kind in ("RoBERTa", "ELECTRA", "ALBERT", "OPT", "XLM", "GPT-2, scaled"):
        student = student_of(make(kind), [0, 3], dropout=0.0).train()
        text = proof.text(student)
        assert torch.equal(student(text).logits, student(text).logits), kind


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can tell"),
        ),
    ],
)
def test_teacher_of_several_dtypes_has_a_student_in_fp32_on_the_cpu(device: str) -> None:
    """Some classes keep the weights of norms in fp32 when they are loaded in bf16."""
    teacher = make("Qwen2").bfloat16().to(device)
    teacher.model.embed_tokens.float()
    made = student_of(teacher, [0, 3, 4])
    assert {(p.dtype, p.device.type) for p in made.parameters()} == {(torch.float32, "cpu")}


def test_random_student_has_the_layers_kinds_and_drawn_weights() -> None:
    teacher = make("Qwen2")
    made = [student_of(teacher, [0, 3, 4], init="random") for _ in range(2)]
    assert made[0].config.layer_types == [ALTERNATING[i] for i in (0, 3, 4)]
    for (name, a), b in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(made[0].lm_head.weight, teacher.lm_head.weight)


# --- BigBird --------------------------------------------------------------------------------------


def test_sparse_attention_is_as_before_a_model_is_taken_apart() -> None:
    """And is refused with texts that it would treat in one way first, and in another one later."""
    config = transformers.BigBirdConfig(
        **{**SIZES, "num_hidden_layers": 2},
        block_size=2,
        num_random_blocks=1,
        initializer_range=0.3,
    )
    model = transformers.BigBirdForMaskedLM(config).eval()
    text = torch.randint(16, 96, (1, 32), generator=torch.Generator().manual_seed(0))
    before = own_logits(model, text)
    models.check_head("the model", model)
    assert torch.equal(own_logits(model, text), before)
    teacher = models.Teacher("bird", 1.0, model, True)
    checks.check_teachers(Config(data=DataConfig(max_length=14), steps=1), [teacher])
    with pytest.raises(
        ConfigError, match=r"^data\.max_length: expected at most 14 with the sparse"
    ):
        checks.check_teachers(Config(data=DataConfig(max_length=15), steps=1), [teacher])
    own_logits(model, text[:, :14])
    assert not torch.allclose(own_logits(model, text), before, atol=0.1)


# --- Large teachers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_large_teacher_is_proven_on_its_twin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student still has the teacher's own weights."""
    ran: list[Any] = []
    prove = proof.prove
    monkeypatch.setattr(student, "LARGEST", 0)
    monkeypatch.setattr(student, "prove", lambda t, *rest: (ran.append(t), prove(t, *rest)))
    teacher = make(kind)
    text = proof.text(teacher)
    made = own_logits(student_of(teacher, [0, 3, 4]), text)
    torch.testing.assert_close(made, proof.bypassed(teacher, [0, 3, 4], text), rtol=1e-4, atol=1e-4)
    (model,) = ran
    assert model is not teacher
    assert type(model) is type(teacher)
    assert sum(p.numel() for p in model.parameters()) < 1e6


def test_twin_of_a_large_model_is_narrow() -> None:
    """Of an 8B Llama on the meta device: nothing of its size is made."""
    with torch.device("meta"):
        config = transformers.LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14_336,
        )
        large = transformers.LlamaForCausalLM(config)
    made = twin.narrow_twin(large)
    assert sum(p.numel() for p in large.parameters()) > 8e9
    assert sum(p.numel() for p in made.parameters()) < 1e7
    assert (made.config.num_hidden_layers, made.config.hidden_size) == (32, 256)
    kept = list(range(0, 32, 2))
    proof.prove(made, student_of(made, kept), kept)


NARROWED: dict[str, tuple[str, dict[str, Any]]] = {
    "no heads": ("MambaForCausalLM", {"hidden_size": 64, "state_size": 4}),
    "a rotary part": ("GPTJForCausalLM", {"n_embd": 128, "n_head": 4, "rotary_dim": 16}),
    "a head that follows": (
        "FalconForCausalLM",
        {"hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 4096},
    ),
    "latent attention": (
        "DeepseekV3ForCausalLM",
        {
            **{**GROUPED, "num_key_value_heads": 4, "head_dim": None, "hidden_size": 128},
            **{"moe_intermediate_size": 64, "n_routed_experts": 16, "first_k_dense_replace": 2},
        },
    ),
}


@pytest.mark.parametrize("kind", NARROWED)
def test_widths_that_follow_from_others_are_narrow_in_the_twin(kind: str) -> None:
    name, fields = NARROWED[kind]
    architecture = getattr(transformers, name)
    config = architecture.config_class(**{"num_hidden_layers": 6, **fields, "vocab_size": 5000})
    large = architecture(config)
    made = twin.narrow_twin(large)
    numbers = [sum(p.numel() for p in model.parameters()) for model in (made, large)]
    assert numbers[0] < numbers[1] / 3
    proof.prove(made, student_of(made, [0, 3, 4]), [0, 3, 4])


def test_teacher_that_has_no_twin_is_proven_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> Any:
        raise ConfigError("student.layers: no twin")

    ran: list[Any] = []
    prove = proof.prove
    monkeypatch.setattr(student, "LARGEST", 0)
    monkeypatch.setattr(student, "narrow_twin", refuse)
    monkeypatch.setattr(student, "prove", lambda t, *rest: (ran.append(t), prove(t, *rest)))
    teacher = make("RoBERTa")
    student_of(teacher, [0, 3])
    assert ran == [teacher]


def test_model_that_exists_is_not_made_of_layers() -> None:
    with pytest.raises(ConfigError, match=r"^student\.model: expected null, .* got 'other'"):
        models.make_student(make("RoBERTa"), StudentConfig(model="other"), 1)


def test_teacher_without_its_weights_is_refused() -> None:
    with torch.device("meta"):
        teacher = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"^student\.layers: expected a roberta with its weights"):
        student_of(teacher, [0, 3])


def test_mistake_is_noticed_on_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "LARGEST", 0)
    monkeypatch.setattr(layers, "LISTS", ())
    monkeypatch.setattr(layers, "_follows", lambda *_: False)
    teacher, prove = make("Qwen2"), proof.prove
    # Only the twin is asked: what it shows is not given a second chance.
    monkeypatch.setattr(student, "prove", lambda t, *rest: t is teacher or prove(t, *rest))
    with pytest.raises(ConfigError, match=r"^student\.layers: expected "):
        student_of(teacher, [0, 2, 5])
