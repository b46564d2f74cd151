"""Teachers and students: what differs between model families, and how a student is made.

A new family is one row in FAMILIES: where a masked-LM model of it keeps its body, its head and its
layers. Everything else about a model is transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.config import ConfigError, StudentConfig, TeacherSpec
from distilfast.sources import lookup as names


@dataclass(frozen=True)
class Family:
    """How a masked-LM model of a family is taken apart.

    hidden: (model, input_ids, attention_mask) -> (B, L, D), the last hidden states. The mask is
        (B, L), or None where nothing is padding; `attend` is for bodies without other masks.
    features: (model, (n, D)) -> (n, D), what the head's product over the vocabulary is applied to.
    head: the nn.Linear of that product; its weight may be tied to the embeddings.
    layers: prefix of the layers' names in the state dict.
    head_prefix: prefix of the head's own names.
    n_layers, dropouts: names in the model's config.
    logit_scale, logit_softcap: of the model's config; the product is multiplied by the scale, and
        with a softcap c becomes c tanh(product / c).
    """

    hidden: Callable[[Any, Tensor, Tensor | None], Tensor]
    features: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any], nn.Linear]
    layers: str
    head_prefix: str
    transform: tuple[str, ...]
    n_layers: str
    dropouts: tuple[str, str]
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    logit_softcap: Callable[[Any], float | None] = lambda config: None


def attend(model: Any, mask: Tensor | None) -> Tensor | None:
    """The attention mask to give to a body in which every token attends to every other.

    transformers reads a (B, L) mask to see whether anything is padding, and waits for the GPU to do
    so, in every forward. It takes a (B, 1, L, L) one as it is.

    Args:
        mask: (B, L), 0 at the padding; None: nothing is padding.
    """
    if mask is None or mask.device.type == "cpu":
        return mask
    causal = getattr(model.config, "is_decoder", False)
    if causal or model.config._attn_implementation != "sdpa":
        return mask
    return spread(mask)


def spread(mask: Tensor) -> Tensor:
    """(B, 1, L, L) bool, what transformers makes of a (B, L) mask for PyTorch's fused attention."""
    batch, length = mask.shape
    return mask.bool()[:, None, None, :].expand(batch, 1, length, length)


def _distilbert_features(model: Any, hidden: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


FAMILIES = {
    "bert": Family(
        hidden=lambda m, ids, mask: m.bert(ids, attention_mask=attend(m, mask)).last_hidden_state,
        features=lambda m, hidden: m.cls.predictions.transform(hidden),
        head=lambda m: m.cls.predictions.decoder,
        layers="bert.encoder.layer.",
        head_prefix="cls.predictions.",
        transform=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        n_layers="num_hidden_layers",
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "distilbert": Family(
        hidden=lambda m, ids, mask: (
            m.distilbert(ids, attention_mask=attend(m, mask)).last_hidden_state
        ),
        features=_distilbert_features,
        head=lambda m: m.vocab_projector,
        layers="distilbert.transformer.layer.",
        head_prefix="vocab_",
        transform=("vocab_transform", "vocab_layer_norm"),
        n_layers="n_layers",
        dropouts=("dropout", "attention_dropout"),
    ),
}


def family(model: Any) -> Family:
    return FAMILIES[model.config.model_type]


def logit_scaling(model: Any) -> tuple[float, float | None]:
    """The scale and the softcap of its logits."""
    parts = family(model)
    return parts.logit_scale(model.config), parts.logit_softcap(model.config)


def logits_at(model: Any, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor) -> Tensor:
    """The logits at some of the B x L positions, (n, V), by way of `Family`: what
    `linear_distillation_loss` computes chunk by chunk, with the head's weight read as it is
    there."""
    parts = family(model)
    hidden = parts.hidden(model, input_ids, attention_mask).flatten(0, 1)
    return logits(model, parts.features(model, hidden[rows]), parts.head(model))


def logits(model: Any, features: Tensor, head: nn.Linear) -> Tensor:
    """What a model makes of (n, D) features with its head, or a copy of that, (n, V)."""
    product = nn.functional.linear(features, head.weight, head.bias)
    scale, softcap = logit_scaling(model)
    if scale != 1:
        product = product * scale
    return product if softcap is None else softcap * torch.tanh(product / softcap)


# --- That a family's head is all there is between hidden states and logits ------------------------

# Of the largest logit. The same head in another order of summation differs by 6e-7 (measured up to
# 768 wide); a softcap c shows once the largest logit is beyond c / 180.
HEAD_TOLERANCE = 1e-5


@torch.no_grad()
def check_head(what: str, model: Any, tokenizer: Any) -> None:
    """That `logits_at` gives the model's own logits, tried on 13 tokens (0.14 s for a BERT-base on
    one core): a head that does more would be distilled wrongly, in silence.

    Args:
        what: the model's name in the error.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    width = min(8, model.config.max_position_embeddings)
    input_ids = torch.linspace(0, len(tokenizer) - 1, 2 * width).long().view(2, width)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -3:] = 0
    rows = attention_mask.flatten().nonzero()[:, 0]
    training = model.training
    model.eval()
    own = model(input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[rows]
    ours = logits_at(model, input_ids, attention_mask, rows)
    model.train(training)
    if not own.isfinite().all():
        raise ConfigError(f"{what}: expected finite logits, got NaN or inf")
    difference = _difference(own, ours)
    if not difference <= HEAD_TOLERANCE:
        raise ConfigError(
            f"{what}: expected the logits of a {model.config.model_type} to be its head's product, "
            f"got a difference of {difference:.1e} of the largest logit, probably "
            f"{_cause(own, ours)}; its row of FAMILIES in distilfast/models.py has to say so"
        )


def _difference(own: Tensor, ours: Tensor) -> float:
    """The largest, over the largest logit."""
    smallest = torch.finfo(own.dtype).tiny
    return float((own - ours).abs().max() / own.abs().max().clamp_min(smallest))


def _cause(own: Tensor, ours: Tensor) -> str:
    """What explains the difference."""
    scale = float((own * ours).sum() / (ours * ours).sum())
    softcap = _softcap(own, ours)
    explained = {
        f"a logit_scale of {scale:.4g}": ours * scale,
        f"a logit_softcap of {softcap:.4g}": softcap * torch.tanh(ours / softcap),
        "a bias added after the product": ours + (own - ours).mean(0),
    }
    for cause, logits in explained.items():
        if _difference(own, logits) <= HEAD_TOLERANCE:
            return cause
    return "another layer before the product, such as a norm, or several things at once"


def _softcap(own: Tensor, ours: Tensor) -> float:
    """The c for which c tanh(product / c) is the model's own logit where the product is largest,
    by bisection: it rises with c."""
    place = ours.abs().argmax()
    product, logit = float(ours.abs().flatten()[place]), float(own.abs().flatten()[place])
    low, high = 1e-3 * product, 1e3 * product
    for _ in range(60):
        middle = (low + high) / 2
        capped = middle * math.tanh(product / middle)
        low, high = (middle, high) if capped < logit else (low, middle)
    return high


@dataclass(frozen=True)
class Teacher:
    """A teacher as loaded: fp32, in eval mode, without gradients."""

    name: str
    weight: float  # its share of the ensemble, as given
    model: Any
    has_head: bool  # whether the checkpoint came with a masked-LM head


def load_teachers(specs: Sequence[TeacherSpec]) -> tuple[list[Teacher], Any]:
    """The teachers and the tokenizer that they share.

    Raises:
        ConfigError: a folder that is missing, a hub that does not answer, a family or tokenizer
            that does not fit.
    """
    from distilfast.data import fingerprint

    loaded = [_load(spec) for spec in specs]
    tokenizer = loaded[0][1]
    for teacher, other in loaded:
        if fingerprint(other) != fingerprint(tokenizer):
            raise ConfigError(
                f"teacher: expected one vocabulary, got {loaded[0][0].name!r} with "
                f"{len(tokenizer)} tokens and {teacher.name!r} with {len(other)}, not the same"
            )
        if len(other) > teacher.model.config.vocab_size:
            raise ConfigError(
                f"teacher: {teacher.name!r} has embeddings for {teacher.model.config.vocab_size} "
                f"tokens, its tokenizer {len(other)}"
            )
    missing = [
        n for n in ("cls", "sep", "mask", "pad") if tokenizer.__getattr__(f"{n}_token_id") is None
    ]
    if missing:
        raise ConfigError(f"teacher: the tokenizer of {specs[0].name!r} has no {missing} token")
    return [teacher for teacher, _ in loaded], tokenizer


def _load(spec: TeacherSpec) -> tuple[Teacher, Any]:
    import transformers

    source = names.model_source("teacher", spec.name, spec.revision)
    revision = spec.revision if source == spec.name else None
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=False
            )
            if config.model_type not in FAMILIES:
                raise ConfigError(
                    f"teacher: expected a model of type {', '.join(FAMILIES)}, got "
                    f"{spec.name!r} of type {config.model_type!r}"
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            model, info = transformers.AutoModelForMaskedLM.from_pretrained(
                source, revision=revision, dtype=torch.float32, output_loading_info=True
            )
    except ConfigError:
        raise
    except loading_errors() as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"teacher: {spec.name!r} cannot be loaded: {message}") from error
    parts = FAMILIES[config.model_type]
    if not getattr(tokenizer, "is_fast", False) or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"teacher: {spec.name!r} has no (fast) tokenizer")
    own = [k for k in info["missing_keys"] if not k.startswith(parts.head_prefix)]
    if own:
        raise ConfigError(f"teacher: {spec.name!r} lacks weights: {', '.join(sorted(own)[:3])} ...")
    has_head = not any(k.startswith(parts.transform) for k in info["missing_keys"])
    if not has_head:
        start_transform(model)
    return Teacher(spec.name, spec.weight, model.eval().requires_grad_(False), has_head), tokenizer


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers raises over files that are damaged or do not fit together."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    own = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError)
    return (*own, StrictDataclassError, SafetensorError)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' load report and progress bars; what matters in them is checked here."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


# Up to this length, on a CPU, the backward of PyTorch's fused attention takes longer than plain
# products do (a three-layer student, 32 x 128 tokens, bf16: 380 ms a step with it, 228 without).
SHORT = 128


def choose_attention(model: Any, device: torch.device, max_length: int) -> None:
    """The attention that is faster to train with."""
    if device.type == "cpu" and max_length <= SHORT:
        model.set_attn_implementation("eager")


def start_transform(model: Any) -> None:
    """A masked-LM transform that was never trained starts at the identity: an encoder whose hidden
    states already resemble its embeddings then starts far ahead of a random one."""
    dense, norm = (model.get_submodule(name) for name in family(model).transform)
    with torch.no_grad():
        nn.init.eye_(dense.weight)
        for zero in (dense.bias, norm.bias, family(model).head(model).bias):
            if zero is not None:
                zero.zero_()
        norm.weight.fill_(1)


# --- The student ----------------------------------------------------------------------------------


def layers_of(config: StudentConfig, n_layers: int) -> list[int]:
    """The teacher's layers that the student keeps. Of 12, alternate is [0, 2, 4, 7, 9, 11].

    Raises:
        ConfigError: an index outside the teacher.
    """
    if config.layers == "all":
        return list(range(n_layers))
    if config.layers == "alternate":
        spaced = torch.linspace(0, n_layers - 1, -(-n_layers // 2), dtype=torch.float64)
        return spaced.round().long().tolist()
    for layer in config.layers:
        if not isinstance(layer, int) or layer >= n_layers:
            raise ConfigError(
                f"student.layers: expected indices 0 to {n_layers - 1} of the teacher's {n_layers} "
                f"layers, got {config.layers}"
            )
    return list(config.layers)


def make_student(teacher: Any, config: StudentConfig, seed: int) -> Any:
    """A student of the teacher's family (a DistilBERT for a BERT), fp32.

    Args:
        teacher: a masked-LM model.
        config: layers, where the weights come from, and so on.
        seed: of a random initialisation.

    Raises:
        ConfigError: a layer outside the teacher, or an architecture that cannot hold it.
    """
    kind = teacher.config.model_type
    layers = layers_of(config, getattr(teacher.config, family(teacher).n_layers))
    to_distilbert = kind == "bert" and config.architecture in ("auto", "distilbert")
    if config.architecture == "distilbert" and kind not in ("bert", "distilbert"):
        raise ConfigError(f"student.architecture: expected same for a {kind} teacher")
    make_config = _distilbert_config if to_distilbert else _same_config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        student_config = make_config(teacher.config, len(layers), config.dropout)
        student = (
            type(teacher)(student_config) if not to_distilbert else _distilbert(student_config)
        )
    if config.init == "random":
        return student.train()
    state = _keep_layers(teacher.state_dict(), family(teacher).layers, layers)
    if to_distilbert:
        state = _bert_to_distilbert(state, config.fold_token_type)
    if not config.copy_mlm_transform:
        drop = family(student).transform
        state = {name: value for name, value in state.items() if not name.startswith(drop)}
    missing, unexpected = student.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    allowed = () if config.copy_mlm_transform else family(student).transform
    assert all(name.startswith(allowed) for name in missing), missing
    student.tie_weights()
    return student.train()


def _same_config(teacher: Any, n_layers: int, dropout: float | None) -> Any:
    parts = FAMILIES[teacher.model_type]
    config = type(teacher).from_dict(teacher.to_dict())
    setattr(config, parts.n_layers, n_layers)
    if dropout is not None:
        for name in parts.dropouts:
            setattr(config, name, dropout)
    return config


def _distilbert_config(teacher: Any, n_layers: int, dropout: float | None) -> Any:
    import transformers

    if teacher.layer_norm_eps != 1e-12:
        raise ConfigError(
            "student.architecture: expected same, since DistilBERT's LayerNorms have eps 1e-12 and "
            f"the teacher's {teacher.layer_norm_eps}"
        )
    return transformers.DistilBertConfig(
        vocab_size=teacher.vocab_size,
        max_position_embeddings=teacher.max_position_embeddings,
        n_layers=n_layers,
        n_heads=teacher.num_attention_heads,
        dim=teacher.hidden_size,
        hidden_dim=teacher.intermediate_size,
        dropout=teacher.hidden_dropout_prob if dropout is None else dropout,
        attention_dropout=teacher.attention_probs_dropout_prob if dropout is None else dropout,
        activation=teacher.hidden_act,
        initializer_range=teacher.initializer_range,
        pad_token_id=teacher.pad_token_id,
        tie_word_embeddings=teacher.tie_word_embeddings,
    )


def _distilbert(config: Any) -> Any:
    import transformers

    return transformers.DistilBertForMaskedLM(config)


def _keep_layers(state: dict[str, Tensor], prefix: str, layers: list[int]) -> dict[str, Tensor]:
    """The state dict with the chosen layers alone, numbered anew."""
    kept = {}
    for name, value in state.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in layers:
                continue
            name = f"{prefix}{layers.index(int(number))}.{rest}"
        kept[name] = value
    return kept


# BERT's names, in the order in which they are replaced, and DistilBERT's.
_RENAMED = (
    ("bert.encoder.layer.", "distilbert.transformer.layer."),
    ("bert.embeddings.", "distilbert.embeddings."),
    ("attention.self.query", "attention.q_lin"),
    ("attention.self.key", "attention.k_lin"),
    ("attention.self.value", "attention.v_lin"),
    ("attention.output.dense", "attention.out_lin"),
    ("attention.output.LayerNorm", "sa_layer_norm"),
    ("intermediate.dense", "ffn.lin1"),
    ("output.dense", "ffn.lin2"),
    ("output.LayerNorm", "output_layer_norm"),
    ("cls.predictions.transform.dense", "vocab_transform"),
    ("cls.predictions.transform.LayerNorm", "vocab_layer_norm"),
    ("cls.predictions.decoder", "vocab_projector"),
)


def _bert_to_distilbert(state: dict[str, Tensor], fold_token_type: bool) -> dict[str, Tensor]:
    """A BERT's weights under DistilBERT's names. DistilBERT has no token types: embedding 0, which
    BERT adds to every token of a single text, moves into the position embeddings."""
    state = dict(state)
    token_type = state.pop("bert.embeddings.token_type_embeddings.weight")
    state.pop("cls.predictions.bias", None)  # the decoder's, under its second name
    position = "bert.embeddings.position_embeddings.weight"
    if fold_token_type:
        state[position] = state[position] + token_type[0]
    renamed = {}
    for name, value in state.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed
