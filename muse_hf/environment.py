"""What a bug report should say: versions, device, and which backend serves MuSe attention and why."""

import importlib.metadata
import platform
from typing import Any

import torch

from muse_hf.config import MuseConfig
from muse_hf.functional import op_and_reason_against

_PACKAGES = ("muse_hf", "torch", "triton", "transformers", "accelerate", "peft", "datasets", "matplotlib")


def environment() -> dict[str, Any]:
    """Everything by name, as JSON types."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backend": _backend(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"


def _backend() -> str:
    """What `backend="auto"` takes for causal attention in the default setting on the best device here."""
    config = MuseConfig()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.empty(1, 1, 4 * config.local_block, 64, dtype=torch.bfloat16, device=device)
    _, reason = op_and_reason_against(query, query, True, config)
    return f"reference; the Triton kernels: {reason}" if reason else "triton, in the default setting"
