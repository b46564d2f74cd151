"""The Triton kernels and reference.py broken on purpose, as tests/mutations/triton.py says.

The mutated package is imported instead of the real one while the test runs that has to notice.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import distilfast_kernels
import pytest

from distilfast.losses import backends, divergences, reference
from mutations import Mutation, load
from mutations.triton import MUTATIONS

pytestmark = pytest.mark.thorough


@contextmanager
def kernels_of(folder: Path) -> Iterator[None]:
    """distilfast_kernels is the package in this folder."""

    def forget() -> dict[str, ModuleType]:
        names = [x for x in sys.modules if x.split(".")[0] == "distilfast_kernels"]
        return {name: sys.modules.pop(name) for name in names}

    real = forget()
    try:
        load("distilfast_kernels", folder / "__init__.py", folder)
        yield
    finally:
        forget()
        sys.modules.update(real)


@contextmanager
def reference_of(folder: Path) -> Iterator[None]:
    """The torch backend computes what reference.py and divergences.py in this folder say."""
    load(divergences.__name__, folder / "divergences.py")
    try:
        module = load("distilfast_mutated_reference", folder / "reference.py")
    finally:
        sys.modules[divergences.__name__] = divergences
    torch_backend = backends.BACKENDS["torch"]
    torch_backend = dataclasses.replace(
        torch_backend,
        **{name: getattr(module, name) for name in ("hidden_cosine", "row_scales", "reduce_rows")},
    )
    # "auto" means the reference, too
    without_cpp = dataclasses.replace(
        backends.BACKENDS["cpp"], unavailable=lambda: "the reference is asked"
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "reference", module)
            patch.setitem(backends.BACKENDS, "torch", torch_backend)
            patch.setitem(backends.BACKENDS, "cpp", without_cpp)
            yield
    finally:
        del sys.modules[module.__name__]


def copy_for(backend: str, folder: Path) -> Path:
    """A copy of the package that this backend runs."""
    reason = backends.unavailable(backend)
    if reason is None and backend == "triton" and not distilfast_kernels.interpreted():
        reason = "broken kernels are for the interpreter: on a GPU one of them could take it down"
    if reason is not None:
        pytest.skip(reason)
    module = reference if backend == "torch" else distilfast_kernels
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(module.__file__).parent, folder / "package", ignore=ignored)


def instead(backend: str, folder: Path) -> Any:
    return reference_of(folder) if backend == "torch" else kernels_of(folder)


@pytest.fixture(scope="module", autouse=True)
def functions_are_rewritten_once() -> Iterator[None]:
    """Triton's interpreter rewrites the functions of every copy, for which it takes a quarter of
    the time. All but the mutated one are those of the copy before."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    rewrite = interpreter.FunctionRewriter.rewrite_ast
    rewritten: dict[CodeType, FunctionType] = {}

    def rewrite_once(self: Any) -> Any:
        code, names = self.fn.__code__, self.fn.__globals__
        if code not in rewritten:
            rewritten[code] = rewrite(self)
            return rewritten[code]
        for name, value in vars(interpreter).items():  # which a rewritten function calls
            names.setdefault(name, value)
        again = FunctionType(rewritten[code].__code__, names, argdefs=self.fn.__defaults__)
        again.__annotations__ = self.fn.__annotations__  # which say what is constexpr
        return again

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.FunctionRewriter, "rewrite_ast", rewrite_once)
        yield


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    folder = copy_for(mutation.needs, tmp_path)
    mutation.write(folder)
    with instead(mutation.needs, folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, on inf and NaN
        mutation.must_be_noticed(mutation.needs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_unmutated_copy_passes_the_same_tests(backend: str, tmp_path: Path) -> None:
    # one call of each test: what a copy could spoil does not depend on the arguments
    calls = {x.caught_by.test: x.caught_by for x in MUTATIONS if x.needs == backend}
    with instead(backend, copy_for(backend, tmp_path)):
        for caught_by in calls.values():
            caught_by(backend)
    # and the real ones are back
    assert sys.modules["distilfast_kernels"] is distilfast_kernels
    assert backends.reference is reference
