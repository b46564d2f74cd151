"""The schema of a run: its defaults, its two sources (a file and the command line), and its way
through YAML and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distilfast import config, machine, train
from distilfast.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    MaskingConfig,
    OptimizerConfig,
    SourceSpec,
    StudentConfig,
    TeacherSpec,
    ZeroConfig,
    parse,
    to_yaml,
)
from distilfast.driver import checks, choices
from distilfast.driver.processes import World

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

# What the documentation promises to whoever leaves a key out.
DEFAULTS = """\
teacher: bert-base-uncased
student: {layers: alternate, init: teacher, architecture: auto, dropout: null}
data: {source: null, prepared: null, max_length: 512, heldout: 0.01}
masking: {probability: 0.15, mask: 0.8, random: 0.1, keep: 0.1, smoothing: 0.7}
loss: {temperature: 2.0, kd_weight: 5.0, ce_weight: 2.0, hidden_cos_weight: 1.0,
       logit_cos_weight: 0.0, mse_weight: 0.0, kd_rows: all, backend: auto}
optimizer: {name: adamw, learning_rate: 5.0e-4, weight_decay: 0.0, betas: [0.9, 0.98],
            epsilon: 1.0e-6, warmup_ratio: 0.05, max_grad_norm: 5.0}
batch: {sequences: 4096, micro_sequences: 32}
evaluate: {every: 500}
zero: {stage: 1, offload: none, shard_teacher: false}
precision: auto
seed: 56
checkpoint: {every: 1000, keep: 3}
resume: auto
"""


def keys() -> list[str]:
    """All keys, from the schema."""
    found = []
    for top in dataclasses.fields(Config):
        section = top.default_factory
        if dataclasses.is_dataclass(section):
            found += [f"{top.name}.{f.name}" for f in dataclasses.fields(section)]
        else:
            found.append(top.name)
    return found


def read(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return parse(["--config", str(path), *overrides])


# --- The schema -----------------------------------------------------------------------------------


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    plain = yaml.safe_load(to_yaml(read(tmp_path, "steps: 1")))
    for key, value in yaml.safe_load(DEFAULTS).items():
        if isinstance(value, dict):
            assert {name: plain[key][name] for name in value} == value
        else:
            assert plain[key] == value


def test_documented_example_is_read(tmp_path: Path) -> None:
    made = read(tmp_path, DEFAULTS + "steps: 100000\noutput: runs/name\n")
    assert made == Config(steps=100000, output="runs/name")


@pytest.mark.parametrize(
    "made",
    [
        *(TeacherSpec("a"), SourceSpec("a"), StudentConfig(), DataConfig(), MaskingConfig()),
        *(LossConfig(), OptimizerConfig(), BatchConfig(), EvaluateConfig(), ZeroConfig()),
        *(CheckpointConfig(), Config(steps=1)),
    ],
    ids=lambda made: type(made).__name__,
)
def test_config_is_frozen(made: Any) -> None:
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


def test_config_checks_itself_without_a_parser() -> None:
    for wrong in (
        lambda: LossConfig(temperature=0),
        lambda: LossConfig(kd_weight=float("nan")),
        lambda: Config(),
        lambda: Config(steps=1, epochs=1),
        lambda: Config(steps=1, seed=-1),
        lambda: Config(steps=1, precision="bf16", zero=ZeroConfig(stage=0)),
        lambda: StudentConfig(model=""),
        lambda: StudentConfig(revision="main"),
        lambda: StudentConfig(model="a", layers="all"),
        lambda: BatchConfig(sequences=17, tokens=4096),
        lambda: BatchConfig(warmup_from=4097, warmup_steps=1),
        lambda: BatchConfig(sequences=17).check(18, 512),
    ):
        with pytest.raises(ConfigError, match=r"expected .*, got "):
            wrong()


def test_batch_is_of_4096_sequences_unless_something_else_is_said(tmp_path: Path) -> None:
    assert BatchConfig() == BatchConfig(sequences=4096)
    assert read(tmp_path, "steps: 1\nbatch: {micro_sequences: 32}").batch == BatchConfig()
    tokens = BatchConfig(tokens=5000)
    assert tokens.sequences is None
    assert read(tmp_path, "steps: 1\nbatch: {tokens: 5000}").batch == tokens
    assert read(tmp_path, "steps: 1", "--batch.tokens=5000").batch == tokens
    over = "--batch.tokens=5000", "--batch.sequences=null"
    assert read(tmp_path, "steps: 1\nbatch: {sequences: 8}", *over).batch == tokens


WARMUPS = st.integers(1, 10**6).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(1, size), st.integers(1, 200))
)


@given(WARMUPS, st.booleans())
def test_size_of_a_step_rises_on_a_line(warmup: tuple[int, int, int], of_tokens: bool) -> None:
    size, first, steps = warmup
    name = "tokens" if of_tokens else "sequences"
    made = BatchConfig(**{name: size}, warmup_from=first, warmup_steps=steps)
    assert made.before(0) == 0
    sizes = [made.before(step + 1) - made.before(step) for step in range(steps + 3)]
    assert sizes[0] == first
    assert sizes[steps:] == [size] * 3
    for step, found in enumerate(sizes[:steps]):
        assert first <= found <= size
        assert abs(found - (first + (size - first) * step / steps)) <= 1


@given(WARMUPS, st.floats(0.1, 5), st.integers(1, 10**5))
def test_epochs_are_whole_steps_of_whatever_size(
    warmup: tuple[int, int, int], epochs: float, epoch_size: int
) -> None:
    size, first, steps = warmup
    batch = BatchConfig(size, warmup_from=first, warmup_steps=steps)
    config, most = Config(epochs=epochs, batch=batch), int(epochs * epoch_size)
    if most < batch.before(1):
        key = "warmup_from" if steps else "sequences"
        with pytest.raises(ConfigError, match=rf"^batch\.{key}: expected at most {most} \("):
            checks.count_steps(config, epoch_size)
        return
    found = checks.count_steps(config, epoch_size)
    assert batch.before(found) <= most < batch.before(found + 1)


def test_teachers_and_sources_become_lists(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        "steps: 1\nteacher: [a, {name: b, weight: 3, revision: main}]\n"
        "data: {source: [c, {name: d, config: en, column: body}], column: words}\n",
    )
    assert made.teachers == [TeacherSpec("a"), TeacherSpec("b", 3.0, "main")]
    assert made.sources == [
        SourceSpec("c", column="words"),
        SourceSpec("d", config="en", column="body"),
    ]
    single = read(tmp_path, "steps: 1\nteacher: a\ndata: {source: c}\n")
    assert single.teachers == [TeacherSpec("a")]
    assert single.sources == [SourceSpec("c")]
    assert read(tmp_path, "steps: 1").sources == []


@pytest.mark.parametrize("revision", ["4e20de362430", "1e5f", "5.e3a"])
def test_commit_that_begins_like_a_number_is_text(tmp_path: Path, revision: str) -> None:
    made = read(tmp_path, f"steps: 1\nteacher: [{{name: a, revision: {revision}}}]\n")
    assert made.teachers == [TeacherSpec("a", revision=revision)]
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(made), encoding="utf-8")
    assert parse(["--config", str(written)]) == made


def test_student_that_exists_needs_its_name_alone(tmp_path: Path) -> None:
    made = read(tmp_path, "steps: 1\nstudent: {model: a}\n").student
    assert made == StudentConfig(model="a")
    assert made.origin == "from a"
    assert StudentConfig(model="a", revision="b").origin == "from a (b)"
    assert StudentConfig(model="a", init="random").origin == "drawn, in the shape of a"
    assert StudentConfig().origin is None


# --- Through YAML and back ------------------------------------------------------------------------

# Names of files and of repositories, commits among them: 1e3 is a number to some readers of YAML.
NAMES = st.from_regex(
    r"[a-z0-9./_é][a-z0-9./_ é日'-]{0,9}[a-z0-9]", fullmatch=True
) | st.from_regex(r"[0-9]{1,3}e[0-9]{1,2}", fullmatch=True)
POSITIVE = st.floats(1e-300, 1e300)
CONFIGS = st.builds(
    Config,
    teacher=NAMES
    | st.lists(
        NAMES | st.builds(TeacherSpec, NAMES, POSITIVE, st.none() | NAMES), min_size=1, max_size=3
    ),
    student=st.builds(
        StudentConfig,
        layers=st.sampled_from(["alternate", "all"])
        | st.sets(st.integers(0, 99), min_size=1).map(sorted),
        dropout=st.none() | st.floats(0, 1, exclude_max=True),
        fold_token_type=st.booleans(),
    )
    | st.builds(
        StudentConfig, NAMES, st.none() | NAMES, init=st.sampled_from(["teacher", "random"])
    ),
    data=st.builds(
        DataConfig,
        source=st.none() | NAMES | st.lists(st.builds(SourceSpec, NAMES, NAMES, NAMES, NAMES)),
        prepared=st.none() | NAMES,
        column=NAMES,
    ),
    batch=st.builds(BatchConfig, sequences=st.none() | st.integers(1))
    | st.builds(
        BatchConfig, tokens=st.integers(99), warmup_from=st.just(9), warmup_steps=st.just(5)
    ),
    loss=st.builds(
        LossConfig, temperature=POSITIVE, kd_weight=POSITIVE, kd_rows=st.sampled_from(["all"])
    ),
    optimizer=st.builds(
        OptimizerConfig,
        learning_rate=POSITIVE,
        betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    ),
    steps=st.integers(1, 2**62),
    seed=st.integers(0, 2**64 - 1),
    output=NAMES,
)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(made=Config(epochs=0.5))
@example(made=Config(steps=1, output="5"))
@example(made=Config(steps=1, output="yes"))
@example(made=Config(steps=1, teacher=[TeacherSpec("a", revision="7e57")]))  # no number in YAML 1.1
@given(made=CONFIGS)
def test_yaml_is_read_back_to_an_equal_config(made: Config, tmp_path: Path) -> None:
    assert read(tmp_path, to_yaml(made)) == made


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_parses_and_comes_back(path: Path, tmp_path: Path) -> None:
    made = parse(["--config", str(path)])
    assert read(tmp_path, to_yaml(made)) == made


def test_recipe_is_found_by_its_name() -> None:
    assert parse(["--config=demo"]) == parse([f"--config={config.RECIPES}/demo.yaml"])


@pytest.mark.parametrize("change", ["\n", "\r\n", "\ufeff"], ids=["unix", "windows", "bom"])
def test_file_may_come_from_any_system(change: str, tmp_path: Path) -> None:
    text = "steps: 5\nloss: {temperature: 3}\n"
    text = f"{change}{text}" if change == "\ufeff" else text.replace("\n", change)
    (tmp_path / "r.yaml").write_bytes(text.encode())
    assert parse([f"--config={tmp_path}/r.yaml"]) == Config(steps=5, loss=LossConfig(temperature=3))


def test_recipes_have_outputs_of_their_own() -> None:
    outputs = [parse(["--config", str(path)]).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "5E-4"])
def test_exponent_is_a_number_with_or_without_a_point(text: str, tmp_path: Path) -> None:
    """YAML 1.1 takes 5e-4 for a word."""
    made = read(tmp_path, f"steps: 1\noptimizer: {{learning_rate: {text}}}\n")
    assert made.optimizer.learning_rate == 0.0005
    made = read(tmp_path, "steps: 1\n", f"--optimizer.learning_rate={text}")
    assert made.optimizer.learning_rate == 0.0005


# --- The command line -----------------------------------------------------------------------------


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    text = "steps: 5\nseed: 1\nloss: {temperature: 3, kd_weight: 4}\n"
    made = read(tmp_path, text, "--loss.temperature", "1.5", "--steps=7")
    assert made.loss == LossConfig(temperature=1.5, kd_weight=4)
    assert (made.steps, made.seed) == (7, 1)


def test_command_line_wins_wherever_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 5\n", encoding="utf-8")
    assert parse(["--steps", "7", "--config", str(path)]).steps == 7


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("--student.layers=[0, 2]", "student.layers", [0, 2]),
        ("--student.layers=all", "student.layers", "all"),
        ("--student.dropout=null", "student.dropout", None),
        ("--optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("--teacher=[a, b]", "teacher", ["a", "b"]),
        ('--teacher=[{"name": "a", "weight": 2}]', "teacher", [TeacherSpec("a", 2.0)]),
        ("--data.source=[a.txt, b.txt]", "data.source", ["a.txt", "b.txt"]),
        ("--data.source=null", "data.source", None),
        ("--tensorboard=false", "tensorboard", False),
        ("--seed=18446744073709551615", "seed", 2**64 - 1),
    ],
)
def test_override_is_read_like_the_file(
    override: str, key: str, value: Any, tmp_path: Path
) -> None:
    made: Any = read(tmp_path, "steps: 1\nstudent: {dropout: 0.5}\ndata: {source: x}\n", override)
    for name in key.split("."):
        made = getattr(made, name)
    assert made == value


def test_launcher_may_name_the_rank(tmp_path: Path) -> None:
    """`deepspeed` puts --local_rank before everything else."""
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 5\n", encoding="utf-8")
    assert parse(["--local_rank=3", "--config", str(path)]) == Config(steps=5)


def test_environment_sets_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "DISTILFAST_SEED", "DISTILFAST_TRAIN_SEED", "TEACHER"):
        monkeypatch.setenv(name, "3")
    assert read(tmp_path, "steps: 5\n") == Config(steps=5)


def exit_status(arguments: list[str]) -> int:
    """Of the driver, whether it returns or leaves on its own."""
    try:
        return train.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_print_config_shows_the_result(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    given = [*recipe, "--loss.temperature=3", "--print_config"]
    assert exit_status(given) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert read(tmp_path, out) == parse([*recipe, "--loss.temperature=3"])


def test_flags_without_a_recipe_change_the_schemas_defaults(capsys: Any) -> None:
    """Not the demo's, which a bare command runs."""
    assert exit_status(["--local_rank=0", "--steps=5", "--teacher=a", "--print_config"]) == 0
    assert capsys.readouterr().out == to_yaml(Config(teacher="a", steps=5))


def test_print_config_checks_the_values(recipe: list[str], capsys: Any) -> None:
    """What it prints is a configuration that can be run."""
    assert exit_status([*recipe, "--print_config", "--loss.temperature=0"]) == 2
    assert "loss.temperature: expected a number > 0" in capsys.readouterr().err


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for key in keys():
        assert f"--{key} " in out
    assert str(config.RECIPES) in " ".join(out.split())


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The docstrings are the documentation."""
    exit_status(["--help"])
    options = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    silent = []
    for key in keys():
        said = re.search(rf"--{re.escape(key)} \S+(?: --\S+ \S+)? (.*?)\(type: ", options)
        if not said or not said[1]:
            silent.append(key)
    assert silent == []


# --- precision: auto ------------------------------------------------------------------------------


def config_of(output: Path, *arguments: str) -> config.Config:
    return config.parse(["--steps=1", f"--output={output}", *arguments])


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_what_the_cpu_multiplies_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, expected: str
) -> None:
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: fast)
    cpu = torch.device("cpu")
    assert choices.chosen_precision(config_of(tmp_path / "run"), cpu) == expected
    for asked in ("bf16", "fp32"):
        given = config_of(tmp_path / "run", f"--precision={asked}")
        assert choices.chosen_precision(given, cpu) == asked


def test_a_resumed_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: False)
    written, cpu = config_of(tmp_path, "--precision=bf16"), torch.device("cpu")
    (tmp_path / "config.yaml").write_text(config.to_yaml(written), encoding="utf-8")
    assert choices.chosen_precision(config_of(tmp_path), cpu) == "bf16"
    assert choices.chosen_precision(config_of(tmp_path, "--resume=never"), cpu) == "fp32"
    # a file that somebody has edited decides nothing
    (tmp_path / "config.yaml").write_text(config.to_yaml(config_of(tmp_path)), encoding="utf-8")
    assert choices.chosen_precision(config_of(tmp_path), cpu) == "fp32"
    (tmp_path / "config.yaml").write_text("steps: none", encoding="utf-8")
    assert choices.chosen_precision(config_of(tmp_path), cpu) == "fp32"


def test_settled_configuration_is_what_the_run_is_written_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(choices, "multiplies_bf16", lambda: False)
    world = World(0, 1, torch.device("cpu"))
    settled = choices.settled(config_of(tmp_path / "run"), world)
    assert settled.precision == "fp32"
    assert not caplog.records
    choices.settled(config_of(tmp_path / "run", "--precision=bf16"), world)
    assert "no instructions" in caplog.text
