"""The C++ kernels for any machine, broken on purpose as tests/mutations/cpp.py says."""

from __future__ import annotations

import pytest

from mutations import Mutation
from mutations.cpp import of_level
from mutations.library import Library

pytestmark = pytest.mark.thorough

MUTATIONS = of_level("plain")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library("plain", MUTATIONS, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_noticed(library: Library, mutation: Mutation) -> None:
    library.check(mutation)


def test_unmutated_library_passes_the_same_calls(library: Library) -> None:
    library.check_unmutated()
