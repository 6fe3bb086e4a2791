"""Nonces in, distances or vectors out: one engine for every scheme (docs/protocol.md sections 3 and 4)."""

from __future__ import annotations

import itertools
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocd.compute import stages
from pocd.compute.arithmetic import fix_arithmetic
from pocd.compute.memory import is_out_of_memory
from pocd.compute.model import Execution, check_seq_len
from pocd.compute.random import fill_normal, int32_bits, seeds_tensor, to_device, unit_normal
from pocd.compute.ranks import whole
from pocd.compute.segments import measure
from pocd.compute.stages import BlockTensors, nonce_seeds
from pocd.compute.transforms import join_of
from pocd.compute.weights import drawn_weights
from pocd.protocol.errors import InputError, NonFiniteError, OutOfMemoryError
from pocd.protocol.schemes import RANDOM_HEAD_DIM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pocd.compute.model import Model
    from pocd.compute.segments import Standard
    from pocd.protocol.schemes import HeadSource, Scheme

ROUTE_BY_TOKEN = {"deepseek_v4"}  # types of models that the live network gives token ids beside the embeddings
UNDER_WAY = 2  # batches: while one is computed, the host prepares the next


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch that the device computes; see `BlockRun.start`."""

    _run: BlockRun
    _nonces: list[int]
    _values: torch.Tensor
    _done: torch.cuda.Event | None

    def distances(self) -> list[float]:
        """Wait for the batch, and return its distances in [0, 2], in the order of its nonces; see `values`."""
        found: list[float] = self.values().tolist()
        return found

    def values(self, *, gaps: bool = False) -> torch.Tensor:
        """Wait for the batch; returns distances, float32 [n], or vectors [n, VECTOR_SIZE], in the order of its nonces.

        Call this before the run ends: finding where NaN came from needs the block's weights.

        Args:
            gaps: Whether some vectors, but not all of the batch, may have NaN or infinity.

        Raises:
            NonFiniteError: The model gave NaN or infinity; the message names the nonces and the layer.
        """
        if self._done is not None:
            self._done.synchronize()
        values = self._values[: len(self._nonces)]
        good = (values >= 0) & (values <= 2) if values.dim() == 1 else values.isfinite().all(dim=-1)
        broken = [nonce for nonce, is_good in zip(self._nonces, good.tolist(), strict=True) if not is_good]
        may_pass = gaps and values.dim() > 1 and len(broken) < len(self._nonces)
        if broken and not may_pass:
            raise NonFiniteError(self._run.explain(broken))
        return values


@dataclass(frozen=True, slots=True)
class BlockRun:
    """A model prepared for one block hash and one public key; see `block_run`.

    Attributes:
        model: The model that runs.
        scheme: The scheme by which distances or vectors are computed.
        block_hash: The block's hash.
        public_key: The miner's public key.
        seq_len: Sequence length S, in positions.
        vectors: One unit vector per layer [layers, H], in the model's dtype.
        head: Output matrix [D, H], in any dtype; None where the scheme has none.
        target: Target vector, float32 [D], unit length; None without a head: each nonce then has its own, and D is H.
        standard: Mean and deviation used to standardise hidden states; None unless the scheme reads segments.
    """

    model: Model
    scheme: Scheme
    block_hash: str
    public_key: str
    seq_len: int
    vectors: torch.Tensor
    head: torch.Tensor | None
    target: torch.Tensor | None
    standard: Standard | None

    @property
    def dimension(self) -> int:
        """D, the dimension of the target."""
        return self.model.hidden_size if self.target is None else len(self.target)

    @property
    def block(self) -> BlockTensors:
        """The tensors that belong to the block."""
        return BlockTensors(self.vectors, self.head, self.target, self.standard)

    def execution(self, batch_size: int) -> Execution:
        """Return how batches of this size run: eagerly, compiled or captured, and why."""
        program = self.model.program
        if program is None or program.serves(self.scheme, self.seq_len, padded_rows(batch_size, self.seq_len)):
            return self.model.execution
        return Execution("eager", "only another scheme, sequence length or batch size was compiled", 0.0)

    def distances(self, nonces: Sequence[int], *, batch_size: int) -> list[float]:
        """Compute the distance of each nonce, in [0, 2]; see `values`."""
        assert self.scheme.output == "distance", f"scheme {self.scheme.name} gives no distances"
        found: list[float] = self.values(nonces, batch_size=batch_size).tolist()
        return found

    def values(self, nonces: Sequence[int], *, batch_size: int, gaps: bool = False) -> torch.Tensor:
        """Compute the distance or the vector of each nonce, with the next batch under way while one is waited for.

        Args:
            nonces: Distinct nonces that the scheme allows, in any order; at least one.
            batch_size: Nonces per forward pass.
            gaps: Whether some vectors, but not all of a batch, may have NaN or infinity.

        Returns:
            Distances, float32 [n], or vectors [n, VECTOR_SIZE], on the host, in the order of `nonces`.

        Raises:
            InputError: A nonce is out of range or repeated; nothing was computed.
            OutOfMemoryError: A batch of this size does not fit.
            NonFiniteError: The model gave NaN or infinity; the message names the nonces and the layer.
        """
        _check_nonces(nonces, self.scheme)
        found: list[torch.Tensor] = []
        under_way: deque[Pending] = deque()
        for start in range(0, len(nonces), batch_size):
            if len(under_way) == UNDER_WAY:
                found.append(under_way.popleft().values(gaps=gaps))
            under_way.append(self.start(nonces[start : start + batch_size], batch_size=batch_size))
        return torch.cat([*found, *(pending.values(gaps=gaps) for pending in under_way)])

    @torch.inference_mode()
    def start(self, nonces: Sequence[int], *, batch_size: int) -> Pending:
        """Start one batch on the device; on the CPU it is computed at once.

        Every batch has the same shape: a short one is padded by repeating its last nonce.
        So a distance does not depend on its neighbours, nor on how many there are.

        Args:
            nonces: Distinct nonces that the scheme allows, 1 to `batch_size` of them.
            batch_size: Nonces per forward pass.

        Raises:
            InputError: A nonce is out of range or repeated, or there are none or too many; nothing was computed.
            OutOfMemoryError: A batch of this size does not fit.
        """
        _check_nonces(nonces, self.scheme)
        if not 1 <= len(nonces) <= batch_size:
            raise InputError(f"a batch takes 1 to {batch_size} nonces, got {len(nonces)}")
        batch = list(nonces)
        padded = batch + batch[-1:] * (padded_rows(batch_size, self.seq_len) - len(batch))
        try:
            return Pending(self, batch, *_fetch(self._batch(padded)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise OutOfMemoryError(  # outside the handler, whose traceback would hold the memory
            f"a batch of {len(padded)} × {self.seq_len} positions does not fit into the memory of {self.model.device}; "
            "a smaller one may"
        )

    def _batch(self, nonces: Sequence[int]) -> torch.Tensor:
        """Compute the distances of one batch, float32 [B], or its vectors [B, VECTOR_SIZE], on the device."""
        program = self.model.program
        if program is not None and program.serves(self.scheme, self.seq_len, len(nonces)):
            return program(self.host_seeds(nonces), self.block)
        return self.measure(self.states(nonces), nonces)

    def inputs(self, nonces: Sequence[int]) -> torch.Tensor:
        """Draw random input embeddings [B, S, H] in the model's dtype."""
        shape = len(nonces), self.seq_len, self.model.hidden_size
        out = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        return stages.fill_inputs(out, self._seeds(nonces), self.scheme)

    def states(self, nonces: Sequence[int]) -> torch.Tensor:
        """Compute the hidden states that the scheme reads, normed: of the last position [B, H], or of all [B, S, H]."""
        return _states(self.model, self.scheme, self.vectors, self.inputs(nonces))

    def readout(self, states: torch.Tensor, nonces: Sequence[int]) -> torch.Tensor:
        """Return what the scheme reads [B, H] of hidden states: of the last position [B, H], or of all [B, S, H]."""
        return stages.find_readout(states, self._seeds(nonces), self.scheme, self.standard)

    def measure(self, states: torch.Tensor, nonces: Sequence[int]) -> torch.Tensor:
        """Compute distances, float32 [B], or vectors [B, VECTOR_SIZE], from hidden states as `readout` takes them."""
        return stages.measure_states(states, self._seeds(nonces), self.block, scheme=self.scheme)

    def differences(
        self, states: torch.Tensor, exact: torch.Tensor, nonces: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the results by two sets of states, and the expected squared error of a number; see `stages`."""
        return stages.find_differences(states, exact, self._seeds(nonces), self.block, scheme=self.scheme)

    def factors(self, states: torch.Tensor, nonces: Sequence[int]) -> torch.Tensor:
        """Return the factors whose product is the readout of all positions, float32 [B, SEGMENTS, H]."""
        assert self.standard is not None, "the scheme reads segments"
        return stages.find_factors(states, self._seeds(nonces), self.scheme, self.standard)

    def targets(self, nonces: Sequence[int]) -> torch.Tensor:
        """Draw the targets of single nonces for a scheme without a head: unit vectors, float64 [B, H]."""
        return stages.draw_targets(self._seeds(nonces), self.dimension)

    def hidden(self, readout: torch.Tensor, nonces: Sequence[int]) -> torch.Tensor:
        """Return the head's input, or without a head the vector compared with the target, float32 [B, H]."""
        return stages.find_hidden(readout, self._seeds(nonces), self.scheme)

    def distance(self, readout: torch.Tensor, nonces: Sequence[int]) -> torch.Tensor:
        """Compute distances, float32 [B], from a `readout` [B, H]."""
        return stages.find_distance(self.hidden(readout, nonces), self._seeds(nonces), self.block)

    def host_seeds(self, nonces: Sequence[int]) -> torch.Tensor:
        """Return the seeds of single nonces of this miner on the host, int32 bits [B, K]; see `stages`."""
        owner = f"{self.block_hash}_{self.public_key}"
        seeds = itertools.chain.from_iterable(nonce_seeds(self.scheme, owner, nonce) for nonce in nonces)
        return int32_bits(seeds).view(len(nonces), -1)

    def _seeds(self, nonces: Sequence[int]) -> torch.Tensor:
        return to_device(self.host_seeds(nonces), self.model.device)

    @torch.inference_mode()
    def explain(self, nonces: Sequence[int]) -> str:
        """Return where NaN or infinity first appears, by running the first of `nonces` again, layer by layer."""
        places: list[str] = []

        def observe(place: str, values: torch.Tensor) -> None:
            if not places and not values.isfinite().all():
                places.append(place)

        states = self.model.by_layers(
            self.inputs(nonces[:1]),
            join_of(self.scheme.layer_step, self.model.layers),
            self.vectors,
            all_positions=self.scheme.reads_all,
            observe=observe,
        )
        observe("the final norm", states)
        if self.standard is not None:
            observe("the means of the block's samples", self.standard.mean)
            observe("the product of the segments", self.readout(states, nonces[:1]))
        observe("what follows it", self.measure(states, nonces[:1]))
        where = f"first in {places[0]}" if places else "but not when it ran again, so the device may be faulty"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"model {self.model.name!r} in {dtype} gave NaN or infinity under scheme {self.scheme.name!r}, {where}; "
            f"{len(nonces)} nonces, the first is {nonces[0]}; try another dtype, or check the weights"
        )


def padded_rows(batch_size: int, seq_len: int) -> int:
    """Return the number of nonces that a batch is padded to: a multiple of four, where products have 5 to 11 rows.

    The CPU treats what is left of so few rows after division by four in another way, so that a nonce's
    rounding would depend on its place in the batch. The last layer's products have a row for each nonce,
    the others one for each position.
    """
    few = range(5, 12)
    is_affected = batch_size > 1 and (batch_size in few or batch_size * seq_len in few)
    return -(-batch_size // 4) * 4 if is_affected else batch_size


def _fetch(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Copy to the host without waiting; returns the copy, and the event after which it may be read (None: now)."""
    if values.device.type == "cpu":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # who waits for it sleeps, and leaves the core to others
    done.record(torch.cuda.current_stream(values.device))
    return copy, done


def _check_nonces(nonces: Sequence[int], scheme: Scheme) -> None:
    seen: set[int] = set()
    for nonce in nonces:
        if not 0 <= nonce <= scheme.largest_nonce:
            bits = scheme.largest_nonce.bit_length()
            raise InputError(f"nonce {nonce} is outside 0 to 2**{bits} - 1, which scheme {scheme.name!r} allows")
        if nonce in seen:
            raise InputError(f"nonce {nonce} is repeated")
        seen.add(nonce)


def _random_head(model: Model, block_hash: str) -> torch.Tensor:
    head = torch.empty(1, RANDOM_HEAD_DIM * model.hidden_size, device=model.device)
    seeds = seeds_tensor([f"{block_hash}_lm_head"], model.device)
    return fill_normal(head, seeds, scale=0.02).view(RANDOM_HEAD_DIM, model.hidden_size)


def _trained_head(model: Model, _block_hash: str) -> torch.Tensor:
    return whole(model.causal.get_output_embeddings().weight)


def _embedding(model: Model, _block_hash: str) -> torch.Tensor:
    return whole(model.causal.get_input_embeddings().weight)


def _no_head(_model: Model, _block_hash: str) -> None:
    return None


HEADS: dict[HeadSource, Callable[[Model, str], torch.Tensor | None]] = {
    "trained": _trained_head,
    "embedding": _embedding,
    "random": _random_head,
    "none": _no_head,
    "projection": _no_head,  # each nonce has its own
    "pick": _no_head,
}


def _states(model: Model, scheme: Scheme, vectors: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Compute the hidden states that the scheme reads, normed: of the last position [B, H], or of all [B, S, H]."""
    join = join_of(scheme.layer_step, model.layers)
    return model.decoder(embeddings, join, vectors, all_positions=scheme.reads_all)


def _standard(model: Model, scheme: Scheme, vectors: torch.Tensor, block_hash: str, seq_len: int) -> Standard | None:
    if scheme.reads != "segments":
        return None
    return measure(
        lambda embeddings: _states(model, scheme, vectors, embeddings),
        block_hash,
        seq_len,
        model.hidden_size,
        like=vectors,
    )


@contextmanager
def block_run(model: Model, scheme: Scheme, *, block_hash: str, public_key: str, seq_len: int) -> Iterator[BlockRun]:
    """Prepare `model` for one block hash: draw weights, layer vectors, head and target, and measure the `Standard`.

    When the context ends the model has its own weights again, bit for bit.

    Raises:
        InputError: The model or the scheme does not allow `seq_len`.
    """
    check_seq_len(seq_len, model.causal.config, model.name)
    if seq_len < scheme.least_seq_len:
        raise InputError(f"seq_len {seq_len} is too short for scheme {scheme.name!r}: {scheme.least_seq_len} or more")
    if scheme.weights != "trained" and torch.distributed.is_initialized():
        raise InputError(f"scheme {scheme.name!r} draws weights, which a model that is split over devices cannot have")
    if scheme.head == "pick" and model.causal.config.model_type in ROUTE_BY_TOKEN:
        raise InputError(
            f"model {model.name!r} routes by token ids, which pocd does not give it: under scheme {scheme.name!r} its "
            "results would not be those of the live network; choose another model or scheme"
        )
    fix_arithmetic()
    with drawn_weights(model.causal, scheme.weights, block_hash):
        yield _prepare(model, scheme, block_hash, public_key, seq_len)


@torch.inference_mode()  # as batches run: compiled code is made anew for tensors of the other kind
def _prepare(model: Model, scheme: Scheme, block_hash: str, public_key: str, seq_len: int) -> BlockRun:
    """Draw layer vectors, head and target, and measure the `Standard`; the model has the scheme's weights already."""
    head = HEADS[scheme.head](model, block_hash)
    layers = seeds_tensor([f"{block_hash}_layer_{i}_householder" for i in range(model.layers)], model.device)
    vectors = unit_normal(layers, model.hidden_size).to(model.dtype)
    target = seeds_tensor([f"{block_hash}_target"], model.device)[0]
    return BlockRun(
        model=model,
        scheme=scheme,
        block_hash=block_hash,
        public_key=public_key,
        seq_len=seq_len,
        vectors=vectors,
        head=head,
        target=None if head is None else unit_normal(target, len(head)),
        standard=_standard(model, scheme, vectors, block_hash, seq_len),
    )
