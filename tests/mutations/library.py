"""Libraries of the C++ kernels with many mutations in them, of which one at a time is switched on.

It takes 4 to 13 seconds to compile a library, so each instruction set has one, with all of its
mutations. What a mutation replaces is an expression, or statements, and the source chooses by a
number:

    a * b            becomes  (distilfast_mutant == 6 ? (a + b) : (a * b))
    row.power = 0;   becomes  { if (distilfast_mutant == 5) {  } else { row.power = 0; } }

A declaration leaves no such choice. What it says is mutated where it is used.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import runpy
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, cpu_levels
from distilfast_kernels import cpp

from distilfast.losses import backends
from mutations import Mutation, different
from mutations.cpp import of_level

SOURCES = ROOT / "kernels" / "csrc"
SWITCH = "distilfast_mutant"
DECLARATION = f'extern "C" __attribute__((visibility("default"))) int {SWITCH};\n'
FLAGS = "-O0 -w -std=c++17 -ffp-contract=off -fPIC -fopenmp -fvisibility=hidden -shared".split()
# The functions of a level, and the structures of their arguments.
KERNELS = {
    "distillation": "distillation",
    "hidden_cosine": "cosine",
    "combine_teachers": "ensemble",
    "scale": "scale",
    "accumulate": "accumulate",
    "product": "product",
}


def crossing(places: Sequence[slice]) -> bool:
    """Whether two of them overlap and neither lies within the other."""
    pairs = itertools.permutations(places, 2)
    return any(a.start < b.start < a.stop < b.stop for a, b in pairs)


def with_switches(text: str, mutations: Mapping[int, Mutation]) -> str:
    """The source in which a mutation is on while SWITCH is its number."""
    places = {number: mutation.place(text) for number, mutation in mutations.items()}
    assert not crossing(list(places.values()))
    added = []
    for number, place in places.items():
        part, new = text[place], mutations[number].new
        chosen = f"{SWITCH} == {number} /* {mutations[number].name} */"
        if not part:
            begin, end = f"if ({chosen}) {{ {new} }}", ""
        elif part.endswith(";"):
            begin, end = f"{{ if ({chosen}) {{ {new} }} else {{ ", " } }"
        else:
            begin, end = f"({chosen} ? ({new}) : (", "))"
        # One place may lie within another. What ends at a position comes before what begins there;
        # of those that end there the inner one comes first, of those that begin the outer one.
        added.append((place.start, 1, -place.stop, number, begin))
        added.append((place.stop, 0, -place.start, -number, end))
    pieces, at = [], 0
    for position, *_, piece in sorted(added):
        pieces += text[at:position], piece
        at = position
    return "".join([*pieces, text[at:]])


@functools.cache
def flags_of_levels() -> dict[str, list[str]]:
    """setup.py's, which builds nothing while its setup() does nothing."""
    setuptools = pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))["LEVELS"]


def skip_without(level: str) -> None:
    reason = backends.unavailable("cpp")
    if reason is not None:
        pytest.skip(reason)
    if level not in cpu_levels():
        pytest.skip(f"this machine has no {level}")


def compiled(sources: Path, level: str) -> Path:
    """A library of one instruction set, in which the others' functions do nothing."""
    nothing = "int {}_{}(const distilfast_{}_args*, int) {{ return 0; }}"
    levels = {path.stem for path in sources.glob("*.cpp")} - {level, "dispatch"}
    others = [nothing.format(name, x, kind) for x in levels for name, kind in KERNELS.items()]
    lines = ['#include "distilfast.h"', f"int {SWITCH} = 0;", *others]
    (sources / "others.cpp").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (sources / "switch.h").write_text(DECLARATION, encoding="utf-8")
    library = sources / "mutated.so"
    command = ["g++", *FLAGS, *flags_of_levels()[level], "-include", str(sources / "switch.h")]
    command += [str(sources / f"{name}.cpp") for name in (level, "dispatch", "others")]
    done = subprocess.run(
        [*command, "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"malformed, it does not compile: {done.stderr[:2000]}")
    return library


def forget_library() -> None:
    cpp._library.cache_clear()
    cpp.best_level.cache_clear()


@contextmanager
def instead(library: Path, level: str, number: int = 0) -> Iterator[None]:
    """This library in place of the real one, with the mutation of this number; 0 is none's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILFAST_CPU_LEVEL", level)
        patch.setattr(cpp, "LIBRARY", library)
        forget_library()
        switch = ctypes.c_int.in_dll(cpp._library(), SWITCH)
        switch.value = number
        try:
            yield
        finally:
            switch.value = 0
            forget_library()


class Library:
    """The mutations of an instruction set, compiled in this folder."""

    def __init__(self, level: str, mutations: Sequence[Mutation], folder: Path) -> None:
        skip_without(level)
        if shutil.which("g++") is None:
            pytest.skip("no g++")
        self.level, self.mutations = level, mutations
        self.numbers = {str(mutation): number for number, mutation in enumerate(mutations, 1)}
        sources = shutil.copytree(SOURCES, folder / "csrc")
        for file in {mutation.file for mutation in mutations}:
            path = sources / file
            its = {self.numbers[str(x)]: x for x in mutations if x.file == file}
            text = with_switches(path.read_text(encoding="utf-8"), its)
            path.write_text(text, encoding="utf-8")
        self.path = compiled(sources, level)

    def check(self, mutation: Mutation) -> None:
        """The mutation is noticed."""
        with instead(self.path, self.level, self.numbers[str(mutation)]):
            mutation.must_be_noticed("cpp")

    def check_unmutated(self) -> None:
        """The same calls find nothing while no mutation is on, and the real library comes back."""
        with instead(self.path, self.level):
            for caught_by in different(x.caught_by for x in self.mutations):
                caught_by("cpp")
        assert cpp._library()._name == str(cpp.LIBRARY)


def suite_of(level: str) -> tuple[Any, ...]:
    """The library of an instruction set as a fixture, and its two tests."""
    mutations = of_level(level)

    @pytest.fixture(scope="module")
    def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
        return Library(level, mutations, tmp_path_factory.mktemp(level))

    @pytest.mark.parametrize("mutation", mutations, ids=str)
    def noticed(library: Library, mutation: Mutation) -> None:
        library.check(mutation)

    def unmutated(library: Library) -> None:
        library.check_unmutated()

    return library, noticed, unmutated
