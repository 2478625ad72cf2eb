"""What a run ran on, and what it used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.records import Record

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

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [
        platform.processor() or "cpu"
    ]
    return {
        "git": git_state(Path(__file__).parent),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "image_processor": type(processor.image_processor).__name__,
        "seed": seed,
        "data_fingerprint": fingerprint,
    }


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


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of all rows' texts and image names; a source that makes its rows on the fly says its own."""
    own = getattr(records, "fingerprint", None)
    if own is not None:
        return str(own)
    digest, seen = hashlib.blake2b(digest_size=12), dict[Hashable, int]()
    for record in records:
        images = [image.name for image in record.images if isinstance(image, Path)]  # the folder may move
        digest.update(repr((record.turns, record.system, images, seen.setdefault(record.group, len(seen)))).encode())
    return digest.hexdigest()


def memory() -> dict[str, int]:
    """Peak memory of this process in bytes: resident, and allocated on the current accelerator (0 without one)."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak_device_bytes": device}
