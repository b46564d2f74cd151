"""Whatever is wrong with a run's arguments or inputs is said before training, in one line on stderr
that names the key or the file, what was expected and what came. The exit status is 2, and nothing
has been written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import distilfast_kernels
import pytest
import torch
import transformers
import yaml
from conftest import NARROW, ROOT, WORDS, make_masked_lm, make_teacher
from safetensors.torch import load_file, save_file

from distilfast import cli, config, data, train
from distilfast.losses import backends

Refuse = Callable[..., str]

LONG = " ".join(WORDS[:20])
# What only someone who knows jsonargparse or Python can read.
JARGON = re.compile(
    r"<class|Namespace\(|Subtypes|Parser key|Traceback|NoneType|object is not|not supported between"
)


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: pytest.LogCaptureFixture
) -> Refuse:
    """Runs the driver on arguments that it has to refuse, and gives its one line."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def call(*arguments: str, program: Callable[[list[str]], int] = train.main) -> str:
        before = contents(tmp_path)
        capfd.readouterr()
        caplog.clear()
        status = program(list(arguments))
        out, err = capfd.readouterr()
        assert status == 2, err
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("distilfast: ")
        assert not caplog.records, caplog.text  # outside pytest they would be further lines
        assert not JARGON.search(err), err
        assert contents(tmp_path) == before
        return str(err).removeprefix("distilfast: ").strip()

    return call


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by path."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


@pytest.fixture
def base(recipe: list[str], tmp_path: Path) -> Path:
    """The recipe with its tokens in its output, so that one folder holds all that a run writes."""
    settings = yaml.safe_load(Path(recipe[1]).read_text(encoding="utf-8"))
    settings["data"]["prepared"] = None
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def changed(base: Path, changes: dict[str, Any]) -> list[str]:
    """Arguments for ``base`` with other values, all of them in the file."""
    settings = yaml.safe_load(base.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *section, name = key.split(".")
        (settings.setdefault(section[0], {}) if section else settings)[name] = value
    path = base.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(path)]


def arguments(base: Path, **changes: Any) -> list[str]:
    """Arguments for ``base`` with overrides; a __ stands for the dot in a key."""
    given = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return ["--config", str(base), *given]


# --- Keys and values ------------------------------------------------------------------------------

UNKNOWN = [
    ("loss.temprature", "loss.temperature"),
    ("temperature", "loss.temperature"),
    ("optimizer.learningrate", "optimizer.learning_rate"),
    ("batch.sequence", "batch.sequences"),
    ("outptu", "output"),
    ("nothing_like_it", "teacher"),  # no key resembles it: the known ones are listed
]


@pytest.mark.parametrize(("key", "meant"), UNKNOWN)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_unknown_key_is_named_with_the_nearest(
    where: str, key: str, meant: str, base: Path, refuse: Refuse
) -> None:
    given = changed(base, {key: 3}) if where == "file" else ["--config", str(base), f"--{key}", "3"]
    message = refuse(*given)
    origin = re.escape(f"{base.with_name('changed.yaml')}: ") if where == "file" else "--"
    assert re.match(rf"({origin})?{re.escape(key)}: unknown key(?: in \S+)?; ", message)
    assert meant in message


def test_unknown_section_is_named_with_the_nearest(base: Path, refuse: Refuse) -> None:
    for given in (changed(base, {"losss.temperature": 3}), arguments(base, losss__temperature=3)):
        assert re.search(r"losss(\.temperature)?: unknown key.*; did you mean loss", refuse(*given))


@pytest.mark.parametrize("key", ["local_rank", "config", "print_config"])
def test_option_is_no_key_of_a_file(key: str, base: Path, refuse: Refuse) -> None:
    assert f"{key}: unknown key" in refuse(*changed(base, {key: None}))


@pytest.mark.parametrize("key", ["loss.temp", "out", "batch.seq"])
def test_abbreviated_key_is_unknown(key: str, base: Path, refuse: Refuse) -> None:
    assert f"{key}: unknown key" in refuse("--config", str(base), f"--{key}", "3")


def test_key_without_a_recipe_is_unknown_too(refuse: Refuse) -> None:
    assert "did you mean loss.temperature?" in refuse("--loss.temprature", "3")


@pytest.mark.parametrize(
    ("key", "unknown", "meant"),
    [("teacher", "weigth", "weight"), ("data.source", "colum", "column")],
)
def test_unknown_key_of_an_entry_is_named_with_the_nearest(
    key: str, unknown: str, meant: str, base: Path, refuse: Refuse
) -> None:
    entry = {"name": str(base.parent), unknown: 1}
    for given in (changed(base, {key: [entry]}), arguments(base, **{key: json.dumps([entry])})):
        message = refuse(*given)
        assert key in message
        assert f"{unknown}: unknown key" in message
        assert "; did you mean " in message
        assert f"{meant}?" in message


def test_entry_without_a_name_is_refused(base: Path, refuse: Refuse) -> None:
    for key in ("teacher", "data.source"):
        message = refuse(*changed(base, {key: [{"revision": "main"}]}))
        assert f"{key}: expected" in message
        assert "name" in message


# key, value, what the line says was expected
WRONG_TYPE = [
    ("loss.temperature", "hot", "a number"),
    ("loss.temperature", [2], "a number"),
    ("loss.temperature", True, "a number"),
    ("optimizer.betas", [0.9], "a list of 2 numbers"),
    ("optimizer.betas", 0.9, "a list of 2 numbers"),
    ("student.layers", "every", "one of 'alternate', 'all' or a list of whole numbers"),
    ("student.layers", [0, "x"], "a list of whole numbers"),
    ("student.layers", [0.5], "a list of whole numbers"),
    ("batch.sequences", "many", "a whole number or null"),
    ("batch.sequences", 16.5, "a whole number or null"),
    ("steps", "ten", "a whole number or null"),
    ("steps", 1.5, "a whole number or null"),
    ("steps", True, "a whole number or null"),
    ("seed", 1.5, "a whole number"),
    ("masking.probability", "15%", "a number"),
    ("tensorboard", "maybe", "true or false"),
    ("precision", "fp16", "'bf16', 'fp32'"),
    ("resume", "maybe", "'auto', 'never'"),
    ("student.init", "magic", "'teacher', 'random'"),
    ("data.txt_rows", "word", "'line', 'paragraph', 'document'"),
    ("loss.backend", "cuda", "'auto', 'triton', 'cpp', 'torch'"),
    ("zero.stage", 4, "0, 1, 2, 3"),
    ("zero.offload", "cpu", "'none', 'optimizer', 'parameters'"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_TYPE)
def test_wrong_type_is_refused(
    key: str, value: Any, expected: str, base: Path, refuse: Refuse
) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    for given, came in (
        (changed(base, {key: value}), str(value)),
        (["--config", str(base), f"--{key}", text], text),
    ):
        message = refuse(*given)
        assert message.startswith(f"{key}: expected ")
        assert expected in message
        assert message.lower().endswith(f"got {came.lower()}".replace('"', "'"))


def test_section_has_to_be_a_mapping(base: Path, refuse: Refuse) -> None:
    for value in (5, None, [1], "alternate"):
        assert "student: expected" in refuse(*changed(base, {"student": value}))
    for text in ("5", "null", "[1]"):
        assert "student: expected" in refuse("--config", str(base), "--student", text)


REQUIRED = [
    *("teacher", "output", "precision", "resume", "seed", "tensorboard", "student.layers"),
    *("data.column", "data.max_length", "loss.temperature", "optimizer.betas"),
    *("batch.micro_sequences", "zero.stage"),
]


@pytest.mark.parametrize("key", REQUIRED)
def test_null_is_refused_where_a_value_is_needed(key: str, base: Path, refuse: Refuse) -> None:
    assert refuse(*changed(base, {key: None})).startswith(f"{key}: expected")


@pytest.mark.parametrize("key", ["teacher", "student.model", "data.source", "output"])
def test_empty_name_is_refused(
    key: str, base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path("") is the working directory, which nobody meant."""
    assert refuse("--config", str(base), f"--{key}", "").startswith(f"{key}: expected")


# key, value, what the line says was expected
WRONG_VALUE = [
    ("loss.temperature", 0, "> 0"),
    ("loss.temperature", -1.5, "> 0"),
    ("loss.kd_weight", -1, ">= 0"),
    ("loss.ce_weight", -0.5, ">= 0"),
    ("loss.hidden_cos_weight", -1, ">= 0"),
    ("loss.logit_cos_weight", -1, ">= 0"),
    ("loss.mse_weight", -1, ">= 0"),
    ("loss.jsd_beta", 1, "< 1"),
    ("student.layers", [0, 4], "0 to 3"),
    ("student.layers", [-1, 2], "rising"),
    ("student.layers", [2, 1], "rising"),
    ("student.layers", [1, 1], "rising"),
    ("student.layers", [], "at least one"),
    ("student.dropout", 1, "1"),
    ("data.max_length", 65, "at most 64"),  # the teacher has 64 positions
    ("data.max_length", 2, "at least 3"),
    ("data.min_length", 30, "at most"),
    ("data.heldout", 1, "1"),
    ("data.max_unknown", 0, "0 < x"),
    ("masking.probability", 0, "0 < x"),
    ("masking.probability", 1, "< 1"),
    ("masking.smoothing", -1, ">= 0"),
    ("optimizer.learning_rate", 0, "> 0"),
    ("optimizer.warmup_ratio", 1, "1"),
    ("optimizer.warmup_ratio", -0.1, "0"),
    ("optimizer.weight_decay", -0.1, ">= 0"),
    ("optimizer.max_grad_norm", -1, ">= 0"),
    ("optimizer.epsilon", 0, "> 0"),
    ("optimizer.betas", [0.9, 1.0], "up to 1"),
    ("batch.sequences", 0, "at least 1"),
    ("batch.micro_sequences", 0, "at least 1"),
    ("steps", 0, "at least 1"),
    ("seed", -1, "2^64"),
    ("seed", 2**64, "2^64"),
    ("evaluate.every", -1, ">= 0"),
    ("evaluate.max_examples", 0, "at least 1"),
    ("checkpoint.every", -1, ">= 0"),
    ("checkpoint.keep", 0, "at least 1"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_VALUE)
def test_wrong_value_is_refused(
    key: str, value: Any, expected: str, base: Path, refuse: Refuse
) -> None:
    message = refuse("--config", str(base), f"--{key}", str(value))
    assert message.startswith(f"{key}: expected ")
    came = message.partition(", got ")
    assert expected in came[0]
    assert json.loads(came[2].replace("(", "[").replace(")", "]")) == value


def float_keys() -> list[str]:
    """All keys that hold a float, from the schema."""
    keys = [f.name for f in fields(config.Config) if "float" in str(f.type)]
    for section in fields(config.Config):
        kind = section.default_factory
        if is_dataclass(kind):
            keys += [f"{section.name}.{f.name}" for f in fields(kind) if "float" in str(f.type)]
    return keys


@pytest.mark.parametrize("key", float_keys())
def test_number_that_is_not_finite_is_refused(key: str, base: Path, refuse: Refuse) -> None:
    for value in (math.nan, math.inf):
        pair = [value, 0.9] if key == "optimizer.betas" else value
        steps = {"steps": None} if key == "epochs" else {}
        message = refuse(*changed(base, {key: pair, **steps}))
        assert message.startswith(f"{key}: expected") or "masking.mask, random, keep" in message
        assert str(value) in message


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-inf", "-.inf"])
def test_word_for_no_finite_number_is_refused(text: str, base: Path, refuse: Refuse) -> None:
    for key in ("loss.temperature", "loss.kd_weight"):
        message = refuse(f"--config={base}", f"--{key}={text}")
        assert message.startswith(f"{key}: expected")
        assert message.endswith(f"got {text.replace('.', '')}")


def test_all_weights_0_are_refused(base: Path, refuse: Refuse) -> None:
    none = {"loss.kd_weight": 0, "loss.ce_weight": 0, "loss.hidden_cos_weight": 0}
    message = refuse(*changed(base, none))
    assert all(key in message for key in none)
    assert "at least one weight > 0" in message


def test_masking_shares_have_to_sum_to_1(base: Path, refuse: Refuse) -> None:
    message = refuse(*arguments(base, masking__mask=0.5))
    assert "masking.mask" in message
    assert "(0.5, 0.1, 0.1)" in message


def test_one_of_steps_and_epochs_is_needed(base: Path, refuse: Refuse) -> None:
    for changes, got, hint in (
        ({"epochs": 2}, "(10, 2.0)", "unset the other, as in --steps null"),
        ({"steps": None}, "(null, null)", "set one, in a file after --config or as in --steps "),
    ):
        message = refuse(*changed(base, changes))
        assert message.startswith(f"steps, epochs: expected one of the two, got {got}; {hint}")
    message = refuse(*changed(base, {"steps": None, "epochs": 0}))
    assert message.startswith("epochs: expected a number > 0")


def test_bf16_is_refused_at_stage_0(base: Path, refuse: Refuse) -> None:
    message = refuse(*arguments(base, precision="bf16", zero__stage=0))
    assert message.startswith("zero.stage: expected 1, 2 or 3 with precision bf16")
    assert message.endswith("got 0")


@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_teacher_is_refused_below_stage_3(stage: int, base: Path, refuse: Refuse) -> None:
    message = refuse(*arguments(base, zero__stage=stage, zero__shard_teacher=True))
    assert message.startswith("zero.stage: expected 3 with zero.shard_teacher")
    assert message.endswith(f"got {stage}")


@pytest.mark.parametrize(
    ("stage", "offload", "lowest"),
    [(0, "optimizer", 1), (0, "parameters", 3), (1, "parameters", 3), (2, "parameters", 3)],
)
def test_offload_is_refused_where_nothing_is_split(
    stage: int, offload: str, lowest: int, base: Path, refuse: Refuse
) -> None:
    message = refuse(*arguments(base, zero__stage=stage, zero__offload=offload))
    assert message.startswith(f"zero.stage: expected {lowest} or more with zero.offload {offload}")
    assert message.endswith(f"got {stage}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"tokens": 99},
            "batch.sequences, batch.tokens: expected one of the two, got (16, 99); unset the "
            "other, as in --batch.sequences null",
        ),
        (
            {"warmup_from": 8},
            "batch.warmup_from, batch.warmup_steps: expected null and 0, or both at least 1, "
            "got (8, 0)",
        ),
        (
            {"warmup_steps": 8},
            "batch.warmup_from, batch.warmup_steps: expected null and 0, or both at least 1, "
            "got (null, 8)",
        ),
        (
            {"warmup_from": 17, "warmup_steps": 8},
            "batch.warmup_from: expected at most batch.sequences (16), got 17",
        ),
    ],
)
def test_keys_of_a_batch_that_disagree_are_refused(
    changes: dict[str, int], line: str, base: Path, refuse: Refuse
) -> None:
    given = {f"batch__{name}": value for name, value in changes.items()}
    assert refuse(*arguments(base, **given)) == line


@pytest.mark.parametrize(
    ("batch", "ranks", "key", "expected"),
    [
        ({"sequences": 3}, 4, "sequences", "at least 4, the number of ranks, got 3"),
        (
            {"sequences": 16, "warmup_from": 3, "warmup_steps": 2},
            *(4, "warmup_from", "at least 4, the number of ranks, got 3"),
        ),
        (
            {"sequences": "null", "tokens": 23},
            *(1, "tokens", "at least 24, data.max_length x ranks (24 x 1), got 23"),
        ),
        (
            {"sequences": "null", "tokens": 99, "warmup_from": 47, "warmup_steps": 9},
            *(2, "warmup_from", "at least 48, data.max_length x ranks (24 x 2), got 47"),
        ),
    ],
)
def test_batch_without_an_example_for_each_rank_is_refused(
    batch: dict[str, Any],
    ranks: int,
    key: str,
    expected: str,
    base: Path,
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {f"batch__{name}": value for name, value in batch.items()}
    if ranks == 1:
        message = refuse(*arguments(base, **changes))
    else:  # the launcher's variable; `check` tells the ranks from it without starting them
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        message = refuse("check", *arguments(base, **changes), program=cli.main)
    assert message == f"batch.{key}: expected {expected}"


# --- The file of the configuration ----------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "5",
        "only words",
        "a: b: c",
        "\t- x: [",
        "!!python/object:os.system x",
        "a: 1\n---\nb: 2",
    ],
)
def test_file_that_is_no_mapping_in_yaml_is_refused(
    text: str, refuse: Refuse, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    message = refuse("--config", str(path))
    assert message.startswith(f"{path}: expected")
    assert "got" in message


def test_file_is_refused_with_the_line_of_its_fault(refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, fault in (
        ("steps: 5\nloss:\n\ttemperature: 2\n", "line 3: found character '\\t' that "),
        ("steps: 5\nseed: 1\nsteps: 6\n", "line 3: the key steps stands twice"),
        ("loss:\n  kd_weight: 1\n  kd_weight: 2\n", "line 3: the key kd_weight stands twice"),
    ):
        path.write_text(text, encoding="utf-8")
        message = refuse("--config", str(path))
        assert message.startswith(f"{path}: expected YAML, got an error in {fault}")


def test_file_that_is_no_text_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(bytes(range(256)))
    assert refuse("--config", str(path)).startswith(f"{path}: expected YAML")


def test_key_that_is_no_text_is_refused(base: Path, refuse: Refuse) -> None:
    base.write_text(base.read_text(encoding="utf-8") + "5: 6\n", encoding="utf-8")
    assert str(base) in refuse("--config", str(base))


def test_missing_file_is_refused_with_the_recipes_at_hand(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for name, hint in (
        ("nothing.yaml", ""),
        (str(tmp_path), ""),
        ("dmeo", "; did you mean demo?"),
        (f"{tmp_path}/my.yml", f"; did you mean {tmp_path}/my.yaml?"),
        (f"{tmp_path}/run", f"; did you mean {tmp_path}/run/config.yaml?"),
    ):
        for given in (["--config", name], [f"--config={name}"]):
            message = refuse(*given)
            assert message.startswith("--config: expected a YAML file or one of the recipes demo, ")
            assert message.endswith(f", got {name!r}{hint}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--config", "--config: expected a value, got none"),
        ("--steps", "--steps: expected a value, got none"),
        ("--steps=", "steps: expected a whole number or null, got none"),
        ("--steps --seed 3", "--steps: expected a value, got --seed"),
        ("my.yaml", "expected --key value, got 'my.yaml'; did you mean --config my.yaml?"),
        ("-steps 3", "expected --key value, got '-steps'; did you mean --steps?"),
        (
            "--optimizer.betas 0.9 0.98",
            "expected --key value, got '0.98'; a list is one value, as in --student.layers '[0, ",
        ),
        ("--print_config=yes", "--print_config: expected no value, got 'yes'"),
        ("--local_rank x", "local_rank: expected a whole number, got x"),
        ("--loss {warmth:1}", "loss.warmth:1: unknown key; known are temperature, kd_weight, "),
        ("--output null", "output: expected text, got null"),
        ("--student {layers:", "student: expected YAML, got an error: expected the node content"),
    ],
)
def test_misshapen_option_is_refused(given: str, message: str, base: Path, refuse: Refuse) -> None:
    assert refuse("--config", str(base), *given.split()).startswith(message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[a, {name: b, weigth: 2}]", "teacher.weigth: unknown key in the command line; did you "),
        ("[a, {name: b, weight: x}]", "teacher: weight: expected a number, got 'x'"),
        ("[a, {name: b, revision: 1}]", "teacher: revision: expected text or null, got 1"),
        ("[a, 5]", "teacher: expected text or a list of names or {name, weight, revision}, got ["),
        ("{name: a}", "teacher: expected text or a list of names or {name, weight, revision}, got"),
        ("[a, {name: b", "teacher: expected YAML, got an error: expected ',' or '}'"),
    ],
)
def test_list_of_teachers_on_the_command_line_is_checked(
    value: str, message: str, base: Path, refuse: Refuse
) -> None:
    for given in (["--teacher", value], [f"--teacher={value}"]):
        assert refuse("--config", str(base), *given).startswith(message)


# --- Text -----------------------------------------------------------------------------------------

# name of the file, its bytes, what the line has to say
BAD_TEXT = [
    ("empty.txt", b"", "expected text"),
    ("blank.txt", b"\n\n\n", "expected"),
    ("short.txt", b"the a\nof to in\n" * 50, "at least 12 tokens"),
    ("unknown.txt", b"zzz qqq xxx yyy\n" * 50, "expected"),
    ("one.txt", LONG.encode() + b"\n", "held out"),  # nothing is left for evaluation
    ("same.txt", (LONG.encode() + b"\n") * 9, "two different texts"),
    ("empty.jsonl", b"", "expected text"),
    ("blank.jsonl", b"\n\n", "expected text"),
    ("empty.csv", b"", "expected text"),
    ("head.csv", b"text\n", "expected text"),
    ("other.jsonl", b'{"body": "a"}\n{"body": "b"}\n', "column 'text'"),
    ("other.csv", b"body,title\na,b\n", "column 'text'"),
    ("broken.jsonl", b'{"text": "a b c"}\n{"text": \n', "json"),
    ("tail.jsonl", b'{"text": "%s"}\n' % LONG.encode() * 30 + b"not json\n", "json"),
    ("word.jsonl", b'"abc"\n', "json"),
    ("list.jsonl", b'{"text": ["a", "b"]}\n', "text"),
    ("object.jsonl", b'{"text": {"a": "b"}}\n', "text"),
    ("half.jsonl", b'{"text": "a \\ud800"}\n', "json: line 1"),
    ("comma.csv", b"title,text\na,b,c\n", "csv: line 2"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n' * 20, "UTF"),
    ("latin.txt", b"caf\xe9 au lait\n" * 20, "byte 0xe9 in line 1"),
    ("quote.csv", b'text\n"never closed\n', "csv"),
    ("broken.parquet", b"these are no columns", "parquet"),
    ("letter.pdf", b"%PDF", ".txt, .jsonl"),
    ("noending", b"words", ".txt, .jsonl"),
]


@pytest.mark.parametrize(("name", "text", "expected"), BAD_TEXT, ids=[row[0] for row in BAD_TEXT])
def test_bad_text_is_refused(
    name: str, text: bytes, expected: str, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    given = changed(base, {"data.source": str(path)})
    message = refuse(*given)
    assert message.startswith("data.source: ")
    assert str(path) in message
    assert expected in message
    if path.stem not in ("short", "unknown", "one", "same"):  # what shows when all is tokenised
        assert refuse("check", *given, program=quiet_check) == message


def test_column_that_is_missing_from_parquet_is_named(
    base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [LONG], "title": ["a"]}), path)
    message = refuse(*changed(base, {"data.source": str(path), "data.column": "body"}))
    for word in ("data.source: expected", "'body'", str(path), "got text, title", "data.column"):
        assert word in message


def test_column_of_lists_in_parquet_is_refused(base: Path, refuse: Refuse, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [[LONG], [LONG]]}), path)
    message = refuse(*changed(base, {"data.source": str(path)}))
    assert message.startswith("data.source: ")
    assert str(path) in message


def test_folder_without_text_is_refused(base: Path, refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    assert str(folder) in refuse(*changed(base, {"data.source": str(folder)}))
    (folder / "a.pdf").write_bytes(b"%PDF")
    assert ".txt, .jsonl" in refuse(*changed(base, {"data.source": str(folder)}))


def test_second_source_is_checked_before_the_first_is_tokenised(
    base: Path, corpus: Path, refuse: Refuse, tmp_path: Path
) -> None:
    missing, other = tmp_path / "nothing.txt", tmp_path / "other.jsonl"
    other.write_text('{"body": 1}\n', encoding="utf-8")
    for second, expected in ((missing, "an existing file"), (other, "column 'text'")):
        message = refuse(*changed(base, {"data.source": [str(corpus), str(second)]}))
        assert message.startswith("data.source: expected")
        assert expected in message
        assert str(second) in message


def test_no_source_is_refused(base: Path, refuse: Refuse) -> None:
    for nothing in (None, []):
        message = refuse(*changed(base, {"data.source": nothing}))
        assert message.startswith("data.source: expected")


# --- Names of files, folders and the hub ----------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub to which one can connect, and which never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield server


def was_asked(hub: socket.socket) -> bool:
    try:
        hub.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("key", ["teacher", "student.model", "data.source"])
@pytest.mark.parametrize(
    "name",
    ["runs/nothing", "./x", "../x", "/abs/x", "~/no-such-folder", "x.txt", "a/b/c", "data/x.jsonl"],
)
def test_missing_path_is_never_asked_of_the_hub(
    name: str, key: str, base: Path, refuse: Refuse, hub: socket.socket
) -> None:
    Path("runs").mkdir()
    message = refuse(*changed(base, {key: name}))
    assert message.startswith(f"{key}: expected")
    assert repr(name) in message
    assert "hub" not in message
    assert not was_asked(hub)


def test_run_is_never_asked_of_the_hub(base: Path, refuse: Refuse, hub: socket.socket) -> None:
    """Before the first run there is no folder "runs" yet, but it is still where runs are."""
    message = refuse(*changed(base, {"teacher": "runs/nothing"}))
    assert "'runs/nothing'" in message
    assert not was_asked(hub)


def test_silent_hub_is_given_up_within_10_seconds(
    base: Path, refuse: Refuse, hub: socket.socket
) -> None:
    began = time.monotonic()
    message = refuse(*changed(base, {"teacher": "no-such-user/no-such-model"}))
    assert time.monotonic() - began < 10
    assert was_asked(hub)
    assert message.startswith("teacher: expected a folder or a name")
    assert "'no-such-user/no-such-model'" in message
    assert "hub does not answer" in message


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("key", ["teacher", "data.source"])
def test_hub_name_without_network_is_refused(
    key: str, offline: bool, base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not offline:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
        monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("no-such-user/no-such-name", "no-such-name"):
        value = [{"name": name, "revision": "1" * 40}]
        began = time.monotonic()
        message = refuse(*changed(base, {key: value}))
        assert time.monotonic() - began < 10
        assert message.startswith(f"{key}: expected")
        assert repr(name) in message


@pytest.mark.parametrize("key", ["teacher", "student.model", "data.source"])
def test_unknown_asset_is_refused(key: str, base: Path, refuse: Refuse) -> None:
    message = refuse(*changed(base, {key: "asset:nothing"}))
    assert message.startswith(f"{key}: expected one of asset:")
    assert message.endswith("got 'asset:nothing'")


def test_student_whose_layers_cannot_be_computed_again_is_refused(
    base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, student = "batch.activation_checkpointing", transformers.DistilBertForMaskedLM
    monkeypatch.setattr(student, "supports_gradient_checkpointing", False)
    given = changed(base, {key: True})
    message = refuse(*given)
    assert message.startswith(f"{key}: expected false with a distilbert, ")
    assert refuse("check", *given, program=quiet_check) == message


# --- Teachers -------------------------------------------------------------------------------------


@pytest.fixture
def other(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher, to be damaged."""
    return Path(shutil.copytree(teacher, tmp_path / "other"))


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
    return folder


def with_weights(folder: Path, name: str, value: float) -> None:
    """Give all weights of that name's end one value."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    changed = {k: x * 0 + value if k.endswith(name) else x for k, x in weights.items()}
    save_file(changed, file, metadata={"format": "pt"})


def with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# name, damage, what the line says
DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config.json", lambda f: (f / "config.json").unlink(), "config.json"),
    ("broken config.json", lambda f: (f / "config.json").write_text("{ no"), "config.json"),
    ("empty config.json", lambda f: (f / "config.json").write_text(""), "config.json"),
    ("no object", lambda f: (f / "config.json").write_text("[]"), "model_type"),
    ("gpt2", lambda f: with_config(f, model_type="gpt2"), "expected all weights of a GPT2LMHead"),
    ("unheard-of type", lambda f: with_config(f, model_type="unheard-of"), "unheard-of"),
    ("own code", lambda f: with_config(f, model_type="x", auto_map={"AutoConfig": "x.X"}), "code"),
    ("words for numbers", lambda f: with_config(f, hidden_size="wide"), "hidden_size"),
    ("indivisible heads", lambda f: with_config(f, num_attention_heads=5), "heads"),
    ("unknown activation", lambda f: with_config(f, hidden_act="wavy"), "wavy"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    ("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    ("weights cut short", lambda f: cut_short(f / "model.safetensors"), "cannot be loaded"),
    ("pickle", with_pickle, "cannot be loaded: a file of weights is damaged"),
    (
        "weights of another width",
        lambda f: with_config(f, hidden_size=64),
        "expected bert.embeddings.LayerNorm.bias of shape (64,), got (32,)",
    ),
    (
        "NaN in a weight that no check's text reads",
        lambda f: with_weights(f, "token_type_embeddings.weight", math.nan),
        "expected finite weights, got NaN or inf in bert.embeddings.token_type",
    ),
    ("zeros", lambda f: with_weights(f, "", 0), "got zeros alone"),
    ("quantised", lambda f: with_config(f, quantization_config={"quant_method": "gptq"}), "quant"),
    ("adapter", lambda f: (f / "adapter_config.json").touch(), "adapter_config.json"),
    ("decoder", lambda f: with_config(f, is_decoder=True), "expected an encoder"),
    ("padding", lambda f: with_config(f, pad_token_id=1000), "Padding_idx"),
    (
        "too few layers",
        lambda f: with_config(f, num_hidden_layers=6),
        "got none for bert.encoder.layer.4",
    ),
    ("broken tokenizer", lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
]


@pytest.mark.parametrize(
    ("damage", "expected"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_damaged_teacher_is_refused(
    damage: Callable[[Path], Any], expected: str, other: Path, base: Path, refuse: Refuse
) -> None:
    damage(other)
    message = refuse(*changed(base, {"teacher": str(other)}))
    assert message.startswith("teacher")
    assert str(other) in message
    assert expected in message


def test_teacher_without_tokenizer_is_refused(other: Path, base: Path, refuse: Refuse) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (other / name).unlink()
    message = refuse(*changed(base, {"teacher": str(other)}))
    assert message.startswith("teacher: ")
    assert "tokenizer" in message


def test_teacher_that_is_a_file_is_refused(corpus: Path, base: Path, refuse: Refuse) -> None:
    message = refuse(*changed(base, {"teacher": str(corpus)}))
    assert message.startswith("teacher: expected a folder")
    assert str(corpus) in message


def test_run_in_place_of_its_model_is_refused_with_the_model(
    teacher: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").touch()
    message = refuse(*arguments(base, teacher=tmp_path / "old"))
    assert message.endswith(f"got '{tmp_path}/old', a run that is not finished")
    shutil.copytree(teacher, tmp_path / "old" / "model")
    message = refuse(*arguments(base, teacher=tmp_path / "old"))
    assert message.endswith(f"got '{tmp_path}/old'; did you mean '{tmp_path}/old/model'?")


def test_encoder_without_a_head_is_refused_while_logits_are_needed(
    other: Path, base: Path, refuse: Refuse
) -> None:
    import transformers

    encoder = transformers.BertForMaskedLM.from_pretrained(other).bert
    encoder.save_pretrained(other)
    for weight in ("kd", "mse", "logit_cos"):
        weights = {
            f"loss.{name}_weight": int(name == weight) for name in ("kd", "mse", "logit_cos")
        }
        message = refuse(*changed(base, {"teacher": str(other), **weights}))
        assert message.startswith(f"teacher: {str(other)!r} has no masked-LM head")


def test_tokenizer_larger_than_the_embeddings_is_refused(
    other: Path, base: Path, refuse: Refuse
) -> None:
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(other)
    model.resize_token_embeddings(40)
    model.save_pretrained(other)
    message = refuse(*changed(base, {"teacher": str(other)}))
    assert message.startswith(f"teacher: {str(other)!r} has embeddings for 40 tokens")
    assert str(len(WORDS) + 5) in message


def test_teachers_have_to_share_one_vocabulary(
    teacher: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    shorter = make_teacher(tmp_path / "shorter", words=WORDS[:-1])
    swapped = make_teacher(tmp_path / "swapped", words=WORDS[::-1])  # as many, in another order
    for second in (shorter, swapped):
        message = refuse(*changed(base, {"teacher": [str(teacher), str(second)]}))
        assert message.startswith("teacher: expected one vocabulary, got")
        assert str(teacher) in message
        assert str(second) in message


def test_teachers_have_to_share_one_width_for_the_hidden_loss(
    teacher: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    import transformers

    wide = Path(shutil.copytree(teacher, tmp_path / "wide"))
    with_config(wide, hidden_size=48)
    torch.manual_seed(0)
    shape = transformers.BertConfig.from_pretrained(wide)
    transformers.BertForMaskedLM(shape).save_pretrained(wide)
    message = refuse(*changed(base, {"teacher": [str(teacher), str(wide)]}))
    assert message.startswith("loss.hidden_cos_weight: expected 0")
    assert "32" in message
    assert "48" in message


def test_second_teacher_is_checked_too(
    teacher: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    missing = tmp_path / "nothing"
    message = refuse(*changed(base, {"teacher": [str(teacher), str(missing)]}))
    assert message == f"teacher: expected an existing file or folder, got {str(missing)!r}"


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "heavy"])
def test_wrong_weight_of_a_teacher_is_refused(
    weight: Any, teacher: Path, base: Path, refuse: Refuse
) -> None:
    entries = [str(teacher), {"name": str(teacher), "weight": weight}]
    message = refuse(*changed(base, {"teacher": entries}))
    assert message.startswith("teacher")
    assert "weight" in message
    assert str(weight) in message
    assert len(message) < 300


def test_teachers_of_weight_0_are_refused(teacher: Path, base: Path, refuse: Refuse) -> None:
    message = refuse(*changed(base, {"teacher": [{"name": str(teacher), "weight": 0}]}))
    assert message.startswith("teacher: expected a weight > 0")
    assert refuse(*changed(base, {"teacher": []})).startswith("teacher: expected at least one")


def test_logits_of_a_probability_ensemble_are_refused(
    teacher: Path, base: Path, refuse: Refuse
) -> None:
    for weight in ("loss.mse_weight", "loss.logit_cos_weight"):
        changes = {"teacher": [str(teacher), str(teacher)], weight: 1}
        message = refuse(*changed(base, changes))
        assert weight in message
        assert "expected 0 with ensemble probability" in message


# --- Students that exist already ------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "max_position_embeddings": 64}


@pytest.fixture
def student(teacher: Path, tmp_path: Path) -> Path:
    return make_masked_lm(tmp_path / "student", "Bert", teacher, **SMALL)


def other_kind(folder: Path, kind: str, **settings: Any) -> None:
    """Put a model of another family in its place, with the same tokenizer."""
    (folder / "model.safetensors").unlink()
    make_masked_lm(folder, kind, None, **SMALL | settings)


def encoder_decoder(folder: Path) -> None:
    import transformers

    transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1).save_pretrained(folder)


def half_a_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = {k: x for k, x in load_file(file).items() if "transform.dense" not in k}
    save_file(weights, file, metadata={"format": "pt"})


def other_words(folder: Path) -> None:
    swapped = make_teacher(folder.with_name("swapped"), words=WORDS[::-1])
    shutil.copy(swapped / "tokenizer.json", folder)


def no_tokenizer(folder: Path, rows: int) -> None:
    (folder / "tokenizer.json").unlink()
    other_kind(folder, "Bert", vocab_size=rows)


# name, damage, what the line says
UNFIT: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no config.json", lambda f: (f / "config.json").unlink(), "config.json"),
    ("own code", lambda f: with_config(f, model_type="x", auto_map={"AutoConfig": "x.X"}), "code"),
    ("gpt2", lambda f: with_config(f, model_type="gpt2"), "as a masked LM, got one of type 'gpt2'"),
    ("two stacks", encoder_decoder, "expected an encoder, got 'bart', which has a decoder too"),
    ("decoder", lambda f: with_config(f, is_decoder=True), "expected an encoder"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    ("missing layers", lambda f: with_config(f, num_hidden_layers=2), "got none for bert.encoder"),
    ("half a head", half_a_head, "expected a whole masked-LM head or none"),
    ("NaN", lambda f: with_weights(f, "LayerNorm.weight", math.nan), "expected finite weights"),
    ("zeros", lambda f: with_weights(f, "", 0), "got zeros alone"),
    ("quantised", lambda f: with_config(f, quantization_config={"quant_method": "gptq"}), "quant"),
    (
        "head that is no product",
        lambda f: other_kind(f, "MobileBert", embedding_size=24, intra_bottleneck_size=16),
        "expected a head that is one product with the vocabulary",
    ),
    ("other words", other_words, "they differ in vocabulary"),
    ("broken tokenizer", lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ("few rows", lambda f: no_tokenizer(f, len(WORDS)), f"embeddings of at least {len(WORDS) + 5}"),
    ("padding", lambda f: other_kind(f, "Roberta"), "expected pad_token_id 0"),
    ("adapter", lambda f: (f / "adapter_config.json").touch(), "adapter_config.json"),
]


@pytest.mark.parametrize(
    ("damage", "expected"), [row[1:] for row in UNFIT], ids=[row[0] for row in UNFIT]
)
def test_unfit_student_is_refused(
    damage: Callable[[Path], Any], expected: str, student: Path, base: Path, refuse: Refuse
) -> None:
    damage(student)
    message = refuse(*changed(base, {"student.model": str(student)}))
    assert message.startswith("student.model: ")
    assert str(student) in message
    assert expected in message


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_quantised_student_is_refused(init: str, student: Path, base: Path, refuse: Refuse) -> None:
    """Also where its files give the shape alone: what is trained would be saved as quantised."""
    with_config(student, quantization_config={"quant_method": "gptq"})
    message = refuse(*changed(base, {"student.model": str(student), "student.init": init}))
    assert message.endswith("expected weights that are not quantised, got others")


@pytest.mark.parametrize(
    ("kind", "positions", "most"), [("Bert", 20, 20), ("Roberta", 24, 23)], ids=["bert", "roberta"]
)
def test_student_with_too_few_positions_is_refused(
    kind: str, positions: int, most: int, student: Path, base: Path, refuse: Refuse
) -> None:
    other_kind(student, kind, max_position_embeddings=positions, pad_token_id=0)
    message = refuse(*changed(base, {"student.model": str(student)}))
    wanted = f"data.max_length: expected at most {most}, the positions of {str(student)!r}, got 24"
    assert message == wanted


def test_student_of_another_width_is_refused_for_the_hidden_loss(
    teacher: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    narrow = make_masked_lm(tmp_path / "narrow", "DistilBert", teacher, **NARROW)
    message = refuse(*changed(base, {"student.model": str(narrow)}))
    assert message == (
        f"loss.hidden_cos_weight: expected 0 with a student of width 16 ({str(narrow)!r}) and a "
        f"teacher of width 32 ({str(teacher)!r}), got 1.0"
    )


CUTS = {
    "layers": [0, 1],
    "architecture": "same",
    "fold_token_type": False,
    "copy_mlm_transform": False,
}


@pytest.mark.parametrize("key", CUTS)
def test_cut_of_a_student_that_exists_is_refused(
    key: str, student: Path, base: Path, refuse: Refuse
) -> None:
    changes = {"student.model": str(student), f"student.{key}": CUTS[key]}
    message = refuse(*changed(base, changes))
    assert message.startswith(f"student.{key}: expected ")
    assert "with student.model, which is not made of the teacher's layers, got" in message


def test_revision_without_a_model_is_refused(base: Path, refuse: Refuse) -> None:
    message = refuse(*changed(base, {"student.revision": "main"}))
    assert message == "student.revision: expected null without student.model, got 'main'"


def test_run_in_place_of_its_model_is_refused_for_a_student(
    base: Path, refuse: Refuse, tmp_path: Path, teacher: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "old" / "model")
    message = refuse(*changed(base, {"student.model": str(tmp_path / "old")}))
    assert message.startswith("student.model: expected a folder with config.json")
    assert message.endswith(f"did you mean '{tmp_path}/old/model'?")


def test_output_is_apart_from_the_student(
    student: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    """A run's model/ would replace it."""
    (tmp_path / "run" / "model").parent.mkdir()
    model = student.rename(tmp_path / "run" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for output in (model, model.parent, tmp_path / "link"):
        changes = {"student.model": str(model), "output": str(output)}
        message = refuse(*changed(base, changes))
        assert message == (
            f"output: expected a folder apart from the student's, got {str(output)!r} with "
            f"student.model {str(model)!r}"
        )


# --- Folders that a run writes to -----------------------------------------------------------------


def test_output_of_another_run_is_refused_with_the_differing_keys(
    base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    before = config.parse(["--config", str(base)])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(before), encoding="utf-8")
    changes = {"seed": 1, "optimizer.learning_rate": 0.5, "student.layers": [0, 1]}
    message = refuse(*changed(base, changes), "--tensorboard=true", "--evaluate.every=1")
    named, _, differing = message.partition("differs in ")
    assert named.startswith("output: expected")
    assert str(tmp_path / "run") in named
    assert differing == (
        "student.layers ('alternate', now [0, 1]), optimizer.learning_rate (0.001, now 0.5), "
        "seed (56, now 1)"
    )
    message = refuse(*changed(base, {"data.source": None, "seed": 1}))
    assert message.endswith("differs in seed (56, now 1)")  # tokens need no source
    message = refuse(*arguments(base, steps=20))
    assert "differs in steps (10, now 20); the learning rate follows from the number" in message


def test_folder_that_is_no_run_is_refused(base: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("dear to someone", encoding="utf-8")
    message = refuse("--config", str(base))
    assert message.startswith("output: expected an empty folder")
    assert str(tmp_path / "run") in message


def test_damaged_config_of_a_run_is_named(base: Path, refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    for text in ("a: [", "", "losss: 5\n"):
        path.write_text(text, encoding="utf-8")
        assert str(path) in refuse("--config", str(base))


def test_run_is_refused_with_resume_never(base: Path, refuse: Refuse, tmp_path: Path) -> None:
    before = config.parse(["--config", str(base)])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(before), encoding="utf-8")
    message = refuse(*arguments(base, resume="never"))
    assert message.startswith("output: expected an empty folder with resume never")


@pytest.mark.parametrize("key", ["output", "data.prepared"])
def test_tilde_is_the_home_folder(
    key: str, base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    read = config.parse(changed(base, {key: "~/runs/x"}))
    assert (read.output if key == "output" else read.data.prepared) == f"{tmp_path}/runs/x"
    message = refuse(*changed(base, {key: "~nobody-here/x"}))
    assert message == f"{key}: expected the home folder of a known user, got '~nobody-here/x'"


@pytest.mark.parametrize("key", ["output", "data.prepared"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_file_in_place_of_a_folder_is_refused(
    key: str, below: str, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    message = refuse(*changed(base, {key: f"{tmp_path}/file{below}"}))
    assert message.startswith(f"{key}: expected")
    assert f"{tmp_path}/file" in message


def test_prepared_folder_that_holds_something_else_is_refused(
    base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.txt").write_text("dear to someone", encoding="utf-8")
    message = refuse(*changed(base, {"data.prepared": str(tmp_path / "tokens")}))
    assert message.startswith("data.prepared: expected an empty folder")
    assert str(tmp_path / "tokens") in message


@pytest.fixture(scope="module")
def store(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of the recipe's corpus, made once."""
    folder = tmp_path_factory.mktemp("store") / "tokens"
    given = [f"--teacher={teacher}", f"--data.source={corpus}", f"--data.prepared={folder}"]
    settings = ["--data.max_length=24", "--data.heldout=0.1", "--steps=1"]
    assert cli.main(["prepare", *given, *settings]) == 0
    return folder


def test_tokens_of_another_tokenizer_are_refused(
    store: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    stranger = make_teacher(tmp_path / "stranger", words=WORDS[::-1])
    mine = contents(store)
    for source in ({}, {"data.source": None}):
        changes = {"teacher": str(stranger), "data.prepared": str(store), **source}
        message = refuse(*changed(base, changes))
        assert message.startswith("data.prepared: expected")
        assert str(store) in message
        assert "tokenizer" in message
    assert contents(store) == mine


def test_tokens_made_with_other_settings_are_refused_with_the_keys(
    store: Path, base: Path, refuse: Refuse
) -> None:
    changes = {"data.prepared": str(store), "data.max_length": 32, "data.min_length": 5}
    message = refuse(*changed(base, changes))
    assert message.startswith("data.prepared: expected")
    assert "max_length, min_length" in message
    assert "heldout" not in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("store.json", b"{"),
        ("store.json", b"[]"),
        ("store.json", b"{}"),
        ("counts.npy", None),
        ("counts.npy", b"garbage"),
        ("train/state.json", None),
        ("heldout/state.json", b"{"),
        ("train/data-00000-of-00001.arrow", None),
        ("train/data-00000-of-00001.arrow", b"garbage"),
    ],
)
def test_damaged_tokens_are_refused(
    name: str, text: bytes | None, store: Path, base: Path, refuse: Refuse, tmp_path: Path
) -> None:
    tokens = Path(shutil.copytree(store, tmp_path / "tokens"))
    (tokens / name).unlink()
    if text is not None:
        (tokens / name).write_bytes(text)
    message = refuse(*changed(base, {"data.prepared": str(tokens)}))
    assert message.startswith("data.prepared: expected a folder made by `distilfast prepare`")
    assert str(tokens) in message


# --- Who says it, and from where ------------------------------------------------------------------


def test_first_rank_alone_says_it(base: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert train.main(arguments(base, loss__temperature=0)) == 2
    assert capfd.readouterr() == ("", "")


def test_relative_paths_start_at_the_working_directory(
    base: Path, corpus: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed(base, {"data.source": "nothing.txt", "output": "run"})
    for folder in (tmp_path, ROOT):
        monkeypatch.chdir(folder)
        name = os.path.relpath(tmp_path / "changed.yaml", folder)
        assert "'nothing.txt'" in refuse("--config", name)
        assert not (folder / "run").exists()


# `distilfast check` is to find whatever `train` finds before its first step.
FOUND_BY_CHECK = [
    {"loss.temprature": 3},
    {"student.layers": [0, 9]},
    {"batch.sequences": None, "batch.tokens": 23},
    {"data.max_length": 65},
    {"teacher": "runs/nothing.d"},
    {"teacher": "no-such-user/no-such-model"},
    {"student.model": "runs/nothing.d"},
    {"student.model": "no-such-user/no-such-model"},
    {"data.source": None},
    {"data.source": "nothing.txt"},
    {"data.source": "~nobody/nothing"},
    {"data.source": "x" * 300},
    {"data.source": "asset:nothing"},
    {"data.source": "no-such-user/no-such-data"},
    {"data.source": "recipe.yaml"},
    {"data.prepared": "folder"},
    {"data.prepared": "a::b"},
    {"output": "folder"},
    # Not even root can make anything here.
    {"data.prepared": "/proc/nothing/tokens"},
    {"output": "/proc/nothing/run"},
    {"output": "x" * 300},
]


@pytest.mark.parametrize("changes", FOUND_BY_CHECK, ids=str)
def test_check_says_what_train_says(
    changes: dict[str, Any], base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    Path("folder").mkdir()
    Path("folder", "thesis.txt").write_text("dear to someone", encoding="utf-8")
    given = changed(base, changes)
    assert refuse("check", *given, program=quiet_check) == refuse(*given)


@pytest.mark.parametrize("name", ["triton", "cpp"])
def test_backend_that_cannot_be_used_is_refused(
    name: str, base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilfast_kernels, "unavailable", lambda _: "it is not there")
    given = arguments(base, loss__backend=name)
    expected = f"loss.backend: expected one that works here, got {name!r}: "
    assert refuse(*given).startswith(expected)
    assert refuse(*given).endswith("it is not there")
    assert refuse("check", *given, program=quiet_check) == refuse(*given)


def test_backend_that_fails_at_its_first_call_is_refused(
    base: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the cache for compiled kernels cannot be written to."""

    def launch(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/cache")

    broken = replace(backends.BACKENDS["torch"], distillation=launch)
    monkeypatch.setitem(backends.BACKENDS, "torch", broken)
    assert refuse(*arguments(base, loss__backend="torch")) == (
        "loss.backend: expected one that works here, got 'torch': "
        "[Errno 13] Permission denied: '/cache'"
    )


def test_epochs_smaller_than_a_batch_are_refused(store: Path, base: Path, refuse: Refuse) -> None:
    """With the largest batch that fits."""
    changes = {"data.prepared": str(store), "steps": None, "epochs": 2, "batch.sequences": 300}
    message = refuse(*changed(base, changes))
    n = len(data.Store.open(store).train)
    expected = f"at most {2 * n} (epochs 2 of {n} sequences), got 300"
    assert message == f"batch.sequences: expected {expected}"
    assert refuse("check", *changed(base, changes), program=quiet_check) == message
    changes |= {"batch.sequences": None, "batch.tokens": 10**6}
    assert refuse(*changed(base, changes)).startswith("batch.tokens: expected at most ")


def quiet_check(arguments: list[str]) -> int:
    """`distilfast check` without the plan that it prints up to where it stops."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return cli.main(arguments)
