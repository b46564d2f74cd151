"""`distilfast compare`: what is counted, who is measured when, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_teacher

from distilfast import cli
from distilfast.config import ConfigError
from distilfast.models import most_positions
from distilfast.studies import compare, sizes, speed
from distilfast.studies.sizes import Candidate, count, skeleton
from distilfast.studies.speed import Mode, Plan

PLAN = Plan(device="cpu", threads=1, batches=[1, 2], sequence_length=8, rounds=2)


def bert(**changes: Any) -> Any:
    small = dict(vocab_size=90, hidden_size=24, num_hidden_layers=4, num_attention_heads=4)
    small |= dict(intermediate_size=96, max_position_embeddings=32)
    return transformers.BertConfig(**{**small, **changes})


def candidate(name: str, kind: type[Candidate] = Candidate, config: Any = None) -> Candidate:
    """One with random weights."""
    config = config or bert(num_hidden_layers=1)
    return kind(name, None, config, *count(skeleton(config)), positions=32)


# --- Sizes ----------------------------------------------------------------------------------------


def test_parameters_are_those_counted_by_hand(teacher: Path) -> None:
    [found] = sizes.load([f"tiny={teacher}"], None, False, 8)
    # 75 tokens, 64 positions and 2 types of 32; a norm; 4 layers of four 32 x 32 products, two of
    # 32 x 64, and their biases and norms; the pooler. The masked-LM head is no part of it.
    embeddings = (75 + 64 + 2) * 32
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32
    assert (found.name, found.embedding_parameters) == ("tiny", embeddings)
    assert found.parameters == embeddings + 2 * 32 + 4 * layer + (32 * 32 + 32)
    assert found.positions == 64
    assert found.disk_mib == (teacher / "model.safetensors").stat().st_size / 2**20


def test_parameters_are_the_published_ones() -> None:
    """110 M and 66 M."""
    assert count(skeleton(transformers.BertConfig())) == (109_482_240, (30_522 + 512 + 2) * 768)
    assert count(skeleton(transformers.DistilBertConfig())) == (66_362_880, (30_522 + 512) * 768)


def test_tied_embeddings_count_once() -> None:
    tied = torch.nn.ModuleList([torch.nn.Embedding(5, 3), torch.nn.Embedding(5, 3)])
    tied[1].weight = tied[0].weight
    assert count(tied) == (15, 15)


SMALL = dict(vocab_size=90, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)


def test_positions_are_those_that_tokens_can_take() -> None:
    roberta = transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1, **SMALL)
    assert most_positions(skeleton(roberta)) == 32
    assert most_positions(skeleton(bert())) == 32


def by_formula(config: Any, layers: int, width: int) -> tuple[int, int]:
    """A BERT's parameters in all, and without its embeddings."""
    inner = config.intermediate_size * width // config.hidden_size
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    rest = 2 * width + layers * layer + width * width + width
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    return rest + rows * width, rest


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(),
        bert(),
        bert(num_hidden_layers=3, vocab_size=5000),
        bert(num_attention_heads=1, intermediate_size=37),
        bert(num_attention_heads=24),
    ],
    ids=["base", "small", "3 layers", "1 head", "1 width"],
)
def test_narrower_is_the_closest_of_all_widths(config: Any) -> None:
    layers, width, heads = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
    )
    half = sizes.resized(config, layers // 2, width)
    in_all = (lambda model: count(model)[0], lambda c, w: by_formula(c, layers, w)[0])
    rest = (
        lambda model: count(model)[0] - count(model)[1],
        lambda c, w: by_formula(c, layers, w)[1],
    )
    for i, (size, oracle) in enumerate((in_all, rest)):
        target = by_formula(config, layers // 2, width)[i]
        off = {w: abs(oracle(config, w) - target) for w in range(heads, width + 1, heads)}
        assert sizes.narrower(config, half, size) == min(off, key=off.__getitem__)


def test_depth_and_width_of_bert_base() -> None:
    config = transformers.BertConfig()
    made = sizes.depth_and_width(Candidate("base", None, config, 0, 0, positions=512))
    assert [c.name for c in made] == [
        f"{shape}, random" for shape in ("6 x 768", "12 x 576", "12 x 540")
    ]
    for c, (layers, width) in zip(made, ((6, 768), (12, 576), (12, 540)), strict=True):
        in_all, rest = by_formula(config, layers, width)
        assert (c.parameters, c.embedding_parameters) == (in_all, in_all - rest)
        assert c.config.intermediate_size == 4 * width


def test_a_distilbert_is_resized_too() -> None:
    config = transformers.DistilBertConfig(dim=48, n_heads=4, n_layers=4, hidden_dim=192)
    resized = sizes.resized(config, 2, 24)
    assert (resized.n_layers, resized.dim, resized.hidden_dim) == (2, 24, 96)
    assert config.dim == 48


# --- Names and texts ------------------------------------------------------------------------------


def test_names_are_given_or_the_folders(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lr=1" / "model").mkdir(parents=True)
    assert sizes._name("runs/lr=1/model") == ("lr=1", "runs/lr=1/model")
    assert sizes._name("a=runs/lr=1/model") == ("a", "runs/lr=1/model")
    assert sizes._name("runs/lr=1") == ("lr=1", "runs/lr=1")
    assert sizes._name("asset:all-MiniLM-L6-v2")[0] == "all-MiniLM-L6-v2"
    assert sizes._name("user/model") == ("user/model", "user/model")


def test_a_hub_name_is_found_in_the_cache(teacher: Path) -> None:
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / "models--someone--tiny"
    shutil.copytree(teacher, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    [found] = sizes.load(["someone/tiny"], None, False, 8)
    assert found.name == "someone/tiny"
    assert found.source == str(cached / "snapshots" / ("0" * 40))
    assert found.disk_mib


def test_texts_have_their_own_lengths_up_to_the_positions(teacher: Path) -> None:
    [tiny] = sizes.load([str(teacher)], None, False, 8)
    found = sizes.tokenize(tiny, [("king queen",), ("king", "queen war"), ("king " * 100,)])
    assert list(map(len, found)) == [4, 6, 64]


# --- Who is measured when, and what comes of it ---------------------------------------------------


def test_everyone_is_asked_as_often_and_never_behind_the_same() -> None:
    texts = [[2, 3]] * 40
    three = [Candidate(name, None, None, 1, 0, texts=texts) for name in "abc"]
    asked = list(speed.turns(three, Mode("fp32", False), PLAN))
    assert asked[:3] == [("a", None), ("b", None), ("c", None)]
    assert [name for name, request in asked if request == 1] == list("abcbca")
    texts_of_a = [request for name, request in asked if name == "a" and isinstance(request, range)]
    assert [i for part in texts_of_a for i in part] == list(range(40))
    assert len(set(Counter(name for name, _ in asked).values())) == 1
    compiled = speed.turns(three, Mode("fp32", True), PLAN)
    assert not any(isinstance(request, range) for _, request in compiled)


def test_figures_are_worked_out_from_the_samples() -> None:
    first, second, third = (Candidate(n, None, None, 2**18, 2**10) for n in "abc")
    start = {"attention": "sdpa", "peak_mib": {1: 7.0, 2: 8.0}, "first_call_s": {1: 0.1, 2: 0.2}}
    answers = {
        **{("a", None): [start], ("b", None): [start]},
        **{("a", 1): [10.0, 20.0, 40.0], ("b", 1): [5.0, 5.0, 20.0]},
        **{("a", 2): [8.0] * 3, ("b", 2): [4.0] * 3},
        **{("b", range(2)): [300.0], ("b", range(2, 3)): [200.0]},
    }
    plan = Plan("cpu", 1, batches=[1, 2], sequence_length=8, rounds=3)
    found = speed.gather([first, second, third], Mode("bf16", False), plan, answers, {"c": "gone"})
    assert [row.get("speedup") for row in found] == [1, 1, 2, 2, None, None]
    b2 = found[3]
    assert (b2["latency_ms"], b2["sequences_per_s"], b2["tokens_per_s"]) == (4, 500, 4000)
    assert (b2["size_mib"], b2["peak_mib"], b2["parameters"]) == (0.5, 8, 2**18)
    assert found[2]["latency_ms"] == 5
    assert found[4]["pass_s"] == 0.5
    assert found[5] == {"model": "c", "precision": "bf16", "compile": False, "error": "gone"}
    # Without the first there is nothing to divide by.
    left = speed.gather([first, second], Mode("bf16", False), plan, answers, {"a": "gone"})
    assert [row["speedup"] for row in left if "batch" in row] == [None, None]


def test_spread_is_median_and_percentiles() -> None:
    assert speed.spread([3.0]) == (3, 3, 3)
    assert speed.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (3.5, 2, 5)


def test_numbers_have_three_digits() -> None:
    assert [compare.short(x) for x in (None, 0.0, 0.001234, 1.005, 66.36, 895.2, 12345.6)] == [
        *("", "0", "0.00123", "1.00", "66.4", "895", "12,346")
    ]


class Killed(Candidate):
    """As one for which the memory does not suffice."""

    def build(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(Candidate):
    def build(self) -> Any:
        raise RuntimeError("two\nlines")


@pytest.mark.thorough
def test_models_that_fail_are_named_and_the_others_kept(tmp_path: Path, capfd: Any) -> None:
    """And the memory of a model that is read from a file holds its weights, 64 MiB, and little
    else: not what a process of PyTorch's has anyway, some 300 MiB."""
    config = bert(num_hidden_layers=1, vocab_size=699_000)
    transformers.BertModel(config).save_pretrained(tmp_path / "large")
    [large] = sizes.load([str(tmp_path / "large")], None, False, 8)
    others = [candidate("killed", Killed), candidate("broken", Broken)]
    plan = Plan("cpu", 1, batches=[1], sequence_length=8, rounds=1)
    cli_log = "distilfast: killed in fp32: its process was killed"
    from distilfast.progress import log_to_stderr

    log_to_stderr()
    found = speed.measure([large, *others], [Mode("fp32", False)], plan)
    assert [row.get("error") for row in found] == [
        None,
        "its process was killed, as the system does when memory runs out",
        "RuntimeError: two lines",
    ]
    assert cli_log in capfd.readouterr().err
    assert 64 < found[0]["size_mib"] <= found[0]["peak_mib"] < 64 + 48


# --- The command ----------------------------------------------------------------------------------

KEYS = {
    *("model", "precision", "compile", "parameters", "embedding_parameters", "size_mib"),
    *("disk_mib", "batch", "sequence_length", "attention", "rounds", "latency_ms"),
    *("latency_p20_ms", "latency_p80_ms", "sequences_per_s", "tokens_per_s", "speedup"),
    *("peak_mib", "first_call_s"),
}


@pytest.mark.thorough
def test_compare_measures_and_leaves_its_files(teacher: Path, tmp_path: Path, capfd: Any) -> None:
    half = make_teacher(tmp_path / "half" / "model", n_layers=2)
    (tmp_path / "dev.tsv").write_text("sentence\nking queen\nwar\n", encoding="utf-8")
    output = tmp_path / "out"
    arguments = [
        *("compare", f"whole={teacher}", str(half), f"--output={output}", "--rounds=2"),
        *("--batches=2,1", "--no-compile", "--sequence_length=8", "--threads=1", "--device=cpu"),
        f"--data={tmp_path}",
    ]
    assert cli.main(arguments) == 0
    results = json.loads((output / "results.json").read_text())
    settings = json.loads((output / "settings.json").read_text())
    timed = [row for row in results if "batch" in row]
    assert all(set(row) == KEYS for row in timed)
    assert [(r["model"], r["precision"], r["batch"]) for r in timed] == [
        (model, precision, batch)
        for precision in ("fp32", "bf16")
        for model in ("whole", "half")
        for batch in (1, 2)
    ]
    for row in timed:
        assert 0 < row["latency_p20_ms"] <= row["latency_ms"] <= row["latency_p80_ms"]
        assert row["tokens_per_s"] == pytest.approx(8 * row["batch"] / row["latency_ms"] * 1e3)
        assert row["speedup"] == 1 or row["model"] == "half"
        assert (
            row["size_mib"] == row["parameters"] * (4 if row["precision"] == "fp32" else 2) / 2**20
        )
    passes = [row for row in results if "pass_s" in row]
    assert [(r["model"], r["precision"], r["texts"], r["tokens"]) for r in passes] == [
        (model, precision, 2, 7) for precision in ("fp32", "bf16") for model in ("whole", "half")
    ]
    assert settings["models"] == {"whole": str(teacher), "half": str(half)}
    assert (settings["batches"], settings["data"]) == ([1, 2], str(tmp_path))
    assert (output / "report.html").is_file()
    out = capfd.readouterr().out
    for part in (
        "| whole | 0.0398 | 0.00451 |",
        "in bf16.",
        "| DistilBERT (published) | 66 | 410 |",
    ):
        assert part in out
    assert not list(output.glob("*.tmp-*"))


@pytest.mark.thorough
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_models_are_measured(tmp_path: Path) -> None:
    config = bert(num_hidden_layers=1)
    plan = Plan("cpu", 1, batches=[1], sequence_length=8, rounds=1)
    [row] = speed.measure([candidate("tiny", config=config)], [Mode("bf16", True)], plan)
    assert set(row) == KEYS
    assert (row["compile"], row["disk_mib"]) == (True, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "MODEL: expected an existing file or folder, got 'nowhere/at/all'"),
        (["{tmp}"], "MODEL: expected a folder with config.json, got '{tmp}'"),
        (["{tmp}/damaged"], "MODEL: '{tmp}/damaged' cannot be loaded: "),
        (["{tmp}/t5"], "MODEL: expected an encoder, got '{tmp}/t5', a t5"),
        (
            ["{bert}", "{bert}"],
            "MODEL: expected names that differ, as NAME=MODEL gives",
        ),
        (["{bert}", "--precisions=fp32,fp16"], "--precisions: expected fp32 or bf16, got 'fp16'"),
        (["{bert}", "--batches=1,0"], "--batches: expected a whole number from 1, got '0'"),
        (
            ["{bert}", "--sequence_length=65"],
            "--sequence_length: expected at most 64",
        ),
        (["{bert}", "--data={tmp}/none.tsv"], "--data: expected a file, got"),
        (
            ["{bert}", "--data={tmp}/column.tsv"],
            "{tmp}/column.tsv: expected the columns sentence, got text, label",
        ),
        (
            ["{bert}", "--data={tmp}/fields.tsv"],
            "{tmp}/fields.tsv, line 3: expected 2 fields, got 1",
        ),
        (
            ["{bert}", "{tmp}/beyond", "--data={tmp}/beyond.tsv"],
            "MODEL: 'beyond' has 75 embeddings",
        ),
        (["{bert}", "--data={tmp}/empty.tsv"], "--data: expected texts in"),
        (
            ["{tmp}/one", "--depth_width"],
            "--depth_width: expected a first model of 2 layers",
        ),
        (
            ["{tmp}/one", "--data={tmp}/one.tsv"],
            "MODEL: 'one' has no tokenizer",
        ),
        (["{bert}", "--output={tmp}/one"], "--output: expected an empty folder or a comparison's"),
        (
            ["{bert}", "--output={tmp}/one.tsv/x"],
            "--output: expected a folder, got",
        ),
        (
            ["{bert}", "--output=/proc/nothing"],
            "--output: expected a folder that can be written to, got '/proc/nothing'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_measured(
    arguments: list[str], message: str, teacher: Path, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    (tmp_path / "column.tsv").write_text("text\tlabel\na\t1\n")
    (tmp_path / "fields.tsv").write_text("sentence\tlabel\na\t1\nb\n")
    (tmp_path / "empty.tsv").write_text("sentence\tlabel\n")
    (tmp_path / "one.tsv").write_text("sentence\na\n")
    (tmp_path / "beyond.tsv").write_text("sentence\nking\n")
    shutil.copytree(teacher, tmp_path / "beyond")
    content = json.loads((tmp_path / "beyond" / "tokenizer.json").read_text())
    content["model"]["vocab"]["king"] = 75
    (tmp_path / "beyond" / "tokenizer.json").write_text(json.dumps(content))
    transformers.BertModel(bert(num_hidden_layers=1)).save_pretrained(tmp_path / "one")
    t5 = transformers.T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=9)
    t5.save_pretrained(tmp_path / "t5")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("it went on to measure"))
    places = {"{tmp}": str(tmp_path), "{bert}": str(teacher)}

    def placed(text: str) -> str:
        for place, path in places.items():
            text = text.replace(place, path)
        return text

    given = [placed(argument) for argument in arguments]
    output = [] if any("--output" in g for g in given) else [f"--output={tmp_path / 'out'}"]
    capfd.readouterr()
    assert cli.main(["compare", "--sequence_length=8", *given, *output]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"distilfast: {placed(message)}"), err
    assert err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--device: expected auto or cpu"):
        compare.parse([str(teacher), f"--output={tmp_path / 'out'}", "--device=cuda"])


def test_an_earlier_comparison_may_be_written_over(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"command": "compare"}')
    assert compare.parse(["m", f"--output={tmp_path}"]).output == tmp_path
    (tmp_path / "settings.json").write_text('{"command": "glue"}')
    with pytest.raises(ConfigError, match="an empty folder or a comparison's"):
        compare.parse(["m", f"--output={tmp_path}"])
