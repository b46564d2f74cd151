"""The C++ kernels for any machine, broken on purpose as tests/mutations/cpp.py says."""

from __future__ import annotations

import pytest

from mutations.library import suite_of

pytestmark = pytest.mark.thorough

library, test_mutation_is_noticed, test_unmutated_library_passes_the_same_calls = suite_of("plain")
