"""Models of the API's answers: what the handlers answer with, and what the documentation shows.

Fields are answered in their order here. A field that may be null says so; every other one is always there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from pocd.admin.chain import ChainStatus
from pocd.config.roles import Role
from pocd.mining.phases import DaemonState, Mode
from pocd.pool.causes import Cause


class RoundStatus(BaseModel):
    """The active round and its progress. The id is a hash of the seven fields that define the round."""

    block_hash: str = Field(description="Block hash exactly as the chain's node wrote it.")
    block_height: int
    public_key: str = Field(description="The miner's public key.")
    r_target: float | None = Field(
        description="A nonce is valid when its distance is below this; null with a scheme of vectors, where every "
        "nonce with a finite vector is valid."
    )
    scheme: str = Field(description="Name of the scheme by which distances or vectors are computed.")
    model: str = Field(description="Name of the model, as configured.")
    seq_len: int = Field(description="Sequence length in positions.")
    id: str = Field(description="Hash of block_hash, block_height, public_key, r_target, scheme, model and seq_len.")
    node_id: int = Field(description="Index of the node; it checks the nonces node_id + node_count · x.")
    node_count: int
    checked: int = Field(description="Nonces checked in this round, also before a restart.")
    valid: int = Field(description="Valid nonces among those checked.")
    expected_valid_rate: float | None = Field(description="Share of valid nonces by theory; null until a worker began.")
    observed_valid_rate: float | None = Field(description="`valid / checked`; null while nothing is checked.")


class RequestedRound(BaseModel):
    """The round that was requested last through the API, and the terms that batches are judged by."""

    block_hash: str
    block_height: int
    fraud_threshold: float
    callback: str | None = Field(
        description="Name of the receiver that gets the round's batches beside the configured ones."
    )


class ControlStatus(BaseModel):
    """Who decides which round is mined: the chain or the API."""

    mode: Mode = Field(description="FOLLOWING: the chain decides. Any other mode: the last call of the API decides.")
    asked: RequestedRound | None = Field(
        description="Null while the chain decides, and after a stop that came before any init."
    )


class NodeStatus(BaseModel):
    """Who this daemon is: it checks the nonces `node_id + node_count · x`."""

    role: Role = Field(
        description="miner: mines the rounds that it reads from a chain. proof engine: mines those that an "
        "orchestrator gives it."
    )
    public_key: str | None = Field(description="The miner's public key; null where each round brings its own.")
    node_id: int
    node_count: int
    models: list[str] = Field(
        description="Names of the model: those that an orchestrator may call it by, or the one that the chain has."
    )


class Funnel(BaseModel):
    """Nonces since the store was made; each number is on disk."""

    checked: int = Field(description="Nonces that were computed and committed.")
    valid: int = Field(
        description="Nonces that were found valid and committed, by a distance below r_target or a finite vector."
    )
    stored: int = Field(description="Valid nonces in a batch with its final bytes.")
    delivered: int = Field(description="Valid nonces that every receiver accepted.")
    dead: int = Field(description="Valid nonces in batches that a receiver refused for good, now.")
    expired: int = Field(description="Valid nonces in batches that became too old for a receiver, now.")
    withdrawn: int = Field(description="Valid nonces not sent because their block was replaced, now.")
    purged: int = Field(description="Valid nonces in batches that an operator gave up.")


class ValidationCounts(BaseModel):
    """Validations that ended since the daemon's start, by their verdict."""

    honest: int = 0
    fraud: int = 0
    undecidable: int = 0
    failed: int = Field(default=0, description="Validations without a verdict: the nonces could not be recomputed.")
    not_paired: int = Field(
        default=0,
        description="Jobs of an orchestrator whose artifacts were not judged by their differences too, since "
        "`validation.max_queued` validations waited or the store could not be written.",
    )


class Rates(BaseModel):
    """Nonces per second over the last minute and the last 15."""

    checked_per_second_1m: float
    checked_per_second_15m: float
    valid_per_second_1m: float
    valid_per_second_15m: float


class WorkersStatus(BaseModel):
    """All workers together, until one of them has had a model ready."""

    ready: bool = Field(description="Whether at least one worker has a model ready.")
    stage: str | None = Field(
        description="Step of the first worker's start, such as loading the model; null once it is ready."
    )
    pid: int | None = Field(description="Process id of the first worker; null while it does not run.")
    restarts: int = Field(description="How often a worker ended and was started again, over all workers.")
    last_error: str | None = Field(description="Why a worker ended last; null if none did.")
    batch_size: int = Field(description="Nonces per forward pass.")
    refused_batches: int = Field(description="Batches without a result: the model gave NaN or infinity.")
    non_finite_nonces: int = Field(
        description="Nonces without a result since the daemon's start: all of refused batches, and those whose vectors "
        "have NaN or infinity."
    )
    last_refusal: str | None = Field(
        description="Where NaN or infinity first appeared in the last batch without a result."
    )


class ModelStatus(BaseModel):
    """What the workers run, as the first of them reported it when it was ready."""

    model: str
    fingerprint: str = Field(description="Fingerprint of the model's weights and configuration: v2- and 32 hex digits.")
    dtype: str
    device: str
    hidden_size: int
    layers: int
    decoder: str = Field(description='"flat", or "layers" for a model that runs by transformers\' own layers.')
    decoder_reason: str = Field(description="Why the layers are run so.")
    execution: str = Field(description='"eager", "compiled", or "captured": compiled, and one CUDA graph a batch.')
    execution_reason: str = Field(description="Why this execution path was chosen.")
    load_seconds: float = Field(description="Seconds that loading the model took.")
    compile_seconds: float = Field(description="Seconds that compiling the model took.")
    batch_size: int = Field(description="Nonces per forward pass.")
    longest_seq_len: int = Field(description="Largest sequence length, in positions, that the model allows.")
    torch: str = Field(description="Version of torch.")


class ReadyWorkersStatus(WorkersStatus, ModelStatus):  # pydantic puts the fields of the last base first
    """All workers together, once one of them has had a model ready, with what they run."""


class SensorValues(BaseModel):
    """Sensor values of a GPU; null where the driver reports none."""

    temperature: float | None = Field(description="Temperature in degrees Celsius.")
    power: float | None = Field(description="Power draw in watts.")
    memory_used: int | None = Field(description="GPU memory in use by all processes, in bytes.")
    memory_total: int | None = Field(description="GPU memory in all, in bytes.")
    utilization: float | None = Field(description="Share of the last second or so in which the GPU computed, 0 to 1.")


class CardStatus(BaseModel):
    """A GPU that a worker uses."""

    device: str
    name: str
    uuid: str = Field(description="The GPU's UUID, as the driver reports it.")
    reading: SensorValues | None = Field(description="Sensor values; null while they cannot be read.")


class RoundingStatus(BaseModel):
    """How far a worker's results lie from those of float32 arithmetic on the same weights, measured at its start."""

    error: float | None = Field(
        description="Root mean square of the differences, as a share of the results' scatter; null where they do not "
        "scatter: all distances are the same, or all vectors are 0."
    )
    flipped: float | None = Field(
        description="Share of an honest miner's valid nonces that another honest host would find invalid; null for "
        "schemes of vectors, with which every nonce counts, and where results do not scatter."
    )
    own_share: float = Field(
        description="Share of the squares of the model's outputs that is the nonce's own; near 0 all nonces have one."
    )
    turned: float | None = Field(
        description="Share of nonces of which a mixture's router chooses other experts on a host that rounds "
        "otherwise; null for models without such a router."
    )
    alarm: str | None = Field(description="Why a person should act; null while results are worth something.")


class WorkerStatus(BaseModel):
    """One worker: a process, or several, one per device, where the model is split over devices."""

    number: int
    device: str = Field(description='Device of the worker; of a split model the devices of all ranks, joined by "+".')
    ready: bool
    stage: str | None = Field(
        description="Step of the worker's start, such as loading the model; null once it is ready."
    )
    node: str | None = Field(
        description='Machine of a Ray cluster that runs the worker, several joined by "+"; null on this one.'
    )
    address: str | None = Field(description='Address of that machine, several joined by "+"; null on this one.')
    pids: list[int] = Field(description="Process ids of all ranks of the worker, on its machine.")
    restarts: int = Field(description="How often the worker ended and was started again.")
    causes: dict[Cause, int] = Field(description="How often the worker ended, by cause.")
    last_error: str | None = Field(description="Why the worker ended last; null if it never did.")
    alarm: str | None = Field(description="Why a person should look: it fails repeatedly, or runs eagerly on a GPU.")
    batch_size: int = Field(description="Nonces per forward pass.")
    execution: str | None = Field(description='"eager", "compiled" or "captured", once it is known.')
    execution_reason: str | None = Field(description="Why this execution path was chosen.")
    computed_per_second_1m: float = Field(description="Nonces computed for mining per second.")
    computed_per_second_15m: float
    cards: list[CardStatus] = Field(description="GPUs of the worker, once they are known.")
    rounding: RoundingStatus | None = Field(
        description="Effect of rounding on the worker's results; null until it is measured, and where it cannot be."
    )


class MachineStatus(BaseModel):
    """A machine of a Ray cluster on which workers of this daemon run now, or several that run workers together."""

    node: str = Field(description='Name of the machine; several joined by "+".')
    address: str = Field(description='Address of the machine; several joined by "+".')
    workers: int = Field(description="Workers that run there.")
    ready: int = Field(description="Workers among them that have a model ready.")
    computed_per_second_1m: float = Field(description="Nonces that these workers computed for mining per second.")
    computed_per_second_15m: float


class ReceiverStatus(BaseModel):
    """A receiver's queue and how it answers. Delivered and purged ones are counted for ever, the others are now."""

    name: str
    url: str | None = Field(description="URL with secrets masked; null when the receiver is no longer configured.")
    pending_batches: int
    pending_nonces: int
    delivered_batches: int
    delivered_nonces: int
    dead_batches: int
    dead_nonces: int
    expired_batches: int
    expired_nonces: int
    withdrawn_batches: int
    withdrawn_nonces: int
    purged_batches: int
    purged_nonces: int
    last_error: str | None = Field(description="Error of the last attempt; null when it succeeded.")
    failures_in_a_row: int
    next_attempt_seconds: float | None = Field(description="Seconds until the next attempt; null while nothing fails.")
    parked: bool = Field(description="Whether the receiver asked for no more batches (HTTP 410).")
    alarm: str | None = Field(
        description="Problem that only a person can solve, such as a wrong URL; null when there is none."
    )


class Problem(BaseModel):
    """A problem, and the part of the daemon that has it."""

    part: str
    reason: str


class Status(BaseModel):
    """Everything that the daemon reports of itself. The fields before `round` are those of an earlier API."""

    state: DaemonState = Field(
        description="LOADING: no model is ready. IDLE: nothing is to be mined now. GENERATING: nonces are being "
        "checked. VALIDATING: the device is left to validations. STOPPED: until an init or a resume."
    )
    status: DaemonState = Field(description="Equal to `state`, under the name of an earlier API.")
    is_model_initialized: bool = Field(description="Whether a model is ready, under the name of an earlier API.")
    valid_nonces: list[int] = Field(description="Latest valid nonces of the active round, at most 20.")
    valid_distances: list[float] = Field(
        description="Distances of `valid_nonces`, in the same order; empty with a scheme of vectors."
    )
    total_checked: int
    total_valid: int
    elapsed_seconds: float = Field(description="Seconds since this process began the active round.")
    rate_per_second: float = Field(description="Nonces checked per second, on average over `elapsed_seconds`.")
    r_target: float | None = Field(description="Null with a scheme of vectors.")
    round: RoundStatus | None = Field(description="Null while no round is active.")
    control: ControlStatus
    node: NodeStatus
    funnel: Funnel
    rates: Rates
    validations: ValidationCounts
    chain: ChainStatus
    worker: ReadyWorkersStatus | WorkersStatus = Field(description="All workers together.")
    workers: list[WorkerStatus]
    machines: list[MachineStatus] = Field(
        description="Machines of a Ray cluster on which workers run, by name; empty where all run on this one."
    )
    receivers: list[ReceiverStatus]
    problems: list[Problem] = Field(description="Problems that keep the daemon from mining; empty when there is none.")
    alarms: list[Problem] = Field(
        description="Problems that only a person can solve, though mining goes on; empty when there is none."
    )
    version: str
    uptime_seconds: float


class Done(BaseModel):
    """The call took effect; the daemon's state after it."""

    status: Literal["OK"]
    state: DaemonState
    ignored: list[str] = Field(description="Fields of the body that were not used.")
    pow_status: Status = Field(description="Status after the call, as GET /api/v1/pow/status answers it.")


class Stopping(BaseModel):
    """The daemon is about to end."""

    status: Literal["stopping"]


class Alive(BaseModel):
    """The process is alive."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether the daemon mines as it should."""

    ready: bool
    problems: list[Problem] = Field(description="Problems that keep the daemon from mining; empty when it is ready.")


class DeliveryStatus(BaseModel):
    """Delivery of one batch to one receiver. Times in seconds since the epoch."""

    receiver: str
    sequence: int = Field(description="Position of the batch in the receiver's queue.")
    id: str = Field(description="The batch's webhook-id.")
    kind: str = Field(
        description='"generated": proofs of this daemon; "validated": verdicts on batches that were validated.'
    )
    state: Literal["pending", "delivered", "dead", "expired", "withdrawn", "purged"]
    nonces: int
    attempts: int
    reason: str | None = Field(
        description="Why the last attempt failed, or why the batch is no longer sent; null without a reason."
    )
    created_at: float = Field(description="When the batch was formed.")
    changed_at: float = Field(description="When the delivery entered its state.")
    age_seconds: float


class Page(BaseModel):
    """A page of the outbox."""

    receivers: list[ReceiverStatus]
    batches: list[DeliveryStatus]
    next: str | None = Field(description="Value of `after` for the next page; null on the last page.")


class Shown(BaseModel):
    """One batch, and its delivery to each receiver."""

    id: str
    deliveries: list[DeliveryStatus] = Field(description="Delivery of the batch to each receiver.")
    batch: dict[str, Any] = Field(description="Content of the batch, as every receiver gets it.")


class Queued(BaseModel):
    """Deliveries that were queued again."""

    queued: int = Field(description="Deliveries queued again, one per batch and receiver.")
    complete: bool = Field(description="Whether none is left; else ask again for the rest.")
    receivers: list[str] = Field(description="Names of the receivers that are tried at once.")


class BackedUp(BaseModel):
    """A copy of the store."""

    file: str = Field(description="Path of the copy on the daemon's host.")
    complete: bool = Field(description="True once the copy is on disk; while false, ask again with the same path.")
    bytes: int | None = Field(description="Size of the copy; null until it is complete.")


class Purged(BaseModel):
    """Deliveries that were given up for good."""

    purged: int = Field(description="Deliveries given up, one per batch and receiver.")
    complete: bool = Field(description="Whether none is left; else ask again for the rest.")
    receivers: list[str] = Field(description="Names of the receivers that will not get these batches.")
