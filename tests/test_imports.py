"""Who may import whom, and names that must not shadow others: read from the syntax trees."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

LIBRARY = ROOT / "distilfast"
KERNELS = ROOT / "kernels" / "distilfast_kernels"

# Layers, lowest first: a module may import from its own layer's column and from those it names.
MAY_IMPORT = {
    "_version": set(),
    "config": set(),
    "reference": set(),
    "report": set(),
    "backends": {"reference"},
    "losses": {"backends", "reference"},
    "memory": set(),
    "products": {"backends"},
    "linear": {"backends", "losses", "reference", "memory", "products"},
    "assets": set(),
    "names": {"assets", "config"},
    "fp32_sums": set(),
    "masking": {"config"},
    "data": {"config", "masking", "names"},
    "models": {"config", "data", "names"},
    "checkpoint": {"config"},
    "optimizers": {"config"},
    "engine": {"backends", "checkpoint", "config", "optimizers"},
    "watch": set(),
    "step": {"config", "data", "linear", "losses", "models"},
    "evaluate": {"data", "engine", "models"},
    "records": {"report"},
    "export": {"_version", "config"},
    "options": {"config"},
    "paired": set(),
    "jobs": {"config", "records"},
    "squad": {"config"},
    "tasks": {"config", "names", "squad"},
    "finetuning": {"config", "losses", "models", "names", "tasks"},
}
APPLICATIONS = {
    *("train", "checks", "results", "replay", "demo", "cli"),
    *("glue", "finetune", "ablate", "reports", "compare", "sizes", "speed"),
}
THIRD_PARTY = {
    "deepspeed": {"engine", "train"},
    "transformers": {"data", "models", "finetuning", *APPLICATIONS},
    "datasets": {"data", "models", "tasks", *APPLICATIONS},
    "sklearn": {"tasks"},
    "scipy": {"tasks", "paired"},
    "distilfast_kernels": {"backends"},
    "triton": set(),
}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, and "distilfast.x" for the library's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}: relative imports break `deepspeed distilfast/train.py`"
            )
            if node.module == "distilfast":
                found |= {f"distilfast.{alias.name}" for alias in node.names}
            else:
                found.add(node.module or "")
    return found


def modules() -> list[Path]:
    return sorted(LIBRARY.glob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_library_imports_obey_the_layers(path: Path) -> None:
    if path.stem in APPLICATIONS or path.stem == "__init__":
        return
    assert path.stem in MAY_IMPORT, f"give {path.name} its place in MAY_IMPORT"
    own = {name.split(".")[1] for name in imported(path) if name.startswith("distilfast.")}
    known = {p.stem for p in modules()}
    public = {"__version__": "_version"}
    assert {public.get(n, n) for n in own} & (known | {"_version"}) <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_third_parties_are_imported_where_they_belong(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    for package, allowed in THIRD_PARTY.items():
        assert package not in tops or path.stem in allowed, f"{path.name} imports {package}"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops <= {*sys.stdlib_module_names, "torch", "triton", "distilfast_kernels", "__future__"}


def test_bench_and_tests_do_not_import_each_other() -> None:
    for folder, other in (("bench", "tests"), ("tests", "bench")):
        names = {p.stem for p in (ROOT / other).glob("*.py")} - {"conftest"}
        for path in (ROOT / folder).glob("*.py"):
            assert not imported(path) & (names | {other}), path


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_no_file_shadows_another_package(path: Path) -> None:
    """`deepspeed distilfast/train.py` puts the folder of train.py first on sys.path."""
    if path.stem == "__init__":
        return
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in packages_distributions()


def test_the_kernels_folder_does_not_shadow_the_hub_package() -> None:
    """transformers imports Hugging Face's `kernels` where it is installed; from the root of the
    repository a package of ours by that name would be found instead."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util, transformers;"
        "spec = importlib.util.find_spec('kernels');"
        "assert spec is None or spec.loader is None or 'site-packages' in str(spec.origin), spec;"
        "from transformers import BertConfig, BertForMaskedLM"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_losses_needs_torch_alone() -> None:
    """`import distilfast` works where triton, deepspeed and transformers are not installed."""
    code = (
        "import sys\n"
        "for name in ('triton', 'deepspeed', 'transformers', 'datasets', 'jsonargparse', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "import torch, distilfast\n"
        "out = distilfast.distillation_loss(torch.zeros(2, 3), torch.ones(2, 3))\n"
        "assert out.loss.item() == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_packages_are_installed_from_their_folders() -> None:
    for name, folder in (("distilfast", LIBRARY), ("distilfast_kernels", KERNELS)):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert Path(str(spec.origin)).parent.name == folder.name
