"""Code broken on purpose, one place at a time: the suite has to notice each.

A mutation is a text that stands in a file exactly once, what to put in its place, and a call of a
test that has to fail then, by an assertion: any other exception means that the mutation is
malformed. Where more text is needed to find the place than is to be replaced, «these marks» are
around the part that is.

The tables are triton.py (Triton, reference.py and divergences.py), linear.py (the fused head) and
cpp.py (the C++ kernels and their launcher). A mutation takes a line or two there, for which ruff's
format is off.

Left out is what no number can tell: speed, what only a GPU does, what would crash or write outside
the tensors' memory.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest


class Call(NamedTuple):
    """A test with concrete arguments; what fixtures would bring is added."""

    test: Callable[..., None]
    arguments: dict[str, Any]

    def __call__(self, backend: str) -> None:
        wanted = inspect.signature(self.test).parameters
        with pytest.MonkeyPatch.context() as monkeypatch:
            fixtures = {
                "backend": backend,
                "device": "cpu",
                "level": os.environ.get("DISTILFAST_CPU_LEVEL"),
                "monkeypatch": monkeypatch,
            }
            used = {name: value for name, value in fixtures.items() if name in wanted}
            self.test(**self.arguments, **used)


def call(test: Callable[..., None], **arguments: Any) -> Call:
    return Call(test, arguments)


class Mutation(NamedTuple):
    file: str
    name: str
    needs: str  # a backend, or an instruction set of the C++ kernels
    caught_by: Call
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.needs}-{self.file}-{self.name}"

    def place(self, text: str) -> slice:
        """The part of the file's text that `new` replaces."""
        before, mark, rest = self.old.partition("«")
        part, _, after = rest.partition("»") if mark else (before, "", "")
        before = before if mark else ""
        context = before + part + after
        assert text.count(context) == 1, f"{self.name}: {context!r} is not in {self.file} once"
        start = text.index(context) + len(before)
        return slice(start, start + len(part))

    def apply(self, text: str) -> str:
        place = self.place(text)
        return text[: place.start] + self.new + text[place.stop :]

    def write(self, folder: Path) -> None:
        """Mutate the file in this folder."""
        path = folder / self.file
        path.write_text(self.apply(path.read_text(encoding="utf-8")), encoding="utf-8")

    def must_be_noticed(self, backend: str) -> None:
        test = self.caught_by.test.__name__
        try:
            self.caught_by(backend)
        except AssertionError:
            return
        except Exception as error:
            pytest.fail(f"{self.name!r} is malformed: {test} raises {error!r}")
        pytest.fail(f"{test} did not notice the mutation {self.name!r} of {self.file}")


def different(calls: Iterable[Call]) -> list[Call]:
    """Each call once."""
    return list({repr(call): call for call in calls}.values())


def load(name: str, path: Path, package: Path | None = None) -> ModuleType:
    """The module in this file, as if it had this name."""
    where = None if package is None else [str(package)]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
