"""Check of the model: is it here, can it be read, and which weights has it?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocd.check.finding import Finding, green, red, yellow
from pocd.observe.mask import excerpt
from pocd.protocol.errors import ModelError
from pocd.protocol.names import resolve

if TYPE_CHECKING:
    from pocd.check.probe import Probe
    from pocd.config.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a model, or why it has none.

    Attributes:
        folder: The model's folder; None where the model is not on this host.
        error: Why the model cannot be found at all.
        hub: Folder of the hub's cache, for downloads; None for a local model.
        offline: Whether the environment forbids the download.
    """

    folder: Path | None
    error: str | None = None
    hub: str | None = None
    offline: bool = False


def find(model: ModelSettings) -> Place:
    """Look for the model: bundled, in a local folder, or in the hub's cache."""
    try:
        source = resolve(model.name, model.revision)
    except ModelError as error:
        return Place(None, error=str(error))
    except OSError as error:
        return Place(None, error=f"model {model.name!r} cannot be looked at: {error.strerror}")
    if source != model.name or model.name.startswith(("/", "./", "../")):
        return Place(Path(source))
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    hub = constants.HF_HUB_CACHE
    try:
        config = try_to_load_from_cache(source, "config.json", revision=model.revision or "main")
    except HFValidationError:
        return Place(None, error=f"model {model.name!r} is not a hub id, and local folders begin with / ./ ../ or ~")
    return Place(Path(config).parent if isinstance(config, str) else None, hub=hub, offline=constants.HF_HUB_OFFLINE)


def check(place: Place, probe: Probe, model: ModelSettings) -> Finding:
    """Return a finding: whether the model is here, and its fingerprint."""
    name = "model"
    if place.error is not None:
        return red(name, place.error, "correct model.name: bundled:NAME, a model's folder, or a hub id")
    if place.folder is None:
        text = f"{model.name} is not in {place.hub}"
        if place.offline:
            return red(
                name, f"{text}, and HF_HUB_OFFLINE forbids to download it", "download it, or unset HF_HUB_OFFLINE"
            )
        return yellow(
            name,
            f"{text}; the first start downloads it",
            f"to have it now: hf download {model.name} (as the daemon's user, and with its HF_HOME)",
        )
    if probe.model_error is not None:
        mend = (
            "delete it there, so that it is downloaded again" if place.hub else "copy the model's folder again, whole"
        )
        return red(name, f"{model.name} in {place.folder} cannot be read: {excerpt(probe.model_error, 160)}", mend)
    if probe.fingerprint is not None and probe.parameters is not None:
        return green(name, f"{model.name}, fingerprint {probe.fingerprint}, {probe.parameters:,} parameters")
    there, remedy = "is there", "mend torch first, see above"
    if probe.parameters is not None:
        there = f"has {probe.parameters:,} parameters"
        remedy = "check again when its files were read once; a worker waits for a slow disk"
    return yellow(name, f"{model.name} {there}; its fingerprint is not known: {probe.problem}", remedy)
