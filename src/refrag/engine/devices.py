"""Errors of devices, in words that name the way out."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from ..errors import BackendError, RefragError


@contextmanager
def backend_errors(device: torch.device) -> Generator[None]:
    """A device that fails becomes a BackendError of one sentence; what fails on a CPU is a bug and stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BackendError(f"The device {device} ran out of memory: lower --max-slots or --top-k, or run with --device cpu.") from error
    except (NotImplementedError, RuntimeError) as error:
        if device.type == "cpu" or isinstance(error, RefragError):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BackendError(f"The device {device} failed ({reason}): run the same command with --device cpu.") from error
