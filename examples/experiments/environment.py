"""What a reader needs to place a number: versions, hardware, commit."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers


def hardware() -> str:
    """The GPU, or the processor as the system names it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return [*named, platform.processor() or platform.machine()][0]


def environment() -> dict[str, str | int]:
    """Versions, hardware, threads and commit."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "commit": git.stdout.strip() or "not a checkout",
    }
