"""The exact versions that scripts/setup installs without a resolver: all that pocd and its checks need is there."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PINS = Path(__file__).resolve().parent.parent.parent / "scripts" / "constraints.txt"
OF_GPUS = re.compile("nvidia-.*|cuda-.*|triton")  # what torch's builds for GPUs need besides


def needed(name: str, extra: str) -> set[tuple[str, str]]:
    """What a package with an extra needs here, each with one of its extras; those it names alone have the extra ''."""
    found: set[tuple[str, str]] = set()
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found |= {(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)}
    return found


def test_all_that_is_needed_is_pinned_and_installed_as_pinned() -> None:
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if not line.startswith("#"))
    pinned: dict[str, str] = {canonicalize_name(name): version for name, version in pins.items()}
    seen, ahead = {("pocd", "")}, {("pocd", "dev")}
    while ahead:
        seen |= ahead
        ahead = {each for one in ahead for each in needed(*one)} - seen
    names = {name for name, _ in seen if name != "pocd" and not OF_GPUS.fullmatch(name)}
    assert len(names) > 50
    assert names <= pinned.keys(), names - pinned.keys()
    installed = {name: Version(metadata.version(name)).public for name in names}
    assert {name: version for name, version in installed.items() if version != pinned[name]} == {}
