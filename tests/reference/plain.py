"""docs/protocol.md sections 2 to 4 once more, plainly: one nonce at a time, numpy and Python integers.

Written from the protocol's text and sharing no code with pocd, so that the two can be held against each other.
The decoders are in plain_families.py.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]
Step = Callable[[int, Array, Array], tuple[Array, Array]]  # layer, branch, residual to branch, residual
MASK = 0xFFFFFFFF
# How far two machines' numbers of `normal` may lie apart. Libraries hold their float32 log, sin and cos to 4 ulps
# (numpy's take another path on each generation of processors): at the largest radius, 6.8, that is 4e-6 for each.
NORMAL_ROUNDING = 1e-5
# How far two machines' distances of this file may lie apart: all else is float64, and what a last bit more or less
# of every drawn number changes is 1.3e-7 where it was measured, of four bits four times as much, and again for luck.
DISTANCE_ROUNDING = 2e-6


def seed32(text: str) -> int:
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:8], 16)


def hash32(i: int, seed: int) -> int:
    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & MASK

    k = (i * 0xCC9E2D51) & MASK
    k = (rotl(k, 15) * 0x1B873593) & MASK
    h = (rotl(seed ^ k, 13) * 5 + 0xE6546B64) & MASK
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & MASK
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def _hashes(seed: int, n: int) -> npt.NDArray[np.uint32]:
    """`hash32` of 0 … n - 1 at once, in numpy's wrapping uint32."""
    i = np.arange(n, dtype=np.uint32)

    def rotl(x: npt.NDArray[np.uint32], r: int) -> npt.NDArray[np.uint32]:
        return (x << np.uint32(r)) | (x >> np.uint32(32 - r))

    k = rotl(i * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    h = rotl(np.uint32(seed) ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def uniform(seed: int, n: int) -> npt.NDArray[np.float32]:
    return _hashes(seed, n).astype(np.float32) / np.float32(2**32)


def normal(seed: int, n: int) -> npt.NDArray[np.float32]:
    m = -(-n // 2)
    u = uniform(seed, 2 * m)
    u1, u2 = np.maximum(u[:m], np.float32(1e-10)), u[m:]
    radius = np.sqrt(np.float32(-2) * np.log(u1))
    angle = np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def unit(text: str, n: int) -> Array:
    v = normal(seed32(text), n).astype(np.float64)
    return v / np.linalg.norm(v)


def reflect(x: Array, v: Array) -> Array:
    return x - 2 * (x @ v)[..., None] * v


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder in float64, whose weights stay as they are.

    `run` takes weights, the input embeddings [S, H] and what happens to branch and residual after each layer;
    it gives all positions after the final norm.
    """

    weights: Weights  # by their names in transformers' named_parameters()
    run: Callable[[Weights, Array, Step], Array]
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"  # absent from `weights` where it is tied to the embedding

    @property
    def size(self) -> int:
        return int(self.weights[self.embedding].shape[1])

    @property
    def layers(self) -> int:
        return len({found[1] for name in self.weights if (found := LAYER.search(name))})

    @property
    def head_matrix(self) -> Array:
        return self.weights.get(self.head, self.weights[self.embedding])


@dataclass(frozen=True)
class Scheme:
    """One row of section 4's table; all that have a head have eight reflections per nonce."""

    weights: Literal["trained", "all drawn", "embedding drawn"]
    after_layer: Literal["none", "reflect", "normalise + reflect", "normalise, branch by 1/√L, reflect"]
    before_head: Literal["none", "normalise", "product of segments", "signed sum"]
    head: Literal["the model's", "the embedding", "random", "none", "projection", "pick"]


SCHEMES = {
    "trained": Scheme("trained", "reflect", "none", "the model's"),
    "random-weights": Scheme("all drawn", "none", "none", "the model's"),
    "random-embed": Scheme("embedding drawn", "reflect", "none", "the embedding"),
    "end-norm": Scheme("trained", "reflect", "normalise", "the model's"),
    "random-head": Scheme("trained", "reflect", "normalise", "random"),
    "hidden-householder": Scheme("trained", "none", "normalise", "the model's"),
    "poc2": Scheme("trained", "normalise + reflect", "normalise", "random"),
    "poc3": Scheme("trained", "normalise + reflect", "product of segments", "none"),
    "poc4": Scheme("trained", "normalise, branch by 1/√L, reflect", "signed sum", "projection"),
    "artifacts": Scheme("trained", "reflect", "normalise", "pick"),
    "artifacts-256": Scheme("trained", "reflect", "normalise", "pick"),
}
LAYER = re.compile(r"\b(?:layers|h)\.(\d+)\.")
NORM_WEIGHT = re.compile(r"(norm|ln_\w+)\.weight$")  # as the tested families name them


def draw(decoder: Decoder, names: list[str], block_hash: str) -> Decoder:
    """`decoder` with the parameters `names` drawn in float32; norm weights among them are 1."""
    weights = dict(decoder.weights)
    for name in names:
        old = weights[name]
        if NORM_WEIGHT.search(name):
            weights[name] = np.ones_like(old)
        else:
            drawn = np.float32(0.02) * normal(seed32(f"{block_hash}_{name}"), old.size)
            weights[name] = drawn.astype(np.float64).reshape(old.shape)
    return replace(decoder, weights=weights)


def after_layer(scheme: Scheme, block_hash: str, layers: int) -> Step:
    def step(layer: int, branch: Array, residual: Array) -> tuple[Array, Array]:
        if scheme.after_layer == "none":
            return branch, residual
        v = unit(f"{block_hash}_layer_{layer}_householder", branch.shape[-1])
        if scheme.after_layer.startswith("normalise"):
            branch = branch / (np.linalg.norm(branch, axis=-1, keepdims=True) + 1e-8)
            residual = residual / (np.linalg.norm(residual, axis=-1, keepdims=True) + 1e-8)
        if "1/√L" in scheme.after_layer:
            branch = branch / np.sqrt(layers)
        return reflect(branch, v), reflect(residual, v)

    return step


def embeddings(text: str, seq_len: int, size: int) -> Array:
    return normal(seed32(text), seq_len * size).astype(np.float64).reshape(seq_len, size)


def embeddings_by_256_bits(text: str, seq_len: int, size: int) -> Array:
    digest, count = hashlib.sha256(text.encode()).digest(), seq_len * size
    part = -(-count // 8)
    words = (int.from_bytes(digest[4 * k : 4 * k + 4], "big") for k in range(8))
    drawn = [normal(word, min(part, count - k * part)) for k, word in enumerate(words) if k * part < count]
    return np.concatenate(drawn).astype(np.float64).reshape(seq_len, size)


def picked(h: Array, owner: str, nonce: int) -> Array:
    """Twelve coordinates of h in the order of the live network's GPUs, rotated, of unit length."""
    scores = [hash32(d, seed32(f"{owner}_nonce_{nonce}_pick_12")) for d in range(len(h))]
    chosen = sorted(range(len(h)), key=lambda d: scores[d])[:12]
    order = [*sorted(chosen[:11]), chosen[11]]
    x = h[order]
    for j in range(11):
        x = reflect(x, unit(f"{owner}_nonce_{nonce}_haar_hh_12_{j}", 12))
    found: Array = x / np.linalg.norm(x)
    return found


def units(states: Array) -> Array:
    return np.stack([h / np.linalg.norm(h) for h in states])


@functools.lru_cache(maxsize=8)
def standard(decoder: Decoder, block_hash: str, seq_len: int, scheme: Scheme) -> tuple[Array, Array]:
    """Section 3.1, step 2: means [S, H] and deviation [H] over 128 inputs; kept, as they are those of every nonce."""
    step = after_layer(scheme, block_hash, decoder.layers)
    texts = [f"{block_hash}_sample_{k}_input" for k in range(128)]
    seen = [units(decoder.run(decoder.weights, embeddings(text, seq_len, decoder.size), step)) for text in texts]
    mean = np.mean(seen, axis=0)
    variance = ((np.array(seen) - mean) ** 2).mean(axis=(0, 1))
    return mean, np.maximum(np.sqrt(variance), 0.01 * np.sqrt(variance.mean()))


def segments_distance(decoder: Decoder, owner: str, nonce: int, step: Step, *, mean: Array, deviation: Array) -> float:
    """Section 3.1: all positions, in six segments, against a target of the nonce's own."""
    seq_len = len(mean)
    a = units(decoder.run(decoder.weights, embeddings(f"{owner}_nonce{nonce}", seq_len, decoder.size), step))
    seed = seed32(f"{owner}_nonce_{nonce}_signs")
    y = np.ones(decoder.size)
    for g in range(6):
        x = np.zeros(decoder.size)
        for s in range(g * seq_len // 6, (g + 1) * seq_len // 6):
            x += (1 if hash32(s, seed) < 2**31 else -1) * (a[s] - mean[s])
        x /= deviation
        y *= x / np.linalg.norm(x)
    return float(np.linalg.norm(y / np.linalg.norm(y) - unit(f"{owner}_nonce_{nonce}_target", decoder.size)))


def distance(
    decoder: Decoder, *, block_hash: str, public_key: str, nonce: int, seq_len: int, scheme: str = "poc2"
) -> float:
    """The distance of one nonce, in float64 but for the generator."""
    choices = SCHEMES[scheme]
    if choices.weights == "all drawn":
        decoder = draw(decoder, list(decoder.weights), block_hash)
    elif choices.weights == "embedding drawn":
        decoder = draw(decoder, [decoder.embedding], block_hash)

    size, owner, step = decoder.size, f"{block_hash}_{public_key}", after_layer(choices, block_hash, decoder.layers)
    if choices.head == "none":
        mean, deviation = standard(decoder, block_hash, seq_len, choices)
        return segments_distance(decoder, owner, nonce, step, mean=mean, deviation=deviation)
    h = decoder.run(decoder.weights, embeddings(f"{owner}_nonce{nonce}", seq_len, size), step)[-1]
    for r in range(8):
        h = reflect(h, unit(f"{owner}_nonce_{nonce}_hidden_r{r}", size))
    if choices.before_head == "normalise":
        h = h / np.linalg.norm(h)

    if choices.head == "random":
        flat = normal(seed32(f"{block_hash}_lm_head"), size * 8192)
        head = flat.astype(np.float64).reshape(8192, size) * 0.02
    elif choices.head == "the embedding":
        head = decoder.weights[decoder.embedding]
    else:
        head = decoder.head_matrix
    z = head @ h
    return float(np.linalg.norm(z / np.linalg.norm(z) - unit(f"{block_hash}_target", len(head))))


def vector(
    decoder: Decoder, *, block_hash: str, public_key: str, nonce: int, seq_len: int, scheme: str = "poc4"
) -> Array:
    """The twelve numbers of one nonce (sections 3.2, 3.3) before they are rounded, in float64 but for the generator."""
    owner, step = f"{block_hash}_{public_key}", after_layer(SCHEMES[scheme], block_hash, decoder.layers)
    if SCHEMES[scheme].head == "pick":
        draw_inputs = embeddings_by_256_bits if scheme == "artifacts-256" else embeddings
        inputs = draw_inputs(f"{owner}_nonce{nonce}", seq_len, decoder.size)
        return picked(units(decoder.run(decoder.weights, inputs, step))[-1], owner, nonce)
    a = units(decoder.run(decoder.weights, embeddings(f"{owner}_nonce{nonce}", seq_len, decoder.size), step))
    seed = seed32(f"{owner}_nonce_{nonce}_signs")
    x = np.zeros(decoder.size)
    for s in range(seq_len):
        x += a[s] if hash32(s, seed) < 2**31 else -a[s]
    x /= np.sqrt(seq_len)
    flat = normal(seed32(f"{owner}_nonce_{nonce}_projection"), 12 * decoder.size)
    found: Array = flat.astype(np.float64).reshape(12, decoder.size) @ x
    return found


def result(
    decoder: Decoder, *, block_hash: str, public_key: str, nonce: int, seq_len: int, scheme: str
) -> float | list[float]:
    """The distance or the vector of one nonce."""
    function = vector if SCHEMES[scheme].head in {"projection", "pick"} else distance
    found = function(decoder, block_hash=block_hash, public_key=public_key, nonce=nonce, seq_len=seq_len, scheme=scheme)
    return found if isinstance(found, float) else found.tolist()
