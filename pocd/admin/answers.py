"""What the API answers, as models: for the documentation, and for the tests that hold real answers to them.

The handlers answer plain dicts. A field that may be null says so; every other one is always there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from pocd.mining.phases import Mode, State
from pocd.pool.causes import Cause


class Round(BaseModel):
    """The active round, and how it goes. All that it is made of is in its id."""

    id: str = Field(description="Hash of the seven fields that make a round.")
    block_hash: str = Field(description="As the node wrote it.")
    block_height: int
    public_key: str = Field(description="The miner's key.")
    r_target: float = Field(description="A nonce is valid when its distance is below this.")
    scheme: str = Field(description="How distances are computed.")
    model: str = Field(description="As configured.")
    seq_len: int = Field(description="Sequence length in positions.")
    node_id: int = Field(description="Whose share of the nonces is checked: node_id + node_count · x.")
    node_count: int
    checked: int = Field(description="Nonces checked in this round, also before a restart.")
    valid: int = Field(description="Of these, the valid ones.")
    expected_valid_rate: float | None = Field(description="Share of valid nonces by theory; null until a worker began.")
    observed_valid_rate: float | None = Field(description="`valid / checked`; null while nothing is checked.")


class Asked(BaseModel):
    """The round that was asked for last, and the terms that batches are held to."""

    block_hash: str
    block_height: int
    fraud_threshold: float
    callback: str | None = Field(description="The receiver that gets its batches beside the configured ones.")


class Control(BaseModel):
    """Whose rounds are mined."""

    mode: Mode = Field(description="FOLLOWING: the chain decides. The others: what the API asked for last.")
    asked: Asked | None = Field(description="Null while the chain decides, or a stop came before any init.")


class Node(BaseModel):
    """Who this daemon is: it checks the nonces `node_id + node_count · x`."""

    public_key: str
    node_id: int
    node_count: int


class Funnel(BaseModel):
    """Nonces since the store was made; each number is on disk."""

    checked: int = Field(description="Computed and committed.")
    valid: int = Field(description="Found valid and committed.")
    stored: int = Field(description="In a batch with its final bytes.")
    delivered: int = Field(description="Accepted by every receiver.")
    dead: int = Field(description="Refused for good by a receiver, now.")
    expired: int = Field(description="Became too old for a receiver, now.")
    withdrawn: int = Field(description="Of replaced blocks and not sent, now.")
    purged: int = Field(description="Given up by an operator.")


class Rates(BaseModel):
    """Nonces per second over the last minute and the last 15."""

    checked_per_second_1m: float
    checked_per_second_15m: float
    valid_per_second_1m: float
    valid_per_second_15m: float


class Chain(BaseModel):
    """The newest block that the chain's node told. All null until one did."""

    chain_id: str | None
    height: int | None
    hash: str | None
    block_time: str | None = Field(description="ISO 8601, by the chain.")
    problem: str | None = Field(description="Why the chain is not followed as it should; null when it is.")


class Worker(BaseModel):
    """The processes that compute, as one, while none has had a model ready."""

    ready: bool = Field(description="Whether one of them has a model ready.")
    pid: int | None = Field(description="Of the first one.")
    stage: str | None = Field(description="What the first one does until it is ready.")
    restarts: int = Field(description="How often they ended and were started again.")
    last_error: str | None = Field(description="Why it ended last.")
    batch_size: int = Field(description="Nonces per forward pass.")
    refused_batches: int = Field(description="Batches without a result: the model gave NaN or infinity.")
    last_refusal: str | None = Field(description="Where that began.")


class ReadyWorker(Worker):
    """The same, once one of them had a model ready; what they run is told by the first one."""

    model: str
    fingerprint: str = Field(description="Of the model's weights.")
    dtype: str
    device: str
    hidden_size: int
    layers: int
    longest_seq_len: int = Field(description="That the model's positions allow.")
    decoder: str = Field(description='"flat", or "layers" for a model that runs by transformers\' own layers.')
    execution: str = Field(description='"eager", "compiled", or "captured": compiled, and one CUDA graph a batch.')
    execution_reason: str = Field(description="Why so.")
    load_seconds: float = Field(description="What loading the model took.")
    compile_seconds: float = Field(description="What compiling it took.")
    torch: str = Field(description="Its version.")


class Reading(BaseModel):
    """How a card is; null what it does not tell."""

    temperature: float | None = Field(description="Degrees Celsius.")
    power: float | None = Field(description="Watts.")
    memory_used: int | None = Field(description="Bytes, by all processes.")
    memory_total: int | None = Field(description="Bytes.")
    utilization: float | None = Field(description="The share of the last second or so in which it computed.")


class Card(BaseModel):
    """A GPU."""

    device: str
    name: str
    uuid: str = Field(description="Its identity, as the driver knows it.")
    reading: Reading | None = Field(description="How it is; null while it cannot be read.")


class OneWorker(BaseModel):
    """One of the workers: a process, or a rank for each device of a model that is split."""

    number: int
    device: str = Field(description='Of each rank, joined by "+".')
    ready: bool
    stage: str | None = Field(description="What it does until it is ready.")
    pids: list[int] = Field(description="Of its processes.")
    restarts: int = Field(description="How often it ended and was started again.")
    causes: dict[Cause, int] = Field(description="Why, and how often.")
    last_error: str | None = Field(description="Why it ended last.")
    alarm: str | None = Field(description="That it fails again and again; it may be left out for a while.")
    batch_size: int = Field(description="Nonces per forward pass.")
    execution: str | None = Field(description='"eager", "compiled" or "captured", once it is known.')
    execution_reason: str | None = Field(description="Why so.")
    computed_per_second_1m: float = Field(description="Distances that it computed for what is mined.")
    computed_per_second_15m: float
    cards: list[Card] = Field(description="Those of its devices that are GPUs, once they are known.")


class Receiver(BaseModel):
    """A receiver's queue and how it answers. Delivered and purged ones are counted for ever, the others are now."""

    name: str
    url: str | None = Field(description="Without what may be secret; null when it is no longer configured.")
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
    last_error: str | None = Field(description="What the last attempt failed with; null when it went well.")
    failures_in_a_row: int
    next_attempt_seconds: float | None = Field(description="Until it is asked again; null while nothing fails.")
    parked: bool = Field(description="Whether it wants nothing any more (HTTP 410).")
    alarm: str | None = Field(description="What only a person can mend.")


class Problem(BaseModel):
    """What is wrong, and with which part."""

    part: str
    reason: str


class Status(BaseModel):
    """Everything that the daemon knows of itself. The first eight fields tell of the active round."""

    state: State = Field(
        description="LOADING: no model is ready. IDLE: nothing is to be mined now. GENERATING: nonces are being "
        "checked. VALIDATING: the device is left to validations. STOPPED: until an init or a resume."
    )
    status: State = Field(description="The same, as an earlier API called it.")
    is_model_initialized: bool = Field(description="Whether a model is ready, likewise.")
    valid_nonces: list[int] = Field(description="The latest 20.")
    valid_distances: list[float] = Field(description="One for each of them.")
    total_checked: int
    total_valid: int
    elapsed_seconds: float = Field(description="Since the round began in this process.")
    rate_per_second: float = Field(description="Nonces checked per second of that.")
    r_target: float
    round: Round | None = Field(description="Null while no round is active.")
    control: Control
    node: Node
    funnel: Funnel
    rates: Rates
    chain: Chain
    worker: ReadyWorker | Worker = Field(description="All workers as one.")
    workers: list[OneWorker]
    receivers: list[Receiver]
    problems: list[Problem] = Field(description="What keeps the daemon from mining as it should.")
    alarms: list[Problem] = Field(description="What only a person can mend though mining goes on.")
    version: str
    uptime_seconds: float


class Done(BaseModel):
    """A call was done, and what the daemon does now."""

    status: Literal["OK"]
    state: State
    ignored: list[str] = Field(description="Fields of the body that were not used.")
    pow_status: Status = Field(description="As GET /api/v1/pow/status answers.")


class Verdict(BaseModel):
    """A ValidatedBatch: what was recomputed, and whether it is fraud (docs/protocol.md section 5, "Verdict").

    The four lists stand beside each other: the batch's entries as they came, repeats included; of a sample, the
    entries of its nonces.
    """

    public_key: str
    block_hash: str
    block_height: int
    node_id: int
    nonces: list[int]
    received_dist: list[float | None] = Field(description="As claimed; null where that is no finite number.")
    dist: list[float] = Field(description="As recomputed.")
    valid: list[bool] = Field(description="Whether each nonce is valid.")
    r_target: float
    fraud_threshold: float
    n_invalid: int = Field(description="Recomputed distinct nonces that are not valid.")
    probability_honest: float = Field(description="That an honest miner has as many, or more.")
    fraud_detected: bool = Field(description="Whether that is below fraud_threshold.")
    n: int = Field(description="Distinct nonces that were recomputed.")
    n_batch: int = Field(description="Distinct nonces of the whole batch.")
    impossible_claims: int = Field(description="Of the whole batch: claims that are no distance below r_target.")
    duplicates: int = Field(description="Of the whole batch: entries that repeat a nonce. A nonce counts once.")
    non_finite: int = Field(description="Of the whole batch: claims that are no finite number.")
    density: float = Field(description="Share of the node's nonces, up to the largest, that the batch holds.")
    sparse: bool = Field(description="Whether that is 1% or less. Suspicious, but no fraud by itself.")
    shifted: int = Field(description="Recomputed nonces whose claim is further than `tolerance` from the truth.")
    largest_difference: float | None = Field(description="Between claimed and recomputed; null without a finite claim.")
    tolerance: float = Field(description="How far above r_target a recomputed distance still counts as valid.")
    mismatch: float = Field(description="The probability that an honest miner's nonce recomputes as invalid.")
    scheme: str
    model: str
    model_fingerprint: str = Field(description="Of the weights that distances were recomputed with.")
    dtype: str = Field(description="The precision that they were recomputed in.")
    seq_len: int
    node_count: int
    sample: int | None = Field(description="How many nonces were to be drawn; null for all.")
    seed: str | None = Field(description="What they were drawn by.")
    suspicions: list[str] = Field(description="Words for what is odd, fraud or not.")
    batch_id: str = Field(description="Of this verdict: the same content has the same.")


class Waiting(BaseModel):
    """A validation that is not done yet: ask for it by its id."""

    id: str
    state: Literal["pending"]


class Stopping(BaseModel):
    """The daemon is about to end."""

    status: Literal["stopping"]


class Alive(BaseModel):
    """The process lives."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether it mines as it should."""

    ready: bool
    problems: list[Problem] = Field(description="Empty when it does.")


class Letter(BaseModel):
    """One batch for one receiver. Times in seconds since the epoch."""

    receiver: str
    sequence: int = Field(description="Its place in the receiver's queue.")
    id: str = Field(description="The batch's webhook-id.")
    kind: str = Field(description='"generated": proofs of this daemon.')
    state: Literal["pending", "delivered", "dead", "expired", "withdrawn", "purged"]
    nonces: int
    attempts: int
    reason: str | None = Field(description="Why it failed last, or was set aside.")
    created_at: float = Field(description="When the batch was formed.")
    changed_at: float = Field(description="When it entered its state.")
    age_seconds: float


class Page(BaseModel):
    """A page of the outbox."""

    receivers: list[Receiver]
    batches: list[Letter]
    next: str | None = Field(description="Give this as `after` for the next page; null on the last one.")


class Shown(BaseModel):
    """One batch."""

    id: str
    deliveries: list[Letter] = Field(description="What became of it for each receiver.")
    batch: dict[str, Any] = Field(description="Its content, as every receiver gets it.")


class Queued(BaseModel):
    """What is sent again."""

    queued: int = Field(description="Deliveries, one per batch and receiver.")
    receivers: list[str] = Field(description="Who is asked at once.")


class Purged(BaseModel):
    """What was given up."""

    purged: int = Field(description="Deliveries, one per batch and receiver.")
    receivers: list[str] = Field(description="Whose they were.")
