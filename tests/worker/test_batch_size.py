"""The batch size that a worker finds: by time and memory, without an attempt that is far too large."""

from __future__ import annotations

import pytest

from pocd.protocol.names import LARGEST_BATCH, largest_batch_size
from pocd.worker.batch_size import LONGEST_SECONDS, Trial, find_batch_size


class Device:
    """A device whose batches take a fixed time, a time per nonce, and memory per nonce."""

    def __init__(self, *, fixed: float, each: float, fits: float = float("inf"), tells: bool = True) -> None:
        self.fixed, self.each, self.fits, self.tells = fixed, each, fits, tells
        self.tried: list[int] = []

    def attempt(self, size: int) -> Trial | None:
        self.tried.append(size)
        if size > self.fits:
            return None
        return Trial(self.fixed + self.each * size, self.fits / size if self.tells else float("inf"))


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (Device(fixed=0.01, each=0.0004), 256),  # as many as are tried at most
        (Device(fixed=0.02, each=0.006), 64),
        (Device(fixed=0.0, each=0.005), 64),
        (Device(fixed=0.0, each=1.6), 1),  # slow, and no smaller batch is
        (Device(fixed=0.01, each=0.0, fits=100), 64),
        (Device(fixed=0.01, each=0.0, fits=100, tells=False), 64),
        (Device(fixed=0.01, each=0.0, fits=1), 1),
    ],
)
def test_the_largest_size_that_is_quick_and_fits_is_found(device: Device, found: int) -> None:
    assert find_batch_size(256, device.attempt) == found
    assert len(device.tried) <= 10


def test_a_size_that_does_not_fit_is_not_tried_where_memory_can_be_told() -> None:
    device = Device(fixed=0.01, each=0.0, fits=100)
    find_batch_size(256, device.attempt)
    assert max(device.tried) <= 100


def test_no_attempt_takes_longer_than_is_allowed_where_time_grows_with_size() -> None:
    device = Device(fixed=0.001, each=0.003)
    find_batch_size(4096, device.attempt)
    assert max(device.fixed + device.each * size for size in device.tried) <= LONGEST_SECONDS


def test_a_size_that_turns_out_slower_than_it_seemed_is_left() -> None:
    assert find_batch_size(256, lambda size: Trial(0.01 if size <= 8 else 0.01 * size)) == 32


def test_where_not_even_one_fits_there_is_no_size() -> None:
    assert find_batch_size(256, lambda _: None) is None


@pytest.mark.parametrize("most", [1, 2, 96, 256])
def test_no_size_is_above_the_largest(most: int) -> None:
    assert find_batch_size(most, lambda _: Trial(0.001)) == most


@pytest.mark.parametrize(("seq_len", "size"), [(16, 4096), (256, 256), (300, 128), (65_536, 1), (2**20, 1)])
def test_a_batch_has_64k_positions_at_most(seq_len: int, size: int) -> None:
    assert largest_batch_size(seq_len) == size
    assert size == 1 or size * seq_len <= LARGEST_BATCH
