"""The Ray cluster that workers come from."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from pocd.config.types import MOST_DEVICES, SECTION


def _check_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]", host) or not re.fullmatch("[0-9]{1,5}", port):
        raise ValueError("must be HOST:PORT of the cluster's head, such as 10.0.0.1:6379 (not ray://)")
    if not 1 <= int(port) <= 65535:
        raise ValueError("its port must be 1 to 65535")
    return address


def _parse_workers(value: object) -> int | str:
    text = str(value)  # the environment gives strings
    if text == "auto":
        return text
    if isinstance(value, bool) or not re.fullmatch("[1-9][0-9]?", text) or int(text) > MOST_DEVICES:
        raise ValueError(f'must be "auto", or a whole number from 1 to {MOST_DEVICES}')
    return int(text)


class RaySettings(BaseModel):
    """The Ray cluster that workers come from where worker.engine is "ray"."""

    model_config = SECTION

    address: Annotated[str, AfterValidator(_check_address)] = "127.0.0.1:6379"
    workers: Annotated[int | Literal["auto"], BeforeValidator(_parse_workers)] = "auto"
    cpus: int = Field(default=1, ge=1, le=1024)


def check_model(engine: str, device: str | list[str]) -> None:
    """Check that the workers can run the model so where they come from a cluster.

    Args:
        engine: "local", of which nothing is asked here, or "ray".
        device: The devices as they are configured.

    Raises:
        ValueError: Workers cannot run so.
    """
    if engine == "local":
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            'model.device must be "cuda" or "auto" (each worker, or each of its ranks, gets a GPU, which Ray chooses) '
            'or "cpu" with worker.engine "ray"'
        )
