"""What each trial imports, imported once: trials are forked from a process that has done so.

It must never compute: a process that has computed with several threads leaves its forks without them, and they hang.
"""

from __future__ import annotations

import pandas  # noqa: F401
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

import vlmtune.cli.train
import vlmtune.run
import vlmtune.trials.child  # noqa: F401
from vlmtune.packages import without_bitsandbytes

with without_bitsandbytes():
    import peft.tuners.lora  # noqa: F401
