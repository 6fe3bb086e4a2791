"""Whether the configured model is there."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from pocd.config.settings import ConfigError
from pocd.process import EXIT_TEMPORARY, EndedError
from pocd.protocol.errors import ModelAwayError, ModelError
from pocd.protocol.names import resolve

if TYPE_CHECKING:
    from pocd.config.settings import Settings


def check_engine(settings: Settings) -> None:
    """Check that what the workers' engine needs is installed.

    Raises:
        ConfigError: The package is missing.
    """
    if settings.worker.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError(
            f"worker.engine: \"ray\" needs Ray, which is not installed: {sys.executable} -m pip install 'pocd[ray]'"
        )


def check_model(settings: Settings) -> None:
    """Check that the model exists, where that needs no loading: bundled, or a local folder.

    Raises:
        ConfigError: The model cannot be used.
        EndedError: There is nothing yet where the model should be.
    """
    try:
        resolve(settings.model.name, settings.model.revision)
    except ModelAwayError as error:
        raise EndedError(EXIT_TEMPORARY, f"model.name: {error}") from None
    except ModelError as error:
        raise ConfigError(f"model.name: {error}") from None
    except PermissionError as error:
        raise ConfigError(
            f"model.name: {error.filename} cannot be read by user {os.geteuid()}: a service sees nothing under /home "
            "and /root (ProtectHome=); put the model's folder elsewhere, such as in /srv, readable by that user"
        ) from None
    except OSError as error:
        raise ConfigError(f"model.name: {error.filename} cannot be read: {error.strerror}") from error
