"""What the worker process computes: distances of the round that is mined, and of one that is recomputed beside it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from pocd.compute.engine import BlockRun, block_run, is_out_of_memory
from pocd.compute.errors import ComputeError, OutOfMemoryError
from pocd.compute.schemes import SCHEMES
from pocd.statistics import expected_valid_rate
from pocd.worker.messages import BatchSize, Compute, Load, Message, Recompute, RoundBegun
from pocd.worker.self_test import self_test

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.model import Model
    from pocd.proof import Round


class Prepared:
    """The model prepared for one round, as long as that is wanted."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._attached = ExitStack()
        self._run: BlockRun | None = None
        self.round: Round | None = None

    def begin(self, round_: Round) -> BlockRun:
        """Return the run of `round_`, prepared anew where another one was."""
        if self._run is None or round_ != self.round:
            self.end()
            run = block_run(
                self._model,
                SCHEMES[round_.scheme],
                block_hash=round_.block_hash,
                public_key=round_.public_key,
                seq_len=round_.seq_len,
            )
            self._run = self._attached.enter_context(run)
            self.round = round_
        return self._run

    def end(self) -> None:
        """Give the model its own weights back, and free what was prepared."""
        self._attached.close()
        self._run = self.round = None


class Worker:
    """A loaded model, prepared for the round that is mined and for one that is recomputed beside it."""

    def __init__(self, model: Model, batch_size: int, link: Link, *, seq_len: int, shrink: bool) -> None:
        self._batch_size = batch_size
        self._link = link
        self._seq_len = seq_len
        self._shrink = shrink
        self._mined = Prepared(model)
        self._recomputed = Prepared(model)

    def mine(self, message: Compute) -> list[float]:
        """Compute one message's distances, preparing its round first where that is a new one."""
        round_ = message.round
        if round_ != self._mined.round:
            if SCHEMES[round_.scheme].weights != "trained":
                self._recomputed.end()  # both would draw into the same weights
            run = begin(self._mined, round_, other=self._recomputed)
            self._link.send(RoundBegun(round_.id, expected_valid_rate(round_.r_target, run.dimension)))
        nonces = range(message.first, message.first + message.step * message.count, message.step)
        return self._distances(self._mined.begin(round_), nonces, other=self._recomputed)

    def recompute(self, message: Recompute) -> list[float]:
        """Compute one message's distances, in the shape in which they would be mined."""
        prepared, other = self._recomputed, self._mined
        if message.round == self._mined.round:
            prepared, other = other, prepared
        elif SCHEMES[message.round.scheme].weights != "trained":
            self._mined.end()  # likewise
        try:
            run = begin(prepared, message.round, other=other)
            return self._distances(run, message.nonces, other=other)
        finally:
            if message.last:
                self._recomputed.end()

    def _distances(self, run: BlockRun, nonces: Sequence[int], *, other: Prepared) -> list[float]:
        while True:
            # A batch of longer sequences than the self-test's has about as many positions as that had.
            rows = max(1, self._batch_size * self._seq_len // max(run.seq_len, self._seq_len))
            try:
                return run.distances(nonces, batch_size=rows)
            except OutOfMemoryError as error:
                if other.round is not None:  # the self-test, which showed that the size fits, was alone
                    other.end()
                    continue
                self._batch_size = smaller(self._batch_size, error, shrink=self._shrink)
                self._link.send(BatchSize(self._batch_size, str(error)))


def begin(prepared: Prepared, round_: Round, *, other: Prepared) -> BlockRun:
    """Prepare a round, in place of the `other` where there is no memory for both."""
    try:
        return prepared.begin(round_)
    except RuntimeError as error:
        if other.round is None or not is_out_of_memory(error):
            raise
    other.end()
    return prepared.begin(round_)


def smaller(batch_size: int, error: OutOfMemoryError, *, shrink: bool) -> int:
    """Return the batch size to try after `error`.

    Raises:
        ComputeError: There is none: the size was configured, or one nonce does not fit.
    """
    if not shrink:
        raise ComputeError(f"{error}: lower worker.batch_size, or set it to 'auto'") from error
    if batch_size == 1:
        raise ComputeError(
            "not even one nonce fits into the memory: use a smaller model, dtype or round.seq_len"
        ) from error
    torch.cuda.empty_cache()  # does nothing without a GPU
    return batch_size // 2


def fitting_batch_size(model: Model, load: Load) -> int:
    """Run the self-test with the batch size of `load`, or the largest of its halves that fits.

    Raises:
        ComputeError: The self-test failed, or none fits.
    """
    batch_size = load.batch_size
    while True:
        try:
            self_test(model, load, batch_size)
        except OutOfMemoryError as error:
            batch_size = smaller(batch_size, error, shrink=load.shrink)
        else:
            return batch_size
