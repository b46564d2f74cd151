"""The launcher of the C++ kernels broken on purpose, and what is said of all mutations in C++.

The table is tests/mutations/cpp.py. The kernels' own are tested in a file for each instruction set,
test_mutations_plain.py and so on: each compiles a library.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distilfast_kernels
import pytest
from distilfast_kernels import cpp

from mutations import Mutation, call, different, load
from mutations.cpp import LAUNCHER, MUTATIONS, PLAIN, of_level
from mutations.library import SOURCES, skip_without, with_switches

pytestmark = pytest.mark.thorough

OF_THE_LAUNCHER = [x for x in MUTATIONS if x.file == LAUNCHER]


@contextmanager
def launcher_of(folder: Path) -> Iterator[None]:
    """cpp.py in this folder stands in for the real one, and calls the real library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILFAST_CPU_LEVEL", PLAIN)
        patch.setitem(sys.modules, cpp.__name__, cpp)  # so that it comes back
        module = load(cpp.__name__, folder / LAUNCHER)
        patch.setattr(module, "LIBRARY", cpp.LIBRARY)
        patch.setattr(distilfast_kernels, "cpp", module)
        yield


@pytest.mark.parametrize("mutation", OF_THE_LAUNCHER, ids=str)
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    shutil.copy(cpp.__file__, tmp_path)
    mutation.write(tmp_path)
    skip_without(PLAIN)
    with launcher_of(tmp_path):
        mutation.must_be_noticed("cpp")


def test_unmutated_launcher_passes_the_same_calls(tmp_path: Path) -> None:
    skip_without(PLAIN)
    shutil.copy(cpp.__file__, tmp_path)
    with launcher_of(tmp_path):
        for caught_by in different(x.caught_by for x in OF_THE_LAUNCHER):
            caught_by("cpp")
    assert sys.modules[cpp.__name__] is distilfast_kernels.cpp is cpp


# --- The switches --------------------------------------------------------------------------------


@pytest.mark.parametrize("level", cpp.LEVELS)
def test_each_mutation_stands_in_its_file_once(level: str) -> None:
    # on a machine without this instruction set, too
    for mutation in of_level(level):
        mutation.apply((SOURCES / mutation.file).read_text(encoding="utf-8"))


def test_every_mutation_of_a_kernel_has_a_file_of_tests() -> None:
    assert {x.needs for x in MUTATIONS} == set(cpp.LEVELS)
    for level in cpp.LEVELS:
        assert Path(__file__).with_name(f"test_mutations_{level}.py").exists()


def mutation(name: str, old: str, new: str) -> Mutation:
    return Mutation("a.cpp", name, "plain", call(lambda: None), old, new)


def test_switch_of_an_expression_may_lie_within_that_of_a_statement() -> None:
    mutations = {
        1: mutation("inner", "x = «a * b»", "a"),
        2: mutation("outer", "x = a * b + c;", ""),
    }
    inner = "(distilfast_mutant == 1 /* inner */ ? (a) : (a * b))"
    outer = f"{{ if (distilfast_mutant == 2 /* outer */) {{  }} else {{ x = {inner} + c; }} }}"
    assert with_switches("if (d) x = a * b + c;", mutations) == f"if (d) {outer}"


def test_two_mutations_of_one_place_are_told_apart() -> None:
    mutations = {1: mutation("one", "f(«a»", "b"), 2: mutation("other", "f(«a»", "c")}
    other = "(distilfast_mutant == 2 /* other */ ? (c) : (a))"
    assert with_switches("f(a)", mutations) == (
        f"f((distilfast_mutant == 1 /* one */ ? (b) : ({other})))"
    )


def test_statement_may_be_put_in_where_nothing_was() -> None:
    added = with_switches("a;\nb;", {1: mutation("more", "a;\n«»b", "c;")})
    assert added == "a;\nif (distilfast_mutant == 1 /* more */) { c; }b;"


def test_mutations_that_overlap_in_part_are_refused() -> None:
    with pytest.raises(AssertionError):
        with_switches("a + b + c", {1: mutation("", "a + b", "a"), 2: mutation("", "b + c", "c")})
