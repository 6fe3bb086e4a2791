"""Errors that stop a computation, one class for each remedy."""

from __future__ import annotations


class ComputeError(Exception):
    """A computation cannot be done until the operator changes something; the message says what."""


class DeviceError(ComputeError):
    """The configured device is not there."""


class ModelError(ComputeError):
    """The model cannot be found, read, or transformed."""


class ModelAwayError(ModelError):
    """There is nothing where the model should be: its disk may not be mounted yet."""


class InputError(ComputeError):
    """A nonce, a sequence length or another input is outside what can be computed."""


class OutOfMemoryError(ComputeError):
    """A batch does not fit into the device's memory; a smaller one may."""


class MemoryShortError(ComputeError):
    """The model, or the smallest batch, does not fit into the device's memory."""


class CaptureError(ComputeError):
    """A batch cannot be captured as a CUDA graph, and the process that tried it must not use the GPU any more."""


class NonFiniteError(ComputeError):
    """The model gave NaN or infinity, so these nonces have no distance."""
