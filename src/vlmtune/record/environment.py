"""What a run ran on, and what it used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmtune.launch import scheduler

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "hydra-core",
    "tokenizers",
    "pillow",
    "torchvision",
)


def describe(seed: int, fingerprint: str, processor: Any) -> dict[str, Any]:
    """Everything that a result may depend on besides the config."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [
        platform.processor() or "cpu"
    ]
    return {
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "variables": variables(),
        "job": scheduler.job(),
        "image_processor": type(processor.image_processor).__name__,
        "seed": seed,
        "data_fingerprint": fingerprint,
    }


def versions() -> dict[str, str]:
    """The version of each package that is installed, of those that a result depends on."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit and uncommitted changes of the checkout that `folder` lies in; None outside of one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout if done.returncode == 0 else ""

    try:
        sha = git("rev-parse", "HEAD").strip()
        return {"sha": sha, "diff": git("diff", "HEAD", "--", ":/*.py", ":/*.yaml")} if sha else None
    except (OSError, subprocess.TimeoutExpired):
        return None


class Peak:
    """Peak memory since `start`, so that a run's is its own and not that of an earlier one in the same process.

    The kernel's own mark (VmHWM) is reset where that is allowed (Linux); elsewhere the largest value seen at the calls
    of `resident` counts. What the process holds already when a run starts is part of it.
    """

    def __init__(self) -> None:
        self.kernel, self.seen = False, 0
        self.startup: dict[str, int] | None = None
        """The peaks of everything before the first step; None until it is over."""

        self.before_model, self.predicted = 0, 0
        """Resident bytes before the model was opened; bytes that the planner predicts on top of them, or on the GPU."""

    def start(self) -> None:
        self.seen, self.startup, self.predicted = 0, None, 0
        self.before_model = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.kernel = True
        except OSError:
            self.kernel = False
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()

    def opens_model(self) -> None:
        self.before_model = _status("VmRSS")

    def end_startup(self) -> None:
        """Note the peaks up to here. The device's count anew from here, evaluations included."""
        self.startup = {"startup_peak_rss_bytes": self.resident(), "startup_peak_device_bytes": self.device()[0]}
        if (cuda := _cuda()) is not None:
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()

    def resident(self) -> int:
        """Bytes of main memory."""
        self.seen = max(self.seen, _status("VmHWM" if self.kernel else "VmRSS"))
        return self.seen

    def device(self) -> tuple[int, int]:
        """Bytes on this process's GPU: of tensors, and held by their allocator. 0 without a GPU."""
        if (cuda := _cuda()) is None:
            return 0, 0
        return cuda.max_memory_allocated(), cuda.max_memory_reserved()


def _cuda() -> Any:
    """`torch.cuda`; None where no GPU is in use, and before torch is imported, which would take seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _status(name: str) -> int:
    """Bytes that Linux says under `name` of this process; elsewhere the process's whole peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


PEAK = Peak()


def memory() -> dict[str, int]:
    """Peak memory of the present run on this process in bytes.

    `peak_rss_bytes`: resident, over the whole run. `peak_device_bytes` and `peak_device_reserved_bytes`: on the current
    accelerator (0 without one), of tensors and of their allocator, since the first step. `startup_...`: what came
    before it, or of the run so far. `before_model_rss_bytes`: resident when the model was opened. `predicted_bytes`:
    what the planner predicts (planning.predicted), where it does. Processes that prepare batches are not counted.
    """
    allocated, reserved = PEAK.device()
    found = {"peak_rss_bytes": PEAK.resident(), "peak_device_bytes": allocated, "peak_device_reserved_bytes": reserved}
    if PEAK.predicted:
        found |= {"before_model_rss_bytes": PEAK.before_model, "predicted_bytes": PEAK.predicted}
    startup = {"startup_peak_rss_bytes": found["peak_rss_bytes"], "startup_peak_device_bytes": allocated}
    return found | (PEAK.startup or startup)


def peak_bytes(memory: Mapping[str, int]) -> int | None:
    """The peak of `memory` as result.json has it: the accelerator's, in main memory where there is none. None where
    nothing is known.
    """
    return memory.get("peak_device_bytes") or memory.get("peak_rss_bytes")


def prediction(memory: Mapping[str, int]) -> tuple[int, int] | None:
    """The bytes that were predicted and those that were seen; None where none were predicted."""
    if not (predicted := memory.get("predicted_bytes")):
        return None
    resident = memory["peak_rss_bytes"] - memory["before_model_rss_bytes"]
    return predicted, memory.get("peak_device_bytes") or resident


VARIABLES = ("ACCELERATE_", "CUBLAS_", "CUDA_", "HF_", "MKL_", "NCCL_", "NVIDIA_TF32", "OMP_", "PYTORCH_", "TORCH_")


def variables() -> dict[str, str]:
    """Environment variables by which torch and its libraries may compute otherwise; none that may hold a secret."""
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    chosen = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return {name: value for name, value in chosen.items() if not any(word in name for word in secret)}
