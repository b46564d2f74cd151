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

from distilfast.cli import COMMANDS

LIBRARY = ROOT / "distilfast"
KERNELS = ROOT / "kernels" / "distilfast_kernels"

# What is below what: a wing, or a file beside the wings, may import these and nothing else of ours.
# Whatever is not written here imports nothing of ours.
GROUND = {"_version", "atomic", "errors", "loss_parts", "machine", "progress"}
MAY_IMPORT = {
    "machine": {"_version"},
    "losses": {"machine"},
    "config": {"errors", "loss_parts"},
    "sources": {"errors"},
    "report": {"atomic", "errors", "loss_parts"},
    "models": {"config", "errors", "sources"},
    "data": {"atomic", "config", "errors", "models", "sources"},
    "driver": {*GROUND, "config", "data", "losses", "models", "report"},
    "tasks": {"errors", "losses", "machine", "models", "sources"},
    "studies": {
        *GROUND,
        *("config", "data", "driver", "losses", "models", "report", "sources", "tasks"),
    },
    # What is launched. Nobody imports it, but for the demo, which is what `train` does without
    # arguments, and the command, which is what `python -m distilfast` does.
    "demo": {*GROUND, "config", "driver", "models", "report"},
    "train": {*GROUND, "config", "demo", "driver"},
    "cli": GROUND,
    "__main__": {"cli"},
    "__init__": {"_version", "losses"},
}
THIRD_PARTY = {
    "deepspeed": {"driver"},
    "transformers": {"data", "demo", "driver", "models", "sources", "studies", "tasks"},
    "datasets": {"data", "studies", "tasks"},
    "sklearn": {"tasks"},
    "scipy": {"studies", "tasks"},
    "distilfast_kernels": {"losses"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "triton": set(),
}
# So much a folder, and a file, may hold before it is two.
MOST_MODULES, MOST_LINES = 16, 500


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
    return sorted(LIBRARY.rglob("*.py"))


def wing(path: Path) -> str:
    """The folder of a module in the library; of one beside the wings its own name."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    """As one imports it: distilfast.losses.dense."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def own_imports(path: Path) -> set[str]:
    """The modules of the library that a file imports, by name."""
    known, found = {name(p) for p in modules()}, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distilfast":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else str(node.module))
    # `from distilfast import __version__`
    return {"distilfast._version" if x == "distilfast" else x for x in found}


@pytest.mark.parametrize("path", modules(), ids=name)
def test_wings_import_what_is_below_them(path: Path) -> None:
    wings = {module.split(".")[1] for module in own_imports(path)}
    assert wings - {wing(path)} <= MAY_IMPORT.get(wing(path), set())


def test_wings_are_no_circle() -> None:
    """And so deleting one leaves those below and beside it as they are."""
    above, done = dict(MAY_IMPORT), set(GROUND)
    while above:
        ready = {wing for wing, below in above.items() if below - GROUND <= done}
        assert ready, f"a circle among {sorted(above)}"
        done |= ready
        above = {wing: below for wing, below in above.items() if wing not in ready}


def test_files_are_no_circle() -> None:
    below = {name(path): own_imports(path) - {name(path)} for path in modules()}
    while below:
        ready = {module for module, imports in below.items() if not imports & set(below)}
        assert ready, f"a circle among {sorted(below)}"
        below = {module: imports for module, imports in below.items() if module not in ready}


def test_a_study_is_a_command_and_no_library() -> None:
    commands = {
        f"distilfast.studies.{x}" for x in ("glue", "finetune", "ablate", "compare", "pages")
    }
    assert commands <= {f"distilfast.{command.module}" for command in COMMANDS.values()}
    for path in modules():
        assert not own_imports(path) & commands, path


@pytest.mark.parametrize("path", modules(), ids=name)
def test_third_parties_are_imported_where_they_belong(path: Path) -> None:
    tops = {module.split(".")[0] for module in imported(path)}
    for package, allowed in THIRD_PARTY.items():
        assert package not in tops or wing(path) in allowed, f"{path} imports {package}"


def test_no_source_is_ignored_by_git() -> None:
    """`data/` in .gitignore would mean distilfast/data/, too."""
    listing = ["git", "ls-files", "--others", "--ignored", "--exclude-standard"]
    done = subprocess.run([*listing, "distilfast", "kernels"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("no checkout of git")
    names = done.stdout.decode().splitlines()
    assert not [name for name in names if name.endswith((".py", ".h", ".cpp", ".j2"))]


def test_no_folder_and_no_file_grows_too_large() -> None:
    for folder in {path.parent for path in modules()}:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= MOST_MODULES, folder
    for path in modules():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path


@pytest.mark.parametrize("path", modules(), ids=name)
def test_no_private_name_leaves_its_file(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distilfast."):
            private = [
                alias.name
                for alias in node.names
                if alias.name.startswith("_") and not alias.name.endswith("__")
            ]
            assert not private, f"{path} imports {private} of {node.module}"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops <= {*sys.stdlib_module_names, "torch", "triton", "distilfast_kernels", "__future__"}


def test_bench_and_tests_do_not_import_each_other() -> None:
    for folder, other in (("bench", "tests"), ("tests", "bench")):
        names = {p.stem for p in (ROOT / other).glob("*.py")} - {"conftest"}
        for path in (ROOT / folder).glob("*.py"):
            assert not imported(path) & (names | {other}), path


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.py")), ids=name)
def test_no_file_shadows_another_package(path: Path) -> None:
    """`deepspeed distilfast/train.py` puts the folder of train.py first on sys.path."""
    if path.stem == "__init__":
        return
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in packages_distributions()


def test_the_launched_file_takes_its_folder_off_the_path() -> None:
    """The wings would shadow packages by their names: config, data, tasks."""
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(LIBRARY)!r})\n"
        "sys.argv = ['train.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(LIBRARY / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end\n"
        f"assert {str(LIBRARY)!r} not in sys.path"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


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
