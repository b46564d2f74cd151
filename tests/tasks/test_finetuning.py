"""Fine-tuning: the loss, the loop and the predictions against plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_task, make_teacher
from torch import Tensor
from torch.nn import functional

from distilfast import tasks
from distilfast.config import ConfigError
from distilfast.studies import inputs
from distilfast.tasks import (
    GLUE,
    IGNORE_INDEX,
    Encoded,
    Task,
    encode,
    find,
    fine_tuning,
    order,
    read,
)
from distilfast.tasks.fine_tuning import (
    FineTuning,
    SoftTargets,
    fine_tune,
    load,
    predict,
    task_loss,
)

pytestmark = pytest.mark.usefixtures("one_core")
SETTINGS = FineTuning(learning_rate=2e-3, batch_size=8, epochs=1)
SENTENCE, PAIR, NUMBER = GLUE["SST-2"], GLUE["MNLI"], GLUE["STS-B"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_teacher(tmp_path_factory.mktemp("finetuning") / "bert", n_layers=1))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> dict[str, Encoded]:
    """The splits of a task that can be learned: 2 classes."""
    import transformers

    data = make_task(tmp_path_factory.mktemp("data") / "words", n_train=100, n_dev=70).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    splits = read(find("words", str(data)), str(data))
    return {split: encode(found, tokenizer, 16) for split, found in splits.items()}


# --- The loss -------------------------------------------------------------------------------------


def draw(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """(6, outputs) logits and targets, (6,) labels of which two are none."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = (3 * torch.randn(6, outputs, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, IGNORE_INDEX, outputs - 1, IGNORE_INDEX, 0]).float()
    return logits.requires_grad_(), targets, labels


def same(loss: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (
        torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("task", [SENTENCE, PAIR], ids=lambda t: t.name)
def test_loss_of_labels_alone_is_cross_entropy(task: Task) -> None:
    logits, _, labels = draw(task.outputs)
    rows = labels != IGNORE_INDEX
    expected = -logits.log_softmax(-1)[rows].gather(1, labels[rows].long()[:, None]).mean()
    same(task_loss(task, logits, labels), expected, logits)


@pytest.mark.parametrize("task", [SENTENCE, PAIR], ids=lambda t: t.name)
@pytest.mark.parametrize(("temperature", "kd", "ce"), [(1, 1, 0), (2, 0.5, 0.5), (4, 2, 0.1)])
def test_loss_with_targets_is_kl_at_t_and_labels_at_one(
    task: Task, temperature: float, kd: float, ce: float
) -> None:
    """Each a mean over its own rows: all of them, those with a label."""
    logits, targets, labels = draw(task.outputs)
    t = (targets / temperature).softmax(-1)
    s = (logits / temperature).log_softmax(-1)
    soft = temperature**2 * (t * (t.log() - s)).sum(-1).mean()
    rows = labels != IGNORE_INDEX
    hard = functional.cross_entropy(logits[rows], labels[rows].long())
    found = task_loss(task, logits, labels, SoftTargets(targets, temperature, kd, ce))
    same(found, kd * soft + ce * hard, logits)


def test_loss_of_numbers_is_their_squared_error() -> None:
    logits, targets, _ = draw(1)
    labels = torch.tensor([0.5, 5, IGNORE_INDEX, 3.8, IGNORE_INDEX, 0])
    rows = labels != IGNORE_INDEX
    hard = (logits[rows, 0] - labels[rows]).square().mean()
    same(task_loss(NUMBER, logits, labels), hard, logits)
    soft = (logits - targets).square().mean()
    found = task_loss(NUMBER, logits, labels, SoftTargets(targets, 2.0, 0.25, 2.0))
    same(found, 0.25 * soft + 2 * hard, logits)


@pytest.mark.parametrize("task", [SENTENCE, NUMBER], ids=lambda t: t.name)
def test_batch_without_labels_has_the_targets_alone(task: Task) -> None:
    logits, targets, labels = draw(task.outputs)
    none = torch.full_like(labels, IGNORE_INDEX)
    both = task_loss(task, logits, none, SoftTargets(targets, 2.0, 0.5, 0.5))
    alone = task_loss(task, logits, none, SoftTargets(targets, 2.0, 0.5, 0.0))
    same(both, alone, logits)
    assert both > 0


# --- The loop -------------------------------------------------------------------------------------


def trained(
    folder: str, train: Encoded, settings: FineTuning = SETTINGS, seed: int = 0, **changed: Any
) -> Any:
    model = load(folder, SENTENCE, seed, 16)
    fine_tune(model, train, SENTENCE, settings, seed, pad_token=0, **changed)
    return model


def bits(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_seed_gives_the_same_bits_and_another_one_others(
    precision: str, model_folder: str, words: dict[str, Encoded]
) -> None:
    """Whatever numbers have been drawn before; and the caller's generator is left as it is."""
    settings = FineTuning(learning_rate=2e-3, batch_size=8, epochs=1, precision=precision)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trained(model_folder, words["train"], settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = trained(model_folder, words["train"], settings)
    assert equal(bits(first), bits(again))
    assert all(p.dtype == torch.float32 for p in first.parameters())
    # the same head, as the model is loaded from the same seed, and another order and dropout
    other = load(model_folder, SENTENCE, 0, 16)
    fine_tune(other, words["train"], SENTENCE, settings, 1, pad_token=0)
    assert not equal(bits(first), bits(other))


@pytest.fixture
def steps() -> Iterator[list[dict[str, Any]]]:
    """What the optimiser has at each step: its groups and the norm of the gradient."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[dict[str, Any]] = []

    def hook(optimizer: Any, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        groups = [{**g, "dims": {p.ndim for p in g["params"]}} for g in optimizer.param_groups]
        seen.append({"kind": type(optimizer), "norm": float(norm), "groups": groups})

    handle = register_optimizer_step_pre_hook(hook)
    yield seen
    handle.remove()


def test_rate_falls_linearly_to_zero(
    steps: list[dict[str, Any]], model_folder: str, words: dict[str, Encoded]
) -> None:
    """From its full value at the first step, over all epochs; a task's own number of them."""
    told: list[float] = []
    settings = FineTuning(learning_rate=1e-3, batch_size=32, weight_decay=0.1)
    trained(model_folder, words["train"], settings, tell=told.append)
    n = SENTENCE.epochs * math.ceil(100 / 32)
    rates = [[group["lr"] for group in step["groups"]] for step in steps]
    assert rates == [pytest.approx([1e-3 * (1 - i / n)] * 2) for i in range(n)]
    assert told == pytest.approx([(i + 1) / n for i in range(n)])
    assert {step["kind"] for step in steps} == {torch.optim.AdamW}
    decayed, others = steps[0]["groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert 1 not in decayed["dims"]
    assert others["dims"] == {1}  # biases and LayerNorms
    assert decayed["betas"] == (0.9, 0.999)
    assert decayed["eps"] == 1e-8


def test_gradients_are_clipped(
    steps: list[dict[str, Any]], model_folder: str, words: dict[str, Encoded]
) -> None:
    for bound in (0.0, 0.01):
        settings = FineTuning(batch_size=32, epochs=1, max_grad_norm=bound)
        trained(model_folder, words["train"], settings)
    norms = [step["norm"] for step in steps]
    free, clipped = norms[:4], norms[4:]
    assert min(free) > 0.01
    assert clipped == pytest.approx([0.01] * 4, rel=1e-3)


def test_layer_norms_behind_a_projection_sum_in_fp32(tmp_path: Path) -> None:
    """ELECTRA-small's embeddings are narrower than its layers, which are then bf16 throughout."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    sizes = {"embedding_size": 8, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    folder = small("Electra", tmp_path, num_hidden_layers=2, initializer_range=0.2, **sizes)
    ids = torch.randint(5, 40, (16, 64), generator=torch.Generator().manual_seed(0)).int()
    ends, labels = torch.arange(0, 1025, 64), torch.arange(16) % 2
    texts = Encoded(ids.flatten(), torch.zeros(1024, dtype=torch.int32), ends, labels.float())
    found: dict[str, list[Tensor]] = {}
    for precision in ("fp32", "bf16"):
        model = load(folder, SENTENCE, 0, 64)
        norms = [m for m in model.electra.encoder.modules() if isinstance(m, torch.nn.LayerNorm)]

        def keep(*_: Any, norms: Any = norms, precision: str = precision) -> None:
            found[precision] = [p.grad.clone() for norm in norms for p in norm.parameters()]

        handle = register_optimizer_step_pre_hook(keep)
        settings = FineTuning(batch_size=16, epochs=1, precision=precision, max_grad_norm=0.0)
        fine_tune(model, texts, SENTENCE, settings, 0, pad_token=0)
        handle.remove()
    for exact, rounded in zip(found["fp32"], found["bf16"], strict=True):
        assert (rounded - exact).norm() < 0.04 * exact.norm()


def test_loop_is_that_of_plain_pytorch(model_folder: str, words: dict[str, Encoded]) -> None:
    """Without dropout, a padding of the batch's own and transformers' schedule."""
    import transformers

    def without_dropout() -> Any:
        model = load(model_folder, SENTENCE, 0, 16)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    ours, theirs, train = without_dropout(), without_dropout(), words["train"]
    fine_tune(ours, train, SENTENCE, SETTINGS, 5, pad_token=0)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 13)
    for rows in order(train.lengths, 8, torch.Generator().manual_seed(5)):
        texts = [train.input_ids[train.offsets[i] : train.offsets[i + 1]].long() for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        loss = theirs(ids, attention_mask=(ids != 0).long(), labels=train.labels[rows].long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # Not the weights: Adam makes whole steps of a gradient of rounding errors, as that of the keys'
    # biases, which change nothing.
    start, ours, theirs = (
        predict(model, words["dev"], SETTINGS, pad_token=0)
        for model in (without_dropout(), ours, theirs)
    )
    assert (ours - theirs).norm() < 1e-3 * (start - theirs).norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_task_that_can_be_learned_is_learned(
    precision: str, model_folder: str, words: dict[str, Encoded]
) -> None:
    settings = FineTuning(learning_rate=3e-3, batch_size=8, epochs=3, precision=precision)
    model = trained(model_folder, words["train"], settings)
    assert not model.training
    logits = predict(model, words["dev"], settings, pad_token=0)
    assert SENTENCE.score(words["dev"].labels, logits)["score"] >= 90


def test_targets_stay_with_their_examples(model_folder: str, words: dict[str, Encoded]) -> None:
    """A teacher that always says the other class is believed where labels do not count."""
    train = words["train"]
    targets = 4 * functional.one_hot(1 - train.labels.long(), 2).float()
    settings = FineTuning(learning_rate=3e-3, batch_size=8, epochs=5)
    soft = SoftTargets(targets, 1.0, 1.0, 0.0)
    model = trained(model_folder, train, settings, targets=soft)
    logits = predict(model, words["dev"], settings, pad_token=0)
    assert SENTENCE.score(words["dev"].labels, logits)["score"] <= 20


def test_loss_that_is_not_finite_reaches_no_weight(
    model_folder: str, words: dict[str, Encoded]
) -> None:
    model = load(model_folder, SENTENCE, 0, 16)
    with torch.no_grad():
        model.classifier.bias[0] = math.inf
    before = bits(model)
    with pytest.raises(FloatingPointError, match="SST-2: the loss of step 1 is nan"):
        fine_tune(model, words["train"], SENTENCE, SETTINGS, 0, pad_token=0)
    assert equal(before, bits(model))


# --- The predictions ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_are_in_the_order_of_the_examples(
    batch_size: int,
    model_folder: str,
    words: dict[str, Encoded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(model_folder, SENTENCE, 0, 16).train()
    dev = words["dev"]
    monkeypatch.setattr(fine_tuning, "EVALUATION_BATCH", batch_size)
    logits = predict(model, dev, SETTINGS, pad_token=0)
    assert logits.shape == (70, 2)
    with torch.no_grad():
        for i in range(len(dev)):
            ids = dev.input_ids[dev.offsets[i] : dev.offsets[i + 1]].long()
            torch.testing.assert_close(logits[i], model(ids[None]).logits[0], atol=1e-5, rtol=1e-5)


def small(kind: str, folder: Path, **settings: Any) -> str:
    """A small model of some kind with weights large enough to show what they do."""
    import transformers

    sizes = {
        **{"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "initializer_range": 0.5},
        **{"bos_token_id": 2, "eos_token_id": 3, "num_labels": 2},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(sizes | settings))
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad_token_id", [None, 7])
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_decoder_reads_a_class_at_the_last_token(
    kind: str, pad_token_id: int | None, words: dict[str, Encoded], tmp_path: Path
) -> None:
    """Whatever its config calls padding, which is a word of the tokenizer or nothing."""
    model = load(small(kind, tmp_path, pad_token_id=pad_token_id), SENTENCE, 0, 16)
    dev = words["dev"]
    logits = predict(model, dev, SETTINGS, pad_token=0)
    with torch.no_grad():
        for i in range(len(dev)):
            ids = dev.input_ids[dev.offsets[i] : dev.offsets[i + 1]].long()
            last = model.base_model(ids[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(logits[i], model.score(last), atol=1e-5, rtol=1e-5)
    fine_tune(model, words["train"], SENTENCE, SETTINGS, 0, pad_token=0)
    assert model.config.pad_token_id == 0  # that is how it is saved


@pytest.mark.parametrize(
    ("kind", "fits"), [("GPT2", True), ("Roberta", True), ("XLNet", False), ("FNet", False)]
)
def test_model_that_reads_the_padding_is_refused(
    kind: str, fits: bool, model_folder: str, tmp_path: Path
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    folder = small(kind, tmp_path, pad_token_id=1, **({"d_head": 8} if kind == "XLNet" else {}))
    tokenizer.save_pretrained(folder)
    if not fits:
        with pytest.raises(ConfigError, match=r"--model: .* expected logits that do not depend on"):
            inputs.open_model("--model", folder, [SENTENCE], FineTuning(max_length=16))
        return
    inputs.open_model("--model", folder, [SENTENCE], FineTuning(max_length=16))
    model = load(folder, SENTENCE, 0, 16)
    fine_tuning.check_padding("--model: x", model, tokenizer)
    # RoBERTa's positions begin after this number, also once it is saved and loaded.
    assert model.config.pad_token_id == (1 if kind == "Roberta" else 0)


def test_precision_is_that_of_the_products(model_folder: str, words: dict[str, Encoded]) -> None:
    model = load(model_folder, SENTENCE, 0, 16)
    exact = predict(copy.deepcopy(model).double(), words["dev"], SETTINGS, pad_token=0)
    apart = {}
    for precision in ("fp32", "bf16"):
        settings = FineTuning(precision=precision)
        logits = predict(model, words["dev"], settings, pad_token=0)
        assert logits.dtype == torch.float32
        apart[precision] = float((logits - exact).norm() / exact.norm())
    assert apart["fp32"] < 1e-5
    assert 1e-4 < apart["bf16"] < 5e-2


# --- What a model starts from ---------------------------------------------------------------------


def test_head_is_drawn_from_the_seed(model_folder: str) -> None:
    state = torch.get_rng_state()
    one, again, other = (load(model_folder, PAIR, seed, 16) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(bits(one), bits(again))
    assert one.classifier.out_features == 3
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    for a, b in zip(one.bert.encoder.parameters(), other.bert.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    import transformers

    saved = transformers.AutoModelForMaskedLM.from_pretrained(model_folder)
    for a, b in zip(one.bert.encoder.parameters(), saved.bert.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def headed(model_folder: str, tmp_path: Path) -> Callable[[str, int], str]:
    """A folder of a model with a head of some kind and width."""
    import transformers

    def make(kind: str, n: int) -> str:
        folder = tmp_path / f"{kind}-{n}"
        model = getattr(transformers, f"BertFor{kind}").from_pretrained(model_folder, num_labels=n)
        model.save_pretrained(folder)
        return str(folder)

    return make


def test_head_of_the_task_is_kept(headed: Callable[[str, int], str]) -> None:
    folder = headed("SequenceClassification", 3)
    one, other = (load(folder, PAIR, seed, 16) for seed in (0, 1))
    assert equal(bits(one), bits(other))


@pytest.mark.parametrize(
    ("kind", "n"),
    [("SequenceClassification", 3), ("SequenceClassification", 1), ("TokenClassification", 2),
     ("QuestionAnswering", 2), ("MultipleChoice", 1)],
)  # fmt: skip
def test_head_of_another_task_is_refused(
    kind: str, n: int, headed: Callable[[str, int], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(headed(kind, n), SENTENCE, 0, 16, "--teacher")
    said = str(caught.value)
    assert said.startswith("--teacher: ")
    assert f"BertFor{kind} of {n} outputs" in said
    assert "SST-2 with 2" in said
    assert "\n" not in said


def longest(folder: str, max_length: int) -> None:
    """A model takes a batch of ``max_length`` tokens, padded as batches are."""
    model = load(folder, SENTENCE, 0, max_length)
    tokens = torch.ones(max_length, dtype=torch.int32)
    offsets = torch.tensor([0, max_length])
    one = Encoded(tokens, torch.zeros_like(tokens), offsets, torch.zeros(1))
    assert predict(model, one, SETTINGS, pad_token=0).isfinite().all()


@pytest.mark.parametrize("positions", [64, 60])
def test_too_few_positions_are_refused(positions: int, tmp_path: Path) -> None:
    """The padding to a multiple of 8 needs positions as well."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=positions,
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    most = positions // tasks.PAD_TO * tasks.PAD_TO
    longest(str(tmp_path), most)
    with pytest.raises(
        ConfigError, match=f"--max_length: expected at most {most} .*, got {most + 1}"
    ):
        load(str(tmp_path), SENTENCE, 0, most + 1)


def test_positions_that_a_padding_index_takes_do_not_count(tmp_path: Path) -> None:
    """RoBERTa's first position has the number of the padding token plus one."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=34,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    longest(str(tmp_path), 32)
    with pytest.raises(ConfigError, match="--max_length: expected at most 32"):
        load(str(tmp_path), SENTENCE, 0, 33)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": math.nan}, "--learning_rate: expected a number > 0"),
        ({"learning_rate": 0.0}, "--learning_rate: expected a number > 0"),
        ({"weight_decay": -1.0}, "--weight_decay: expected a number >= 0"),
        ({"max_grad_norm": math.inf}, "--max_grad_norm: expected a number >= 0"),
        ({"batch_size": 0}, "--batch_size: expected at least 1"),
        ({"epochs": 0}, "--epochs: expected at least 1"),
        ({"max_length": 4}, "--max_length: expected at least 8"),
        ({"precision": "fp16"}, "--precision: expected bf16 or fp32"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FineTuning(**changed)


def test_settings_are_those_of_the_paper() -> None:
    settings = FineTuning()
    assert (settings.learning_rate, settings.batch_size) == (2e-5, 32)
    assert (settings.epochs, settings.max_length) == (None, None)  # the task's own
