"""What the tests share: the backends that can run here, a tiny teacher, a small corpus."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The tests never ask a hub for anything, nor leave anything in a cache of the user's.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="distilfast-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from distilfast.losses import backends


def interpret_triton() -> None:
    """Without a GPU the kernels run in triton's interpreter, mended in two places: it patches
    its language anew in every helper that a kernel calls, which takes more than half of its time,
    and it truncates to bf16 where a GPU rounds."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_lang, patched, scopes = interpreter._patch_lang, set(), []

    def restore_all() -> None:
        while scopes:
            scopes.pop()()
        patched.clear()

    def patch_once(function: Any) -> Any:
        language = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
        if language <= patched:
            return None
        scope = patch_lang(function)
        patched.update(language)
        scopes.append(scope.restore)
        scope.restore = restore_all  # the kernel's; those of its helpers are never called
        return scope

    interpreter._patch_lang = patch_once
    convert = interpreter._convert_float

    def convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(data.astype("float32")).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, mode)

    interpreter._convert_float = convert_rounding


if not torch.cuda.is_available():
    interpret_triton()

ROOT = Path(__file__).parent.parent
WORDS = (
    "the a of to in and is was for on as by with at from that it he she they river city king "
    "queen war water house book year time day man woman child school state world north south "
    "east west old new first last great small long short high low red green blue white black "
    "land sea mountain road town church music language history science art law people country"
).split()


def pytest_report_header() -> str:
    """Says what the parity suite can tell on this machine."""
    how = "compiled" if torch.cuda.is_available() else "interpreted, on small shapes"
    names = [f"{name} ({how})" if name == "triton" else name for name in backends_and_levels()]
    return f"distilfast backends: {', '.join(names)}"


# Without --all: so many cases of a test, from first to last; of one over backends another case of
# each; and no test that is marked thorough.
CASES = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every case of every test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for = any("::" in argument for argument in config.args) or config.option.keyword
    if not config.getoption("--all") and not asked_for:
        leave_out(config, items)
    for marker in ("slow", "network"):
        variable = f"DISTILFAST_{marker.upper()}_TESTS"
        if os.environ.get(variable) != "1":
            skip = pytest.mark.skip(reason=f"set {variable}=1 to run it")
            for item in items:
                if marker in item.keywords:
                    item.add_marker(skip)


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is left is the quick selection."""
    tests: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if "thorough" not in item.keywords:
            name = getattr(item, "originalname", None) or item.name
            tests.setdefault((str(item.path), name), []).append(item)
    kept = {case for cases in tests.values() for case in some_of(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def some_of(cases: list[pytest.Item]) -> list[pytest.Item]:
    """A few cases of a test."""
    by_backend: dict[str, list[pytest.Item]] = {}
    for case in cases:
        parameters = getattr(getattr(case, "callspec", None), "params", {})
        by_backend.setdefault(str(parameters.get("backend")), []).append(case)
    if len(by_backend) > 1:
        groups = list(by_backend.values())
        return [group[i * len(group) // len(groups)] for i, group in enumerate(groups)]
    most = min(CASES, len(cases))
    return [cases[round(i * (len(cases) - 1) / max(1, most - 1))] for i in range(most)]


def cpu_levels() -> list[str]:
    """The instruction sets that the C++ kernels can be run with here, the best one first."""
    if "cpp" not in backends.usable():
        return []
    from distilfast_kernels import cpp

    return list(reversed(cpp.LEVELS[: cpp.LEVELS.index(cpp.best_level()) + 1]))


def backends_and_levels() -> list[str]:
    """Backends by name, the C++ kernels once for each of their instruction sets: cpp-avx2."""
    names = [name for name in backends.usable() if name != "cpp"]
    return [*(f"cpp-{level}" for level in cpu_levels()), *names]


@pytest.fixture(params=backends_and_levels())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend that can be used on this machine, by name, with each of its instruction sets."""
    name, _, level = str(request.param).partition("-")
    if level:
        monkeypatch.setenv("DISTILFAST_CPU_LEVEL", level)
    return name


@pytest.fixture(params=cpu_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, by the variable that asks for it."""
    monkeypatch.setenv("DISTILFAST_CPU_LEVEL", request.param)
    return str(request.param)


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend's tensors live."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def no_wait_for_the_gpu() -> Iterator[None]:
    """What would wait for the device is an error inside. The mode is the process's: however a test
    ends, the next one begins without it."""
    try:
        with warnings.catch_warnings():
            # torch's own remark that the mode does not find every wait
            warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A program sets its log up as it likes; the next test starts from nothing."""
    yield
    logging.getLogger("distilfast").handlers.clear()
    logging.getLogger("distilfast.sources.assets").setLevel(logging.NOTSET)


def make_corpus(path: Path) -> Path:
    """A text file of 120 lines with a grammar of sorts: there is something to learn."""
    rng = random.Random(0)
    lines = []
    for _ in range(120):
        start = rng.randrange(len(WORDS))
        step = rng.choice((1, 2, 3))
        length = rng.randrange(12, 40)
        lines.append(" ".join(WORDS[(start + i * step) % len(WORDS)] for i in range(length)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "text.txt")


def make_teacher(folder: Path, n_layers: int = 4, seed: int = 0, words: list[str] = WORDS) -> Path:
    """A BERT of some thousand parameters with a tokenizer, saved as transformers saves one."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)})
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "bert")


def make_masked_lm(
    folder: Path, kind: str, tokenizer: Path | None, seed: int = 1, **settings: Any
) -> Path:
    """A masked LM of any family, saved with the tokenizer in another folder, or with none.

    Args:
        kind: as in the name of transformers' configuration: DistilBert.
        settings: the configuration's; the vocabulary is `make_teacher`'s if they do not say.
    """
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": len(WORDS) + 5, "initializer_range": 0.2} | settings
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():  # a fresh model has all its biases at 0, where a mistake hides
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*.json") if tokenizer else ():
        shutil.copy(file, folder)
    return folder


# A DistilBERT of half the width of `make_teacher`'s BERT, and of half its layers.
NARROW = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64}


def make_task(folder: Path, n_train: int = 48, n_dev: int = 24) -> Path:
    """A task of one's own that can be learned: is a sentence of the first words or of the last?"""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", n_train), ("dev", n_dev)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            half = WORDS[: len(WORDS) // 2] if i % 2 else WORDS[len(WORDS) // 2 :]
            lines.append(f"{' '.join(rng.choices(half, k=rng.randrange(3, 12)))}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Jobs on a single core: threads that wait for each other cost more than tiny models do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(teacher: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that takes seconds: 10 steps of 16 sequences, exact (fp32, no dropout)."""
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"""\
teacher: {teacher}
student: {{dropout: 0}}
data: {{source: {corpus}, prepared: {tmp_path / "tokens"}, max_length: 24, heldout: 0.1}}
masking: {{probability: 0.3}}
optimizer: {{learning_rate: 1.0e-3}}
batch: {{sequences: 16, micro_sequences: 4}}
steps: 10
evaluate: {{every: 5}}
precision: fp32
tensorboard: false
output: {tmp_path / "run"}
""",
        encoding="utf-8",
    )
    return ["--config", str(config)]
