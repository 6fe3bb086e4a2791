"""Computes distances or vectors, of the round that is mined and of one that is recomputed, with one loaded model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from pocd.compute.engine import BlockRun, block_run
from pocd.compute.margins import measure_chances
from pocd.compute.memory import is_out_of_memory
from pocd.compute.reference import Comparison, compare
from pocd.compute.routers import routers_of
from pocd.protocol.errors import InputError, MemoryShortError, OutOfMemoryError
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import expected_valid_rate
from pocd.protocol.vectors import encode_vectors
from pocd.worker.messages import (
    BatchShrunk,
    Compared,
    Compute,
    Distances,
    Load,
    Message,
    Recompute,
    RoundBegun,
    Vectors,
)
from pocd.worker.self_test import smaller

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.model import Model
    from pocd.protocol.proof import Round

T = TypeVar("T")
WATCHED = 16  # nonces per pass, at most, whose routers are watched: of one shape, however many are to be judged


@dataclass(frozen=True, slots=True)
class Weighed:
    """Distances of a mixture of experts that are recomputed, and how firm they are.

    Attributes:
        results: The distances, or these and their references.
        turned: How probable it is, by nonce, that a router chooses otherwise on another honest host, float64 [n].
    """

    results: torch.Tensor | Comparison
    turned: torch.Tensor


Results = torch.Tensor | Comparison | Weighed


class PreparedRound:
    """The model prepared for one round, or for none.

    Attributes:
        round: The round that the model is prepared for; None where it is prepared for none.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._attached = ExitStack()
        self._run: BlockRun | None = None
        self.round: Round | None = None

    def begin(self, round_: Round) -> BlockRun:
        """Return the run of `round_`; it is prepared first, unless it is already."""
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
        """Give the model its own weights back, and free the memory of the round."""
        self._attached.close()
        self._run = self.round = None


class DistanceComputer:
    """Computes distances with a loaded model, for the round that is mined and for one that is recomputed beside it."""

    def __init__(self, model: Model, load: Load, batch_size: int, report: Callable[[Message], None]) -> None:
        self._load = load
        self._model = model
        self._batch_size = batch_size
        self._report = report
        self._mined = PreparedRound(model)
        self._recomputed = PreparedRound(model)
        self._fitting: dict[tuple[str, int], int] = {}  # nonces per batch by scheme and length that had to be halved
        self._comparing: dict[tuple[str, int], int] = {}  # likewise, where the float32 reference is computed too

    def start(self, message: Compute | Recompute) -> Callable[[], Results]:
        """Start to compute what a message asks for; returns a function that waits for it (see `BlockRun.values`).

        Raises:
            InputError: The model cannot take the message's nonces or round, or there is no memory for a reference.
            NonFiniteError: The model gave NaN or infinity; the returned function raises it too.
            MemoryShortError: A batch does not fit into memory.
        """
        return self._recompute(message) if isinstance(message, Recompute) else self._mine(message)

    def _mine(self, message: Compute) -> Callable[[], torch.Tensor]:
        """Start to compute a message of the round that is mined; a new round is prepared first."""
        round_ = message.round
        if round_ != self._mined.round:
            if SCHEMES[round_.scheme].weights != "trained":
                self._recomputed.end()  # both rounds would draw into the same weights
            run = self._begin(self._mined, round_, other=self._recomputed)
            execution = run.execution(self._rows(run, round_))
            rate = expected_valid_rate(round_.r_target, run.dimension) if round_.r_target else 1.0  # every nonce counts
            self._report(RoundBegun(round_.id, rate, execution.path, execution.reason))
        run = self._mined.begin(round_)
        return self._start(run, round_, message.nonces, other=self._recomputed, gaps=True)

    def _recompute(self, message: Recompute) -> Callable[[], Results]:
        """Start to compute a message of another round, in the shape in which it would be mined."""
        prepared, other = self._recomputed, self._mined
        if message.round == self._mined.round:
            prepared, other = other, prepared
        elif SCHEMES[message.round.scheme].weights != "trained":
            self._mined.end()  # both rounds would draw into the same weights
        try:
            run = self._begin(prepared, message.round, other=other)
            wait: Callable[[], torch.Tensor | Comparison]
            if message.with_reference:
                compared = self._compare(run, message.round, message.nonces, other=other)
                wait = lambda: compared  # noqa: E731 - in place of what waits for a device
            else:
                wait = self._start(run, message.round, message.nonces, other=other, gaps=True)
            is_mixture = run.scheme.output == "distance" and bool(routers_of(run.model.by_layers.layers))
            if not message.last and not is_mixture:
                return wait
            results = wait()  # before the prepared round ends
            if not is_mixture:
                return lambda: results
            weighed = Weighed(results, self._weigh(run, message.round, message.nonces, other=other))
            return lambda: weighed
        finally:
            if message.last:
                self._recomputed.end()

    def _begin(self, prepared: PreparedRound, round_: Round, *, other: PreparedRound) -> BlockRun:
        """Prepare a round, and end the `other` one if there is no memory for both."""
        try:
            return prepared.begin(round_)
        except RuntimeError as error:
            if other.round is None or self._load.is_split or not is_out_of_memory(error):
                raise
        other.end()
        return prepared.begin(round_)

    def _rows(self, run: BlockRun, round_: Round) -> int:
        """Return the nonces per batch: of longer sequences fewer, so that it has as many tokens as the self-test's."""
        rows = self._batch_size * self._load.seq_len // max(run.seq_len, self._load.seq_len)
        return max(1, min(rows, self._fitting.get((round_.scheme, round_.seq_len), rows)))

    def _start(
        self, run: BlockRun, round_: Round, nonces: Sequence[int], *, other: PreparedRound, gaps: bool = False
    ) -> Callable[[], torch.Tensor]:
        """Start to compute nonces; `gaps`: a nonce without a finite vector does not keep the others from counting."""
        while True:
            rows = self._rows(run, round_)
            try:
                if len(nonces) <= rows:
                    return partial(run.start(nonces, batch_size=rows).values, gaps=gaps)
                values = run.values(nonces, batch_size=rows, gaps=gaps)
            except OutOfMemoryError as error:
                if other.round is not None and not self._load.is_split:
                    other.end()  # the self-test, which showed that the size fits, had only one round prepared
                    continue
                self._shrink(run, round_, rows, error)
            else:
                return lambda: values

    def _compare(self, run: BlockRun, round_: Round, nonces: Sequence[int], *, other: PreparedRound) -> Comparison:
        """Compute nonces by the run's own arithmetic and by the reference's, in batches that fit into memory."""
        return self._fitted(
            lambda rows: compare(run, nonces, batch_size=rows), run, round_, other=other, most=len(nonces)
        )

    def _weigh(self, run: BlockRun, round_: Round, nonces: Sequence[int], *, other: PreparedRound) -> torch.Tensor:
        """Return how probable it is that a router chooses otherwise for each nonce, in batches that fit into memory."""

        def measure(rows: int) -> torch.Tensor:
            found = measure_chances(run, nonces, batch_size=rows)
            assert found is not None, "the model has routers"
            return found

        return self._fitted(measure, run, round_, other=other, most=WATCHED)

    def _fitted(
        self, compute: Callable[[int], T], run: BlockRun, round_: Round, *, other: PreparedRound, most: int
    ) -> T:
        """Do what a validator wants computed besides results, with as many nonces per batch as fit, `most` at most."""
        shape = round_.scheme, round_.seq_len
        while True:
            rows = min(most, self._comparing.get(shape, self._rows(run, round_)))
            try:
                return compute(rows)
            except OutOfMemoryError as error:
                if self._load.is_split:  # in the middle of what the other ranks still do
                    raise MemoryShortError(str(error)) from error
                if other.round is not None:
                    other.end()
                    continue
                if rows == 1:
                    raise InputError(f"{error}; so this host cannot judge claims by their differences") from error
            torch.cuda.empty_cache()  # does nothing without a GPU
            self._comparing[shape] = rows // 2

    def _shrink(self, run: BlockRun, round_: Round, rows: int, error: OutOfMemoryError) -> None:
        """Halve the batches of the round's scheme and sequence length; those of the configured ones are leased so."""
        if run.execution(rows).path != "eager":  # compiled code serves one size; the next life compiles for another
            raise MemoryShortError(str(error)) from error
        half = smaller(rows, error, self._load)
        if (round_.scheme, round_.seq_len) == (self._load.scheme, self._load.seq_len):
            self._batch_size = half
            self._report(BatchShrunk(half, str(error)))
        else:
            self._fitting[round_.scheme, round_.seq_len] = half


def result(number: int, results: Results) -> Distances | Vectors | Compared:
    """Return the message with the result of the message `number`."""
    turned = None
    if isinstance(results, Weighed):
        turned = results.turned.tolist()
        results = results.results
    if isinstance(results, Comparison):
        own, reference = (each.view(len(each), -1).tolist() for each in (results.own, results.reference))
        return Compared(number, own, reference, results.errors.tolist(), turned)
    if results.dim() == 1:
        return Distances(number, results.tolist(), turned)
    return Vectors(number, encode_vectors(results))
