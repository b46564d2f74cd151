"""The fused head and its products broken on purpose, as tests/mutations/linear.py says."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_linear as tests
import test_near as near

from distilfast.losses import backends, chunks, linear, linear_operator, products
from mutations import Mutation, load
from mutations.linear import MUTATIONS

pytestmark = pytest.mark.thorough

# Each after those that it imports.
MODULES = (products, chunks, linear_operator, linear)


@contextmanager
def instead(folder: Path) -> Iterator[None]:
    """The tests' calls go to the modules in this folder, whose operator has its own name."""
    path = folder / "linear_operator.py"
    text = path.read_text(encoding="utf-8")
    name = '"distilfast::linear_distillation"'
    assert text.count(name) == 1
    path.write_text(text.replace(name, '"distilfast_mutated::linear_distillation"'), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setitem(sys.modules, module.__name__, module)  # so that it comes back
            leaf = module.__name__.rpartition(".")[2]
            mutated = load(module.__name__, folder / f"{leaf}.py")
            for suite in (tests, near):
                if hasattr(suite, leaf):
                    patch.setattr(suite, leaf, mutated)
        for suite in (tests, near):
            patch.setattr(suite, "linear_distillation_loss", mutated.linear_distillation_loss)
        yield


def copy_all(folder: Path) -> None:
    for module in MODULES:
        shutil.copy(str(module.__file__), folder)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    copy_all(tmp_path)
    mutation.write(tmp_path)
    if backends.unavailable(mutation.needs):
        pytest.skip(f"no {mutation.needs} here")
    with instead(tmp_path):
        mutation.must_be_noticed(mutation.needs)


def test_unmutated_copy_passes_the_same_calls(tmp_path: Path) -> None:
    copy_all(tmp_path)
    calls = {(x.needs, repr(x.caught_by)): x.caught_by for x in MUTATIONS}
    with instead(tmp_path):
        for (backend, _), caught_by in calls.items():
            if not backends.unavailable(backend):
                caught_by(backend)
    assert tests.chunks is chunks is sys.modules[chunks.__name__]
