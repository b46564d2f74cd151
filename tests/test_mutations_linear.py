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
from mutations import Mutation, load
from mutations.linear import MUTATIONS

from distilfast import backends, linear, products


@contextmanager
def instead(folder: Path) -> Iterator[None]:
    """The tests' calls go to the modules in this folder, whose operator has its own name."""
    path = folder / "linear.py"
    text = path.read_text(encoding="utf-8")
    name = '"distilfast::linear_distillation"'
    assert text.count(name) == 1
    path.write_text(text.replace(name, '"distilfast_mutated::linear_distillation"'), "utf-8")
    its_products = load("distilfast_mutated_products", folder / "products.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, products.__name__, its_products)
        module = load("distilfast_mutated_linear", path)
        for suite in (tests, near):
            patch.setattr(suite, "products", its_products)
            patch.setattr(suite, "linear_distillation_loss", module.linear_distillation_loss)
        patch.setattr(tests, "linear", module)
        yield


def copy_both(folder: Path) -> None:
    for module in (linear, products):
        shutil.copy(module.__file__, folder)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    copy_both(tmp_path)
    mutation.write(tmp_path)
    if backends.unavailable(mutation.needs):
        pytest.skip(f"no {mutation.needs} here")
    with instead(tmp_path):
        mutation.must_be_noticed(mutation.needs)


def test_unmutated_copy_passes_the_same_calls(tmp_path: Path) -> None:
    copy_both(tmp_path)
    calls = {(x.needs, repr(x.caught_by)): x.caught_by for x in MUTATIONS}
    with instead(tmp_path):
        for (backend, _), caught_by in calls.items():
            if not backends.unavailable(backend):
                caught_by(backend)
    assert tests.linear is linear
