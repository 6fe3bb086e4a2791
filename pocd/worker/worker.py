"""What the worker process computes: distances of the round that is mined, and of one that is recomputed beside it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from pocd.compute.engine import BlockRun, block_run
from pocd.compute.memory import is_out_of_memory
from pocd.protocol.errors import MemoryShortError, OutOfMemoryError
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import expected_valid_rate
from pocd.worker.messages import BatchSize, Compute, Load, Message, Recompute, RoundBegun
from pocd.worker.self_test import check_shape, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.model import Model
    from pocd.protocol.proof import Round


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

    def __init__(self, model: Model, load: Load, batch_size: int, report: Callable[[Message], None]) -> None:
        self._load = load
        self._model = model
        self._batch_size = batch_size
        self._report = report
        self._mined = Prepared(model)
        self._recomputed = Prepared(model)

    def start(self, message: Compute | Recompute) -> Callable[[], list[float]]:
        """Start to compute one message's distances; returns what waits for them.

        Raises:
            InputError: The model cannot take the message's nonces or round.
            NonFiniteError: It gave NaN or infinity; also of what is returned.
            MemoryShortError: A batch does not fit.
        """
        return self._recompute(message) if isinstance(message, Recompute) else self._mine(message)

    def _mine(self, message: Compute) -> Callable[[], list[float]]:
        """Start a message of the round that is mined, and prepare that first where it is a new one."""
        round_ = message.round
        if round_ != self._mined.round:
            if SCHEMES[round_.scheme].weights != "trained":
                self._recomputed.end()  # both would draw into the same weights
            run = self._begin(self._mined, round_, other=self._recomputed)
            rate, execution = expected_valid_rate(round_.r_target, run.dimension), run.execution(self._rows(run))
            self._report(RoundBegun(round_.id, rate, execution.path, execution.reason))
        nonces = range(message.first, message.first + message.step * message.count, message.step)
        return self._start(self._mined.begin(round_), nonces, other=self._recomputed)

    def _recompute(self, message: Recompute) -> Callable[[], list[float]]:
        """Start a message of another round, in the shape in which it would be mined."""
        prepared, other = self._recomputed, self._mined
        if message.round == self._mined.round:
            prepared, other = other, prepared
        elif SCHEMES[message.round.scheme].weights != "trained":
            self._mined.end()  # likewise
        try:
            wait = self._start(self._begin(prepared, message.round, other=other), message.nonces, other=other)
            if not message.last:
                return wait
            distances = wait()  # before what is prepared ends
            return lambda: distances
        finally:
            if message.last:
                self._recomputed.end()

    def _begin(self, prepared: Prepared, round_: Round, *, other: Prepared) -> BlockRun:
        """Prepare a round, in place of the `other` where there is no memory for both."""
        try:
            return prepared.begin(round_)
        except RuntimeError as error:
            if other.round is None or self._load.is_split or not is_out_of_memory(error):
                raise
        other.end()
        return prepared.begin(round_)

    def _rows(self, run: BlockRun) -> int:
        """Nonces per batch: of longer sequences so many that it has about as many positions as the self-test's."""
        return max(1, self._batch_size * self._load.seq_len // max(run.seq_len, self._load.seq_len))

    def _start(self, run: BlockRun, nonces: Sequence[int], *, other: Prepared) -> Callable[[], list[float]]:
        while True:
            rows = self._rows(run)
            try:
                if len(nonces) <= rows:
                    return run.start(nonces, batch_size=rows).distances
                distances = run.distances(nonces, batch_size=rows)
            except OutOfMemoryError as error:
                if other.round is not None and not self._load.is_split:
                    other.end()  # the self-test, which showed that the size fits, was alone
                    continue
                if self._model.program is not None:  # it serves one size, and the next worker compiles for another
                    raise MemoryShortError(str(error)) from error
                self._batch_size = smaller(self._batch_size, error, self._load)
                self._report(BatchSize(self._batch_size, str(error)))
            else:
                return lambda: distances


def smaller(batch_size: int, error: OutOfMemoryError, load: Load) -> int:
    """Return the batch size to try after `error`.

    Raises:
        MemoryShortError: There is none: the size was configured, one nonce does not fit, or other ranks would have to
            do the same.
    """
    if not load.shrink:
        raise MemoryShortError(f"{error}: lower worker.batch_size, or set it to 'auto'") from error
    if batch_size == 1:
        raise MemoryShortError(
            "not even one nonce fits into the memory: use a smaller model, dtype or round.seq_len"
        ) from error
    if load.is_split:
        raise MemoryShortError(str(error)) from error
    torch.cuda.empty_cache()  # does nothing without a GPU
    return batch_size // 2


def fit(model: Model, load: Load) -> tuple[Model, int]:
    """Test the model with the batch size of `load`, or the largest of its halves that fits, and compile it for that.

    Returns:
        The model, compiled where that is asked for and possible, and the batch size.

    Raises:
        ComputeError: The self-test failed.
        MemoryShortError: None fits.
    """
    batch_size = load.batch_size
    while True:
        try:
            check_shape(model, load, batch_size)  # eagerly, which needs most memory, before the costly part
            return compiled(model, load, seq_len=load.seq_len, batch_size=batch_size), batch_size
        except OutOfMemoryError as error:
            batch_size = smaller(batch_size, error, load)
