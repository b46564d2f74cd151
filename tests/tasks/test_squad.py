"""SQuAD: constants worked by hand, windows, and the task through `glue` and `finetune`."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from distilfast import cli, tasks
from distilfast.config import ConfigError
from distilfast.sources import lookup
from distilfast.studies import figures, finetune, folder, inputs, soft_targets
from distilfast.tasks import IGNORE_INDEX, SQUAD, Windows, fine_tuning, squad
from distilfast.tasks.fine_tuning import FineTuning, SoftTargets

LENGTH = 24  # tokens of a window: contexts of 40 words need several
CPU = torch.device("cpu")


def make_question(number: int, rng: random.Random, words: int) -> dict[str, Any]:
    """A context of words, of which one to three are the answer to a question of two words."""
    context = rng.choices(WORDS, k=words)
    first = rng.randrange(words - 3)
    answer = " ".join(context[first : first + rng.randrange(1, 4)])
    start = len(" ".join([*context[:first], ""]))
    asked = {
        "id": f"q{number}",
        "question": " ".join(rng.choices(WORDS, k=2)),
        "answers": [{"text": answer, "answer_start": start}],
    }
    return {"context": " ".join(context), "qas": [asked]}


def write_squad(folder: Path, n_train: int = 8, n_dev: int = 6, words: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", n_train), ("dev", n_dev)):
        paragraphs = [make_question(i, rng, words) for i in range(count)]
        content = {"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}
        (folder / f"{split}-v1.1.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squad(tmp_path_factory.mktemp("data") / "SQuAD").parent


@pytest.fixture(scope="module")
def tokenizer(teacher: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(teacher)


@pytest.fixture(scope="module")
def train(data: Path, tokenizer: Any) -> Windows:
    return tasks.encode_windows(tasks.read(SQUAD, str(data))["train"], tokenizer, LENGTH)


def perfect_logits(windows: Windows) -> Tensor:
    """Those of a model that is sure of the right positions."""
    logits = torch.zeros(len(windows.input_ids), 2)
    for column in (0, 1):
        logits[windows.offsets[:-1] + windows.labels[:, column].long(), column] = 10.0
    return logits


# --- Exact match and F1 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The King, of  THE   North!", ["king", "of", "north"]),
        ("an apple a day", ["apple", "day"]),
        ("another thea can", ["another", "thea", "can"]),  # articles within words stay
        ("don't (1,000)", ["dont", "1000"]),
        ("the-river", ["theriver"]),  # punctuation goes first
        ("“café”", ["“café”"]),  # of punctuation, ASCII's alone
        ("\ta\u00a0b\n", ["b"]),
        ("The", []),
        ("", []),
    ],
)
def test_normalization_keeps_the_words_worked_by_hand(text: str, words: list[str]) -> None:
    assert squad.normalize(text) == words


@pytest.mark.parametrize(
    ("answer", "gold", "em", "f1"),
    [
        ("the cat sat", "cat sat down", 0, 4 / 5),  # 2 shared of 2 and 3
        ("The Cat.", "cat", 1, 1),
        ("king king queen", "king", 0, 2 / 4),  # shared once: 1 of 3 and 1
        ("king king", "king king queen", 0, 4 / 5),
        ("sat cat", "cat sat", 0, 1),  # order does not count in F1
        ("", "cat", 0, 0),
        ("dog", "cat", 0, 0),
        ("the", "a", 1, 0),  # the rule of v1.1: no word is shared
    ],
)
def test_exact_match_and_f1_are_those_worked_by_hand(
    answer: str, gold: str, em: float, f1: float
) -> None:
    assert squad.exact_match(answer, gold) == em
    assert squad.f1(answer, gold) == pytest.approx(f1, abs=1e-15)


def test_score_takes_the_best_gold_answer_of_each_question() -> None:
    gold = [["blue", "the red house."], ["y z", "x y", "x y z"], ["z"], ["q"]]
    found = squad.score(["red house", "x", "", "Q"], gold)
    assert found["EM"] == pytest.approx(100 * (1 + 0 + 0 + 1) / 4)
    assert found["F1"] == pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)


# --- Windows --------------------------------------------------------------------------------------


def chars(*places: tuple[int, int] | None) -> np.ndarray:
    return np.array([place or (-1, -1) for place in places], np.int32)


WINDOW = chars(None, None, None, (10, 13), (14, 18), (18, 20), (21, 25), None)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (10, 3, (3, 3)),
        (14, 6, (4, 5)),
        (15, 1, (4, 4)),  # within a token: all of it
        (10, 15, (3, 6)),
        (9, 4, (0, 0)),  # begins before the window
        (21, 5, (0, 0)),  # ends behind it
        (2, 3, (0, 0)),
        (13, 1, (0, 0)),  # between tokens
    ],
)
def test_positions_are_those_of_the_tokens_or_cls(
    start: int, length: int, expected: tuple[int, int]
) -> None:
    assert squad.positions(WINDOW, ("x" * length, start)) == expected


def test_a_long_context_is_cut_into_windows_that_overlap(tokenizer: Any) -> None:
    context = " ".join(WORDS)
    question = "who what when where why which"
    answer = (WORDS[20], context.index(f" {WORDS[20]} ") + 1)
    made = list(squad.windows([(question, context), ("river", "the king")], tokenizer, LENGTH))
    of_first = [window for window in made if window.question == 0]
    assert [w.question for w in made] == [0] * len(of_first) + [1]
    places = [w.chars[w.chars[:, 0] >= 0] for w in of_first]
    # [CLS], a sixth of 24 tokens of the question, [SEP]; 17 of context, [SEP]; 8 of them shared.
    assert {len(w.input_ids) for w in of_first[:-1]} == {LENGTH}
    assert all(np.flatnonzero(w.chars[:, 0] >= 0)[0] == 6 for w in of_first)
    for before, after in itertools.pairwise(places):
        assert (before[-8:] == after[:8]).all()
    covered = {tuple(place) for some in places for place in some.tolist()}
    assert [context[a:b] for a, b in sorted(covered)] == WORDS
    holds = [squad.positions(w.chars, answer) for w in of_first]
    assert (0, 0) in holds
    for window, (first, last) in zip(of_first, holds, strict=True):
        if last:
            assert tokenizer.decode(window.input_ids[first : last + 1]) == WORDS[20]
    assert any(last for _, last in holds)


@pytest.mark.parametrize("length", [8, 9, 12])
def test_the_shortest_windows_hold_all_of_the_context(tokenizer: Any, length: int) -> None:
    texts = [(" ".join(WORDS), " ".join(WORDS[:11]))]
    made = list(squad.windows(texts, tokenizer, length))
    assert all(len(window.input_ids) <= length for window in made)
    assert {a for w in made for a, _ in w.chars.tolist()} - {-1} == {
        len(" ".join([*WORDS[:i], ""])) for i in range(11)
    }


def test_questions_are_numbered_through_all_chunks(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [("river", f"the {word}") for word in WORDS[:7]]
    whole = list(squad.windows(texts, tokenizer, LENGTH))
    monkeypatch.setattr(squad, "CHUNK", 3)
    for one, other in zip(whole, squad.windows(texts, tokenizer, LENGTH), strict=True):
        assert one.question == other.question
        assert (one.input_ids == other.input_ids).all()
        assert (one.chars == other.chars).all()


# --- Answers --------------------------------------------------------------------------------------


def test_best_span_lies_in_the_context_and_does_not_run_backwards() -> None:
    start = np.array([99.0, 99, 0, 1, 2, 7, 0, 99])
    end = np.array([99.0, 99, 0, 5, 4, 0, 3, 99])
    # Of the spans in order: (5, 6): 10, (4, 4): 6, (3, 3): 6; (5, 3), backwards, would be 12.
    assert squad.best_span(start, end, WINDOW) == squad.Span(10.0, 18, 25)


def test_best_span_has_at_most_30_tokens() -> None:
    places = chars(*((2 * i, 2 * i + 1) for i in range(40)))
    start, end = np.zeros(40), np.zeros(40)
    start[2], end[32] = 9, 9  # 31 tokens
    end[31] = 8  # 30
    assert squad.best_span(start, end, places) == squad.Span(17.0, 4, 63)


def test_best_span_tries_20_starts_and_20_ends() -> None:
    places = chars(*((2 * i, 2 * i + 1) for i in range(60)))
    start, end = np.zeros(60), np.zeros(60)
    start[40:] = 1  # 20 starts behind every end that is tried
    end[:20] = 1
    assert squad.best_span(start, end, places) is None
    start[40] = 0  # now the first of the others, token 0, is one of the 20
    assert squad.best_span(start, end, places) == squad.Span(1.0, 0, 1)


def test_no_context_has_no_span() -> None:
    assert squad.best_span(np.zeros(3), np.zeros(3), chars(None, None, None)) is None


def test_the_answer_is_the_best_span_of_all_windows() -> None:
    contexts = ["one two three", "four", "five six"]
    found = [
        (0, squad.Span(1.0, 0, 3)),
        (0, squad.Span(2.0, 4, 7)),
        (0, squad.Span(2.0, 8, 13)),  # an equal one: the first stays
        (0, None),
        (1, None),
        (2, squad.Span(-5.0, 5, 8)),
    ]
    assert squad.answers(contexts, found) == ["two", "", "six"]


def test_perfect_logits_give_100(data: Path, tokenizer: Any) -> None:
    for examples in tasks.read(SQUAD, str(data)).values():
        windows = tasks.encode_windows(examples, tokenizer, LENGTH)
        assert len(windows) > 2 * len(examples.texts)  # the contexts are cut
        logits = perfect_logits(windows)
        assert tasks.score(SQUAD, windows, logits) == {"EM": 100, "F1": 100, "score": 100}
        assert tasks.predictions(SQUAD, windows, logits).tolist() == [
            answers[0][0] for answers in examples.labels
        ]
        wrong = torch.zeros_like(logits)
        assert tasks.score(SQUAD, windows, wrong)["EM"] < 50


# --- Tokenizers -----------------------------------------------------------------------------------

ODD_WORDS = ["a", "it's", "(1895)", "$5.00", "naïve", "cafe\u0301s", "e\u0301", "北京", "𝒳", "ß"]
SPACES = st.sampled_from([" ", "  ", "\n", " \n", "\u00a0"])
BERTS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def byte_pairs(*, split: bool, prefix: bool, trim: bool) -> Any:
    """RoBERTa's: four special tokens, words in pieces, each with the space before it."""
    first = [pre_tokenizers.Whitespace()] if split else []
    steps = [*first, pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    end = processors.RobertaProcessing(
        ("[SEP]", 3), ("[CLS]", 2), trim_offsets=trim, add_prefix_space=prefix
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=BERTS, initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(), trainer, pre_tokenizers.Sequence(steps), end)


def trained(model: Any, trainer: Any, steps: Any, end: Any = None, normalizer: Any = None) -> Any:
    made = Tokenizer(model)
    made.pre_tokenizer = steps
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator([" ".join([*WORDS, "MASK", "'s ()$."])] * 3, trainer)
    made.post_processor = end or processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), BERTS, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{name}_token": word for name, word in names.items()}
    )


def pieces(*normalizer: Any, prepend: str = "always") -> Any:
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=BERTS, unk_token="[UNK]", show_progress=False
    )
    lines = normalizers.Replace("\n", " ")
    steps = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    normalizer = normalizers.Sequence([lines, normalizers.NFKC(), *normalizer])
    return trained(models.Unigram(), trainer, steps, normalizer=normalizer)


def word_pieces(normalizer: Any, steps: Any) -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=BERTS, show_progress=False)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, steps, normalizer=normalizer)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{
        f"byte pairs, {split=}, {prefix=}, {trim=}": functools.partial(
            byte_pairs, split=split, prefix=prefix, trim=trim
        )
        for split, prefix, trim in itertools.product((False, True), repeat=3)
    },
    "word pieces": lambda: word_pieces(
        normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ),
    "word pieces, cased": lambda: word_pieces(None, pre_tokenizers.Whitespace()),
    "pieces": pieces,
    "pieces, first": lambda: pieces(prepend="first"),
    "pieces, never": lambda: pieces(prepend="never"),
    "pieces, lower": lambda: pieces(
        normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()
    ),
}


@functools.cache
def made_tokenizer(name: str) -> Any:
    return TOKENIZERS[name]()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(content=st.data())
def test_perfect_logits_give_100_with_any_tokenizer(name: str, content: st.DataObject) -> None:
    """Answers of some words anywhere in a context of many, which takes several windows."""
    tokenizer = made_tokenizer(name)
    words = st.sampled_from(WORDS + 3 * ODD_WORDS)
    texts, labels = [], []
    for _ in range(3):
        context = content.draw(st.lists(st.tuples(words, SPACES), min_size=4, max_size=30))
        begins = list(itertools.accumulate((len(w + s) for w, s in context), initial=0))
        first = content.draw(st.integers(0, len(context) - 1))
        last = content.draw(st.integers(first, min(first + 2, len(context) - 1)))
        whole = "".join(w + s for w, s in context)
        answer = whole[begins[first] : begins[last] + len(context[last][0])]
        texts.append(("who is it ?", whole))
        labels.append([(answer, begins[first])])
    windows = tasks.encode_windows(tasks.Examples(texts, labels), tokenizer, 64)
    found = tasks.score(SQUAD, windows, perfect_logits(windows))
    assert found["EM"] == 100, (windows.answers(perfect_logits(windows)), labels)


def test_answers_that_no_tokens_give_are_counted_or_refused(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    context = "the city of the king"
    good = [[("city", 4)]] * 30
    within = tasks.Examples([("who", context)] * 31, [*good, [("cit", 4)]])
    with caplog.at_level(logging.WARNING, "distilfast"):
        tasks.encode_windows(within, tokenizer, LENGTH)
    assert "1 of 31 answers that no span of tokens gives, such as 'cit'" in caplog.text
    with pytest.raises(ConfigError, match=r"^--data: expected answers of whole tokens.*2 of 32"):
        tasks.encode_windows(
            tasks.Examples([*within.texts, ("who", context)], [*within.labels, [("kin", 16)]]),
            tokenizer,
            LENGTH,
        )


def test_windows_added_and_saved_are_the_same(train: Windows, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(train.tensors(), tmp_path / "x.safetensors")
    read = folder.read_tokens(str(tmp_path / "x.safetensors"))
    assert isinstance(read, Windows)
    assert read.gold() == train.gold()
    both = read + train
    logits = torch.cat([perfect_logits(train), torch.zeros(len(train.input_ids), 2)])
    own = train.answers(torch.zeros(len(train.input_ids), 2))
    assert both.answers(logits) == [*train.answers(perfect_logits(train)), *own]
    assert both.gold() == [*train.gold(), *train.gold()]
    rows = torch.arange(len(train), len(both))
    for one, other in zip(
        both.batch(rows, 0).values(),
        train.batch(torch.arange(len(train)), 0).values(),
        strict=True,
    ):
        assert torch.equal(one, other)


# --- Loss and training ----------------------------------------------------------------------------


def load(teacher: Path, seed: int = 0) -> Any:
    return fine_tuning.load(str(teacher), SQUAD, seed, LENGTH)


def forward(model: Any, windows: Windows, rows: Tensor) -> Tensor:
    inputs = windows.batch(rows, 0)
    return fine_tuning.forward(model, inputs)


def test_loss_is_the_plain_formula_over_positions(train: Windows) -> None:
    """Each window alone, without padding, in float64."""
    torch.manual_seed(0)
    rows = torch.arange(len(train)).flip(0)
    flat = torch.randn(len(train.input_ids), 2), torch.randn(len(train.input_ids), 2)
    labels = train.labels.clone()
    labels[2:4] = IGNORE_INDEX
    kl, ce = [], []
    for i in range(len(train)):
        s, t = (x[train.offsets[i] : train.offsets[i + 1]].double() for x in flat)
        for column in (0, 1):
            log_p, log_q = (x[:, column].div(3).log_softmax(0) for x in (t, s))
            kl.append(9 * (log_p.exp() * (log_p - log_q)).sum())
            if labels[i, column] != IGNORE_INDEX:
                ce.append(-s[:, column].log_softmax(0)[labels[i, column].long()])
    expected = 0.3 * torch.stack(kl).mean() + 0.7 * torch.stack(ce).mean()
    targets = SoftTargets(flat[1], 3.0, 0.3, 0.7).of(train, rows, CPU)
    logits = train.take(flat[0], rows)
    assert logits.shape == (len(train), 2, LENGTH)
    loss = fine_tuning.task_loss(SQUAD, logits, labels[rows], targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    hard = fine_tuning.task_loss(SQUAD, logits, labels[rows])
    torch.testing.assert_close(hard.double(), torch.stack(ce).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("taught", [False, True])
def test_padding_changes_nothing(teacher: Path, train: Windows, taught: bool) -> None:
    """The mean loss of windows alone, and its gradient, are those of a batch with padding."""
    lengths = train.lengths
    rows = torch.stack([lengths.argmin(), lengths.argmax(), lengths.argmin()])
    assert lengths[rows[0]] < lengths[rows[1]]
    model = load(teacher).eval()
    soft = SoftTargets(torch.randn(len(train.input_ids), 2)) if taught else None

    def loss(some: Tensor) -> Tensor:
        targets = soft.of(train, some, CPU) if soft else None
        logits = forward(model, train, some)
        return fine_tuning.task_loss(SQUAD, logits, train.labels[some], targets)

    whole = loss(rows)
    gradient = torch.autograd.grad(whole, model.qa_outputs.weight)[0]
    alone = torch.stack([loss(row[None]) for row in rows]).mean()
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(alone, model.qa_outputs.weight)[0]
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    batch = forward(model, train, rows)
    assert (batch.isneginf() == ~train.batch(rows, 0)["attention_mask"].bool()[:, None]).all()


def test_predictions_are_in_the_order_of_the_tokens(teacher: Path, train: Windows) -> None:
    model = load(teacher).eval()
    logits = fine_tuning.predict(model, train, FineTuning(), pad_token=0)
    assert logits.shape == (len(train.input_ids), 2)
    for i in (0, len(train) - 1):
        ids = train.input_ids[train.offsets[i] : train.offsets[i + 1]].long()[None]
        types = train.token_type_ids[train.offsets[i] : train.offsets[i + 1]].long()[None]
        out = model(input_ids=ids, token_type_ids=types)
        own = torch.stack([out.start_logits[0], out.end_logits[0]], 1)
        torch.testing.assert_close(
            logits[train.offsets[i] : train.offsets[i + 1]], own, rtol=1e-4, atol=1e-5
        )


def test_a_small_model_learns_8_questions_by_heart(teacher: Path, train: Windows) -> None:
    model = load(teacher)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = FineTuning(learning_rate=3e-3, batch_size=8, epochs=20)
    rows = torch.arange(len(train))

    def measured() -> tuple[float, float]:
        logits = fine_tuning.predict(model, train, settings, pad_token=0)
        loss = fine_tuning.task_loss(SQUAD, train.take(logits, rows), train.labels)
        return float(loss), tasks.score(SQUAD, train, logits)["EM"]

    loss, em = measured()
    fine_tuning.fine_tune(model, train, SQUAD, settings, 0, pad_token=0)
    after, em_after = measured()
    assert after < 0.2 * loss
    assert em < 25
    assert em_after == 100


@pytest.mark.parametrize("mode", ["probability", "logit"])
def test_an_ensemble_is_the_mean_over_positions(
    train: Windows, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(finetune, "COMBINED", 5)  # several batches, of other widths
    one, two = torch.randn(2, len(train.input_ids), 2)
    how = soft_targets.Teaching(ensemble=mode, weights=(1.0, 3.0))
    inputs: Any = SimpleNamespace(task=SQUAD)
    workers: Any = None
    run = finetune.Run(inputs, FineTuning(), how, workers, Path(), Path())
    made = run.combined([one, two], train, 2.0)
    for i in range(len(train)):
        s, t, z = (x[train.offsets[i] : train.offsets[i + 1]] for x in (one, two, made))
        if mode == "logit":
            expected = 0.25 * s + 0.75 * t
        else:
            p = 0.25 * (s / 2).softmax(0) + 0.75 * (t / 2).softmax(0)
            expected = 2 * p.log()
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


def test_agreement_is_the_share_of_equal_answers(train: Windows) -> None:
    logits = perfect_logits(train)
    other = logits.clone()
    windows = torch.nonzero(train.questions == 3)[:, 0]
    other[train.offsets[windows[0]] : train.offsets[windows[-1] + 1]] = 0  # one question of 8
    found = soft_targets.agreements(SQUAD, train, other, {"A": logits, "B": other})
    assert found == {"A": 87.5, "B": 100.0}


# --- The commands ---------------------------------------------------------------------------------


def tuned(output: Path, data: Path) -> list[str]:
    return [
        *("--data", str(data), "--output", str(output), "--seeds", "2", "--epochs", "1"),
        *("--max_length", str(LENGTH), "--learning_rate", "1e-3", "--precision", "fp32"),
        *("--batch_size", "8", "--processes", "1"),
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("direct", [False, True], ids=["SQuAD/train-v1.1.json", "train-v1.1.json"])
def test_glue_scores_it_and_goes_on(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], direct: bool
) -> None:
    folder = data / "SQuAD" if direct else data
    arguments = ["glue", "--model", f"bert={teacher}", "--tasks", "squad"]
    arguments += tuned(tmp_path / "out", folder)
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "| model | SQuAD | SQuAD EM |" in out
    assert "| BERT-base (published) | 88.5 | 81.2 |" in out
    assert "| DistilBERT (published) | 85.8 | 77.7 |" in out
    assert "| DistilBERT, distilled again (published) | 86.9 | 79.1 |" in out
    assert "ELMo" not in out
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    found = results["bert"]["SQuAD"]
    assert found["metric"] == "F1"
    assert found["scores"] == found["F1"]["scores"]
    assert all(em <= f1 for em, f1 in zip(found["EM"]["scores"], found["scores"], strict=True))
    assert (tmp_path / "out" / "report.html").is_file()
    kept, again = (tmp_path / f"out/scores/bert/SQuAD/seed-{i}.json" for i in (0, 1))
    before = json.loads(again.read_text(encoding="utf-8"))["metrics"]
    stamp = kept.stat().st_mtime_ns
    again.unlink()
    assert cli.main(arguments) == 0
    assert kept.stat().st_mtime_ns == stamp
    assert json.loads(again.read_text(encoding="utf-8"))["metrics"] == before


def test_other_tasks_show_neither_em_nor_the_second_distillation() -> None:
    found = {"bert": {"CoLA": {"median": 1.0, "stdev": None}}}
    made = figures.table(found, [tasks.GLUE["CoLA"]], "GLUE", 1)
    assert made.columns == ["model", "CoLA"]
    assert [row[0] for row in made.rows] == ["bert", "ELMo", "BERT-base", "DistilBERT"]


def test_a_score_beside_glue_stands_next_to_its_published_ones() -> None:
    squad_figures = {"median": 50.0, "stdev": 1.0, "EM": {"median": 40.0, "stdev": None}}
    found = {"bert": {"CoLA": {"median": 10.0, "stdev": None}, "SQuAD": squad_figures}}
    made = figures.table(found, [tasks.GLUE["CoLA"], SQUAD], "GLUE", 1)
    assert made.columns == ["model", "score", "CoLA", "SQuAD", "SQuAD EM"]
    assert made.rows[0] == ["bert", "30.0", "10.0", "50.0 ± 1.0", "40.0"]
    assert made.rows[2] == ["BERT-base", "72.4", "56.3", "88.5", "81.2"]
    assert made.rows[4] == ["DistilBERT, distilled again", "", "", "86.9", "79.1"]


@pytest.mark.thorough
def test_finetune_teaches_it(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two teachers that are fine-tuned first, unlabelled texts, and again with the student's model
    as the teacher, which has its head."""
    transfer = tmp_path / "more.tsv"
    lines = ["question\tcontext", *(f"river\t{' '.join(WORDS[i : i + 25])}" for i in range(3))]
    transfer.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["finetune", "--teacher", str(teacher), str(teacher), "--student", str(teacher)]
    arguments += ["--task", "SQuAD", "--transfer", str(transfer), "--ensemble", "logit"]
    arguments += tuned(tmp_path / "out", data)
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "| model | F1 | change | p | EM |" in out
    assert "questions with the teacher's answer" in out
    assert "3 unlabelled texts" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    first = f"{teacher.name} from seed 0"
    assert results[first]["agreement"][first]["scores"] == [100.0]
    assert results["ensemble"]["agreement"]["ensemble"]["scores"] == [100.0]
    assert len(results["taught by ensemble"]["EM"]["scores"]) == 2
    logits = sorted((tmp_path / "out" / "logits").glob("*.safetensors"))
    assert len(logits) == 2
    stamps = [file.stat().st_mtime_ns for file in logits]
    scores = {file: file.read_bytes() for file in (tmp_path / "out/students").rglob("seed-*.json")}
    next(iter(scores)).unlink()
    assert cli.main(arguments) == 0  # the one that is missing gives the same figures
    assert {file: file.read_bytes() for file in scores} == scores
    assert [file.stat().st_mtime_ns for file in logits] == stamps

    student = next((tmp_path / "out" / "students").rglob("model"))
    config = transformers.AutoConfig.from_pretrained(student)
    assert config.architectures == ["BertForQuestionAnswering"]
    again = ["finetune", "--teacher", str(student), "--student", str(teacher), "--task", "squad"]
    assert cli.main([*again, *tuned(tmp_path / "again", data)]) == 0
    assert not (tmp_path / "again" / "teachers").exists()


# --- Bad input ------------------------------------------------------------------------------------


def document(**changes: Any) -> dict[str, Any]:
    asked = {"id": "q7", "question": "who", "answers": [{"text": "king", "answer_start": 4}]}
    return {"data": [{"paragraphs": [{"context": "the king", "qas": [{**asked, **changes}]}]}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "train-v1.1.json: expected JSON, got Expecting"),
        (b"\xff", "train-v1.1.json: expected JSON, got 'utf-8' codec can't decode"),
        ([], "expected the layout of SQuAD v1.1"),
        ({"data": [{}]}, r"expected the layout of SQuAD v1.1 .* \(KeyError\('paragraphs'\)\)"),
        ({"data": None}, "expected the layout of SQuAD v1.1"),
        ("[" * 100_000, "train-v1.1.json: expected JSON, got"),
        (document(question=None), "question q7: expected a text as question, got None"),
        (
            document(answers=[{"text": "king", "answer_start": "4"}]),
            "and a whole number, got 'king'",
        ),
        (document(answers=[]), "question q7: expected an answer, as all have in SQuAD v1.1"),
        (document(answers=[], is_impossible=True), "question q7: expected SQuAD v1.1, got v2.0"),
        (document(is_impossible=False), "question q7: expected SQuAD v1.1, got v2.0"),
        (
            document(answers=[{"text": "king", "answer_start": 3}]),
            "question q7: expected 'king' at character 3, got ' kin'",
        ),
        (
            document(answers=[{"text": "g", "answer_start": -1}]),
            "question q7: expected 'g' at character -1",
        ),
        (
            document(answers=[{"text": "", "answer_start": 0}]),
            "question q7: expected the text of an ans",
        ),
    ],
)
def test_files_that_are_not_squad_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    write_squad(tmp_path)
    file = tmp_path / "train-v1.1.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        tasks.read(SQUAD, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder SQuAD in"):
        tasks.read(SQUAD, str(tmp_path))
    folder = write_squad(tmp_path / "SQuAD")
    dev = folder / "dev-v1.1.json"
    dev.write_text('{"data": []}', encoding="utf-8")
    with pytest.raises(ConfigError, match="expected examples in SQuAD's dev, got none"):
        tasks.read(SQUAD, str(tmp_path))
    dev.unlink()
    for place in (tmp_path, folder):
        with pytest.raises(ConfigError, match=r"expected the file '.*dev-v1.1.json', which is mis"):
            tasks.read(SQUAD, str(place))


def test_a_model_of_another_head_is_refused(teacher: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "classifier"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(teacher, num_labels=2)
    model.save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(other)
    with pytest.raises(ConfigError, match="which SQuAD with 2 cannot start from"):
        fine_tuning.load(str(other), SQUAD, 0, LENGTH)
    own = tmp_path / "spans"
    load(teacher).save_pretrained(own)
    with pytest.raises(ConfigError, match="which SST-2 with 2 cannot start from"):
        fine_tuning.load(str(own), tasks.GLUE["SST-2"], 0, LENGTH)


def test_a_tokenizer_without_places_is_refused(tmp_path: Path) -> None:
    config = transformers.CanineConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    transformers.CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="--model: expected a fast tokenizer with a padding"):
        inputs.open_model("--model", str(tmp_path), [SQUAD], FineTuning())


# --- The hub --------------------------------------------------------------------------------------


def test_the_hubs_copy_gives_the_same_examples(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def rows(split: str) -> list[dict[str, Any]]:
        file = data / "SQuAD" / f"{split}-v1.1.json"
        paragraphs = json.loads(file.read_text(encoding="utf-8"))["data"][0]["paragraphs"]
        return [
            {**asked, "answers": columns(asked["answers"]), "context": paragraph["context"]}
            for paragraph in paragraphs
            for asked in paragraph["qas"]
        ]

    def columns(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}

    hub = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows("train")),
        validation=datasets.Dataset.from_list(rows("dev")),
    )
    asked_for = []
    monkeypatch.setattr(lookup, "require_hub", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked_for.append(a) or hub)
    assert tasks.read(SQUAD, "hub") == tasks.read(SQUAD, str(data))
    assert asked_for == [("rajpurkar/squad", None)]
