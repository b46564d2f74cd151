"""Tokens, labels and packed sequences of causal LMs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher
from families import end_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from distilfast import config as configs
from distilfast import data, models
from distilfast.config import BatchConfig, ConfigError, TeacherSpec
from distilfast.data import IGNORE_INDEX, Batches, MicroBatch, Shift, Store
from distilfast.data.packing import pack

LONG = " ".join(["mountain river"] * 30)


def config(source: Path, objective: str = "causal", **settings: Any) -> configs.Config:
    own = {"source": str(source), "max_length": 24, "min_length": 3, "heldout": 0.1} | settings
    given = [f"--data.{key}={value}" for key, value in own.items()]
    return configs.parse([f"--objective={objective}", "--steps=1", *given])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return end_tokenizer()


@pytest.fixture(scope="module")
def folder(corpus: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal") / "tokens"
    data.prepare(config(corpus), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store.open(folder)


def documents(store: Store, split: str = "train") -> list[list[int]]:
    n = torch.arange(len(getattr(store, split)))
    return [row.tolist() for row in store.rows(split, n)]


# --- Tokens ---------------------------------------------------------------------------------------


def test_text_is_its_tokens_and_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    """Nothing before it, and no word of it is the end token."""
    lines = ["the river of the city", "a queen in the city and <|endoftext|> of old", "east"]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    made = config(tmp_path / "text.txt", max_length=64, heldout=0.01)
    store = data.prepare(made, tokenizer, tmp_path / "t")
    found = documents(store) + documents(store, "heldout")
    plain = [tokenizer(line, split_special_tokens=True)["input_ids"] for line in lines]
    assert sorted(found) == sorted([*ids, 0] for ids in plain if len(ids) >= 2)
    assert all(0 not in row[:-1] for row in found)
    assert store.objective == store.record["objective"] == "causal"


def test_begin_token_stays_where_the_tokenizer_puts_one(tmp_path: Path, tokenizer: Any) -> None:
    """As Llama's: its models were trained with it."""
    from tokenizers import processors

    own = end_tokenizer()
    own.add_special_tokens({"bos_token": "<s>"})
    place = ("<s>", own.bos_token_id)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [place])
    (tmp_path / "text.txt").write_text("the river of the city\nwater and land", encoding="utf-8")
    store = data.prepare(config(tmp_path / "text.txt"), own, tmp_path / "t")
    for row in documents(store):
        assert row[0] == own.bos_token_id
        assert row[-1] == 0


def test_long_text_is_cut_into_pieces_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "text.txt").write_text(f"{LONG}\nthe river\n{LONG} east\n", encoding="utf-8")
    made = config(tmp_path / "text.txt")
    store = data.prepare(made, tokenizer, tmp_path / "t")
    assert store.record["texts"]["cut"] == 2
    said = data.describe_texts(store.record["texts"], store.record)
    assert said.endswith("; 2 longer than 24 tokens, cut into pieces")
    texts = [[*tokenizer(x)["input_ids"], 0] for x in (LONG, "the river", f"{LONG} east")]
    pieces = [text[i : i + 24] for text in texts for i in range(0, len(text), 24)]
    wanted = [piece for piece in pieces if len(piece) >= 3]
    assert sorted(documents(store) + documents(store, "heldout")) == sorted(wanted)
    assert len(wanted) > 8


def test_store_of_the_other_objective_is_refused(
    folder: Path, corpus: Path, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=r"tokens for the masked objective, .*for the causal one"):
        data.prepare(config(corpus, "masked"), tokenizer, folder)
    masked = models.load_teachers([TeacherSpec(str(make_teacher(tmp_path / "bert")))])[1]
    data.prepare(config(corpus, "masked"), masked, tmp_path / "masked")
    assert "objective" not in json.loads((tmp_path / "masked" / "store.json").read_text())
    with pytest.raises(ConfigError, match=r"tokens for the causal objective, .*for the masked one"):
        data.prepare(config(corpus), masked, tmp_path / "masked")


def test_packing_does_not_need_other_tokens(
    folder: Path, corpus: Path, tmp_path: Path, tokenizer: Any
) -> None:
    place = shutil.copytree(folder, tmp_path / "tokens")
    data.prepare(config(corpus, packing="false"), tokenizer, place)
    with pytest.raises(ConfigError, match="differs in min_length"):
        data.prepare(config(corpus, min_length=5), tokenizer, place)


# --- Labels ---------------------------------------------------------------------------------------


def of_documents(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of each document in a batch, by its positions; padding left out."""
    found = []
    rows, width = batch.input_ids.shape
    kept = torch.zeros(rows * width, dtype=torch.bool)
    kept[batch.tokens] = True
    places = batch.position_ids
    if places is None:
        places = torch.arange(width).expand(rows, width)
    triples = zip(
        places.flatten().tolist(),
        batch.input_ids.flatten().tolist(),
        batch.labels.tolist(),
        kept.tolist(),
        strict=True,
    )
    for place, token, label, real in triples:
        if real and place == 0:
            found.append(([], []))
        if real:
            assert place == len(found[-1][0])
            found[-1][0].append(token)
            found[-1][1].append(label)
        else:
            assert label == IGNORE_INDEX
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [{"sequences": 30}, {"tokens": 700}], ids=str)
def test_labels_are_the_next_tokens(store: Store, packed: bool, batch: dict[str, int]) -> None:
    """Against a plain loop: every document of a step once, on any number of ranks, whole."""
    batches = Batches(store, Shift(56), 0, BatchConfig(**batch), packed)
    texts = documents(store)
    for ranks, micro in ((1, 4), (3, 2)):
        wanted = sorted(texts[i] for i in batches.examples(1)[0].tolist())
        shares = [batches.step(1, rank, ranks, micro) for rank in range(ranks)]
        made = [b for share in shares for b in share]
        found = sorted(d for b in made for d in of_documents(b) if len(b.tokens))
        assert [ids for ids, _ in found] == wanted
        for ids, labels in found:
            assert labels == [*ids[1:], IGNORE_INDEX]
        counts = torch.tensor([share.count() for share in shares]).sum(0).tolist()
        assert counts == [sum(map(len, wanted)), sum(len(x) - 1 for x in wanted)]
        assert counts[1] == sum(len(b.labelled) for b in made)
        assert {len(share) for share in shares} == {len(shares[0])}
        for b in made:
            assert len(b.input_ids) <= micro
            assert b.shifted
            assert (b.position_ids is not None) == packed
            assert not packed or b.attention_mask is None
        sequences = sum(len(b.input_ids) for b in made if len(b.tokens))
        assert (sequences < 0.9 * len(wanted)) == packed


def test_rank_without_a_sequence_takes_a_forward_without_rows(store: Store) -> None:
    """Four short texts are one sequence, and there are four ranks."""
    batches = Batches(store, Shift(56), 0, BatchConfig(4), packed=True)
    short = store.lengths("train").argsort()[:4]
    batches.examples = lambda step: (short, torch.zeros(4).long())  # type: ignore[method-assign]
    shares = [batches.step(0, rank, 4, 8) for rank in range(4)]
    made = [list(share) for share in shares]
    assert [len(x) for x in made] == [1] * 4
    rows = [len(batch.labelled) for (batch,) in made]
    assert rows.count(0) == 3
    assert sum(rows) == int(store.lengths("train")[short].sum()) - 4
    assert sum(share.count()[1] for share in shares) == sum(rows)


def test_heldout_texts_have_a_sequence_each(store: Store) -> None:
    batches = Batches(store, Shift(56), 0, BatchConfig(30), packed=True)
    made = list(batches.heldout(0, 1, 3, None))
    assert sum(len(b.input_ids) for b in made) == len(store.heldout)
    assert all(b.position_ids is None for b in made)


# --- Packing --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), max_size=60))
@settings(max_examples=100, deadline=None)
def test_packing_takes_every_document_once(lengths: list[int]) -> None:
    """In sequences that hold them, and so full that no two would fit into one."""
    rows = pack(lengths, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < n <= 30 for n in filled)
    assert filled == sorted(filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 30


def test_packing_wastes_little() -> None:
    """Under 2 % of a step of articles: many short ones, some longer than a row, so cut into it."""
    rng = random.Random(0)
    lengths: list[int] = []
    while len(lengths) < 512:
        whole, rest = divmod(int(rng.lognormvariate(5.3, 1.0)) + 3, 512)
        lengths += [512] * whole + [rest] * (rest > 2)
    rows = pack(lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.98
    assert rows == pack(lengths, 512)
