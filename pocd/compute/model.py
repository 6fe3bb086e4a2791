"""Load a causal decoder by transformers, and find out how its layers can be transformed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from pocd.compute.arithmetic import fix_arithmetic
from pocd.compute.checkpoint import check_folder, fetched, read_config
from pocd.compute.experts import compute_in_tiles
from pocd.compute.fingerprint import module_fingerprint, stored_fingerprint
from pocd.compute.flat import FlatDecoder, can_flatten, flatten
from pocd.compute.layers import NORMS, LayerDecoder, find_forms
from pocd.compute.loaded import check_loaded
from pocd.compute.loading import load_causal
from pocd.compute.memory import is_fault, is_out_of_memory
from pocd.compute.random import normal, seeds_tensor
from pocd.compute.ranks import check_split, split_as_planned
from pocd.compute.routers import even_routers
from pocd.compute.stored import read_headers
from pocd.compute.transforms import join_of
from pocd.compute.ways import matrices
from pocd.process import may_pass
from pocd.protocol.errors import ComputeError, DeviceError, InputError, MemoryShortError, ModelError
from pocd.protocol.names import check_device, check_dtype, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pocd.compute.stages import BlockTensors
    from pocd.compute.wide import WideDecoder
    from pocd.protocol.schemes import Scheme

LARGEST_SEQ_LEN = 2**20  # of a model that has no limit
PROBE_LENGTH = 5  # positions that a model is tried out with when it is loaded
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}  # of ‖h‖


@dataclass(frozen=True, slots=True)
class Execution:
    """The way in which a model's batches run.

    Attributes:
        path: "eager": one kernel after the other; "compiled"; or "captured": compiled, and one CUDA graph.
        reason: Why this path was chosen, for people.
        seconds: Seconds that compiling and capturing took, from a cache or not.
    """

    path: Literal["eager", "compiled", "captured"]
    reason: str
    seconds: float


NOT_COMPILED = Execution("eager", "compiled code was not requested", 0.0)


class Program(Protocol):
    """Compiled code for batches of one scheme and shape."""

    def serves(self, scheme: Scheme, seq_len: int, rows: int) -> bool:
        """Tell whether the code was compiled for this scheme, sequence length and padded batch size."""

    def __call__(self, seeds: torch.Tensor, block: BlockTensors) -> torch.Tensor:
        """Compute distances, float32 [B], or vectors [B, VECTOR_SIZE], on the device, from seeds on the host.

        The result holds until the next call, in the order of the current stream.
        """


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded decoder, ready to be fed embeddings.

    Attributes:
        name: Name of the model, as configured.
        fingerprint: Fingerprint of the weights, see `fingerprint.py`.
        causal: The transformers model.
        decoder: Computes hidden states of the last position or of all from embeddings, in the fastest way that the
            model's class allows.
        decoder_reason: Why that is it.
        by_layers: The decoder run through transformers' own layers, as every model can be.
        hidden_size: Hidden size H.
        dtype: Precision of weights and activations.
        device: Device of the weights.
        execution: Execution path in the shape that `program` serves, or in all shapes where that is None.
        program: Compiled code for one shape; every other shape runs eagerly.
    """

    name: str
    fingerprint: str
    causal: Any
    decoder: FlatDecoder | LayerDecoder | WideDecoder
    decoder_reason: str
    by_layers: LayerDecoder
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    execution: Execution = NOT_COMPILED
    program: Program | None = None

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        return len(self.by_layers.layers)


def pick_device(name: str) -> torch.device:
    """Return the device called `name` (cpu, cuda, cuda:N), checked to exist; a GPU without a number is the first one.

    Raises:
        InputError: The name is not cpu, cuda or cuda:N.
        DeviceError: The name is a GPU's, and the host has no such GPU. There is no fall-back to the CPU.
        ComputeError: This torch has no code for the GPU.
    """
    check_device(name)
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"device {name!r} is configured, but torch {torch.__version__} sees no GPU; check the driver "
                "(nvidia-smi) and that this torch is a CUDA build, or set device = 'cpu'"
            )
        count, number = torch.cuda.device_count(), device.index or 0
        if number >= count:
            raise DeviceError(f"device {name!r} does not exist; this machine has cuda:0 to cuda:{count - 1}")
        device = torch.device("cuda", number)  # with the index that `torch.cuda.set_device` wants
        capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        if not is_built_for(capability, built_for):
            raise ComputeError(
                f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)}: it was built for "
                f"{', '.join(built_for)}, not for sm_{capability[0]}{capability[1]}; install another build of torch"
            )
    return device


def is_built_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Tell whether code for `built_for` runs on a GPU; if nothing is listed, it is taken to.

    Args:
        capability: The GPU's compute capability, such as (9, 0).
        built_for: Architectures: such as sm_90 (runs on 9.0 and later 9.x), sm_90a (on 9.0), compute_90 (from 9.0 on).
    """

    def runs(architecture: str) -> bool:
        kind, _, version = architecture.partition("_")
        wanted = divmod(int(version.rstrip("af")), 10)
        if version.endswith("a"):
            return wanted == capability
        return wanted <= capability and (kind == "compute" or wanted[0] == capability[0])

    return not built_for or any(map(runs, built_for))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _is_models_fault(error: Exception) -> bool:
    """Tell whether loading failed for what the model's files say, and would fail again.

    Otherwise this host, the hub or a disk failed, or a library that is being upgraded has lost files.
    """
    if isinstance(error, MemoryError) or is_fault(error) or may_pass(error):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and (cause.name or "").partition(".")[0] in sys.modules:
            return False
        status = getattr(getattr(cause, "response", None), "status_code", 0)  # what the hub answered
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return False
        if any(kind.__name__ == "TransportError" for kind in type(cause).__mro__):  # httpx's: no answer came
            return False
        cause = cause.__cause__
    return True


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Make a ModelError of whatever is the fault of the model `name`; what may pass is raised as it is."""
    try:
        yield
    except ComputeError:
        raise
    except Exception as error:
        if not _is_models_fault(error):
            raise
        told = isinstance(error, (OSError, ValueError, ImportError, SafetensorError))
        text = _first_line(error) if told else f"{type(error).__name__}: {_first_line(error)}"
        raise ModelError(f"model {name!r} cannot be loaded: {text}") from error


def longest_seq_len(config: Any) -> int:  # noqa: ANN401 - as above
    """Return the largest sequence length, in positions, that the model of `config` allows."""
    longest: int = getattr(config.get_text_config(), "max_position_embeddings", LARGEST_SEQ_LEN)
    return LARGEST_SEQ_LEN if longest == -1 else longest  # XLNet's word for no limit


def check_seq_len(seq_len: int, config: Any, name: str) -> None:  # noqa: ANN401 - as above
    """Raise an InputError for a sequence length that the positions of model `name` do not allow."""
    longest = longest_seq_len(config)
    if not 1 <= seq_len <= longest:
        raise InputError(f"seq_len {seq_len} is outside 1 to {longest}, the positions of {name!r}")


def load_model(
    name: str, *, dtype: str, device: str, revision: str | None = None, seq_len: int = 1, ranks: int = 1
) -> Model:
    """Load `name` for inference, straight to its device and dtype.

    Args:
        name: A local path, a hub id, or `bundled:NAME`.
        dtype: float32, float16 or bfloat16.
        device: cpu, cuda or cuda:N.
        revision: Branch, tag or commit of a hub id.
        seq_len: The sequence length to be used; checked before the weights are read.
        ranks: Number of processes the model is split over; each has `joined` them, and loads its share on its device.

    Raises:
        InputError: An unknown dtype or device name, or a sequence length beyond the model's positions.
        DeviceError: The device is not there, or no model can be split over it.
        ModelError: The model cannot be found or read, its layers cannot be transformed, or it cannot be split.
        MemoryShortError: The model does not fit into the device's memory.
        RuntimeError: The device failed, or another rank is gone.
    """
    if sys.flags.optimize > 1:
        raise ModelError(
            "transformers reads docstrings, which Python leaves out with -OO (PYTHONOPTIMIZE=2): go without it"
        )
    check_dtype(dtype)
    target = pick_device(device)
    source, revision = resolve(name, revision), revision or "main"
    transformers_logging.disable_progress_bar()
    with _loading(name):
        config, way = read_config(source, revision)
        check_folder(source, revision)
        check_seq_len(seq_len, config, name)
    placed: dict[str, Any] = {"device_map": {"": target}}
    if ranks > 1:
        check_split(config, name, ranks)
        placed = split_as_planned(ranks, target)
    try:
        with _loading(name):
            folder = fetched(source, revision)
            stored = read_headers(folder)
            tensors = matrices(stored, way, name=name)
            weights = stored_fingerprint(stored, config, way)
            causal, report = load_causal(config, tensors, dtype=getattr(torch, dtype), device=target, placed=placed)
        check_loaded(causal, report, name=name, dtype=getattr(torch, dtype))
        with _loading(name):
            model = adapt(causal, name=name, fingerprint=weights)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortError(
            f"model {name!r} does not fit into the memory of {device} in {dtype}: split it over several devices "
            "(model.parallel), or take a smaller model or dtype"
        ) from error
    # transformers' own layers know how they are split; the flat decoder does not.
    if ranks > 1:
        return replace(model, decoder=model.by_layers, decoder_reason="the flat decoder knows nothing of split models")
    return model


def adapt(causal: Any, *, name: str, fingerprint: str | None = None) -> Model:  # noqa: ANN401 - transformers gives its classes no common type
    """Wrap a transformers model for the engine, in evaluation mode.

    It runs the model on a few positions to find each layer's residual and branch, to find out whether carrying only
    the last position through the last layer changes nothing, and whether the flat decoder computes the same.

    Args:
        causal: The model, on its device and in its dtype.
        name: Name of the model.
        fingerprint: Fingerprint of the checkpoint. Default: of the weights in memory.

    Raises:
        ModelError: The layers cannot be transformed; the message names the class and what was missing.
    """
    fix_arithmetic()
    owner = f"model {name!r} ({type(causal).__name__})"
    causal.requires_grad_(requires_grad=False).eval()
    compute_in_tiles(causal)
    decoder = causal.get_decoder()
    if decoder is causal:  # where transformers does not find it (Llama 4)
        decoder = getattr(causal, "model", decoder)
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not layers:
        raise ModelError(f"{owner}: its decoder, a {type(decoder).__name__}, has no list of layers in .layers or .h")
    norm = next((getattr(decoder, part) for part in NORMS if hasattr(decoder, part)), None)
    if norm is None:
        raise ModelError(
            f"{owner}: its decoder, a {type(decoder).__name__}, has no final norm; looked for {', '.join(NORMS)}"
        )
    weight = next(decoder.parameters())
    config = causal.config.get_text_config()
    seeds = seeds_tensor(["probe"], weight.device)
    probe = normal(seeds, PROBE_LENGTH * config.hidden_size, dtype=weight.dtype)
    probe = probe.view(1, PROBE_LENGTH, config.hidden_size)
    by_layers = LayerDecoder(decoder, list(layers), find_forms(decoder, list(layers), probe, owner=owner), norm)
    by_layers = _carrying(by_layers, probe, owner)
    chosen, reason = _choose(causal, by_layers, probe)
    return Model(
        name=name,
        fingerprint=fingerprint or module_fingerprint(causal),
        causal=causal,
        decoder=chosen,
        decoder_reason=reason,
        by_layers=by_layers,
        hidden_size=config.hidden_size,
        dtype=weight.dtype,
        device=weight.device,
    )


@torch.inference_mode()
def _carrying(by_layers: LayerDecoder, probe: torch.Tensor, owner: str) -> LayerDecoder:
    """Check that no position looks ahead, and find out whether the last one can go alone through the last layer.

    Returns:
        The decoder that carries one position there, or, where that gives another result or none, all of them.

    Raises:
        ModelError: Attention looks ahead, or the layers do not give what the decoder does.
    """

    def bare(embeddings: torch.Tensor) -> torch.Tensor:
        with even_routers(by_layers.layers):
            states: torch.Tensor = by_layers.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states.float()

    states = bare(probe)
    if not states.isfinite().all():
        return by_layers  # its distances will be refused
    tolerance = PROBE_TOLERANCE[probe.dtype]
    earlier, other_end = states[:, :-1], probe.clone()
    other_end[:, -1] = -other_end[:, -1]
    if (bare(other_end)[:, :-1] - earlier).norm() > tolerance * earlier.norm():
        raise ModelError(f"{owner} is not causal: its attention looks ahead")
    whole = states[:, -1]
    vectors = probe.new_zeros(len(by_layers.layers), probe.shape[-1])
    for carries_all in (False, True):
        decoder = replace(by_layers, carries_all=carries_all)
        try:
            alone = decoder(probe, join_of("none", 1), vectors).float()
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, ModelError) as error:
            if is_fault(error) or carries_all:
                raise
            continue
        if (alone - whole).norm() <= tolerance * whole.norm():
            return decoder
    raise ModelError(f"{owner} gives another result when its layers are run one by one")


@torch.inference_mode()
def _choose(causal: Any, by_layers: LayerDecoder, probe: torch.Tensor) -> tuple[FlatDecoder | LayerDecoder, str]:  # noqa: ANN401 - transformers gives its classes no common type
    """Return the decoder that runs, and why: the flat one only where it agrees with the layers on these weights."""
    carried = ", and all positions go through its last layer" if by_layers.carries_all else ""
    if not can_flatten(causal):
        return by_layers, f"the flat decoder does not know a {type(causal).__name__} as it is loaded here{carried}"
    flat = flatten(causal.get_decoder(), merge=probe.device.type != "cpu")
    vectors = probe.new_zeros(len(by_layers.layers), probe.shape[-1])
    ours, theirs = (
        decoder(probe, join_of("none", 1), vectors, all_positions=True).float()[0] for decoder in (flat, by_layers)
    )
    # The median, since a router that finds two experts all but equal may choose otherwise at a position.
    far = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())
    if far > PROBE_TOLERANCE[probe.dtype]:
        return by_layers, f"on these weights the flat decoder is {far:.1e} from the layers of transformers"
    return flat, f"on these weights the flat decoder is within {far:.1e} of the layers of transformers"
