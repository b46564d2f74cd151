"""Scratch memory: what one call had the next one gets, and nobody else."""

from __future__ import annotations

import threading

import pytest
import torch

from distilfast.losses.scratch import LARGE_BYTES, Scratch

CPU = torch.device("cpu")
LARGE = (LARGE_BYTES // 4 // 1000 + 1, 1000)


@pytest.fixture(autouse=True)
def nothing_kept():
    Scratch.release()
    yield
    Scratch.release()


def take(*shapes, dtype=torch.float32):
    """A call that takes these: the addresses of what it got."""
    scratch = Scratch()
    taken = [scratch.empty(shape, dtype, CPU) for shape in shapes]
    for x, shape in zip(taken, shapes, strict=True):
        assert x.shape == shape
        assert x.dtype == dtype
        assert x.is_contiguous()
        x.fill_(1)  # all of it is there
    scratch.keep()
    return [x.data_ptr() for x in taken]


def test_next_call_gets_what_the_last_one_had():
    first = take(LARGE, LARGE)
    assert len(set(first)) == 2  # not the same twice
    assert set(take(LARGE, LARGE)) == set(first)
    # other dtypes and shapes of about the size, too
    rows, width = LARGE
    assert set(take((rows, 2 * width), dtype=torch.bfloat16)) <= set(first)


def test_what_a_call_did_not_use_is_given_back():
    both = take(LARGE, LARGE)
    one = take(LARGE)
    assert one[0] in both
    assert len(Scratch._kept) == 1


def test_much_larger_memory_is_not_kept_for_little():
    rows, width = LARGE
    (large,) = take((5 * rows, width))
    (little,) = take(LARGE)
    assert little != large
    assert sum(len(x) for x in Scratch._kept) < 2 * LARGE_BYTES


def test_small_memory_is_pytorchs():
    take((10, 10))
    assert Scratch._kept == []


def test_call_that_fails_keeps_nothing():
    scratch = Scratch()
    scratch.empty(LARGE, torch.float32, CPU)
    del scratch
    assert Scratch._kept == []


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr("distilfast.losses.scratch.KEPT_BYTES", 3 * LARGE_BYTES)
    rows, width = LARGE
    large, *_ = take((4 * rows, width), LARGE)
    assert [x.data_ptr() for x in Scratch._kept] != [large]
    assert 0 < sum(len(x) for x in Scratch._kept) <= 3 * LARGE_BYTES
    Scratch.release()
    assert Scratch._kept == []


def test_system_that_has_no_memory_left_is_a_memory_error():
    with pytest.raises(MemoryError, match="bytes of scratch memory"):
        Scratch().empty((1 << 62,), torch.uint8, CPU)


def test_calls_at_the_same_time_share_nothing():
    barrier, found = threading.Barrier(2, timeout=20), []

    def call():
        for _ in range(5):
            barrier.wait()
            scratch = Scratch()
            mine = scratch.empty(LARGE, torch.float32, CPU)
            mine.fill_(threading.get_ident() % 1000)
            barrier.wait()
            found.append(bool((mine == threading.get_ident() % 1000).all()))
            barrier.wait()
            scratch.keep()

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 10
