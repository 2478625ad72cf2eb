"""Running out of memory: what is noted where it happens, and the error that says when, what is held, what would fit.

`noted` adds what a place knows to an error that passes it, from the inside out; `memory_advice`, around a whole run,
turns the error into `OutOfMemory`.
"""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune import display
from vlmtune.errors import OutOfMemory, TrainingError

SAVERS = {
    "trainer.auto_micro_batch": "trainer.auto_micro_batch=true",
    "trainer.batch_size": "a smaller trainer.batch_size (and more trainer.gradient_accumulation_steps)",
    "trainer.batch_tokens": "a smaller trainer.batch_tokens (and more trainer.gradient_accumulation_steps)",
    "trainer.eval_batch_size": "a smaller trainer.eval_batch_size",
    "trainer.num_workers": "trainer.num_workers=0",
    "trainer.gradient_checkpointing": "trainer.gradient_checkpointing=true",
    "data.cache_features": "data.cache_features=off",
    "model.image.max_tokens": "a smaller model.image.max_tokens",
    "optimizer.name": "optimizer=adamw_8bit",
    "optimizer.offload": "optimizer.offload=true",
    "adapter": "adapter=lora",
    "quantization": "quantization=nf4",
    "model": "a smaller model",
}
"""What a run needs less memory with, by config key."""
NOT_ON_DEVICE = ("trainer.num_workers", "data.cache_features")
"""Of these, what needs none of a GPU's memory."""
ONLY_ON_DEVICE = ("optimizer.offload",)
"""Of these, what moves something from a GPU's memory to the machine's."""
TRAINING = (
    "trainer.auto_micro_batch",
    "trainer.batch_size",
    "trainer.batch_tokens",
    "trainer.gradient_checkpointing",
    "optimizer.name",
    "optimizer.offload",
    "adapter",
)
"""Of these, what only training needs less memory with."""
ACTIVATIONS = ("trainer.auto_micro_batch", "trainer.batch_size", "trainer.batch_tokens", "trainer.eval_batch_size")
"""Of these, what halves the activations, if it is halved."""
NF4 = 0.52
"""Bytes of a weight in nf4, with its share of the block's scale."""
SHARED_MEMORY = "a larger /dev/shm (Docker: --shm-size=16g or --ipc=host) or a smaller trainer.batch_size"
WORKER_DIED = (
    "a process that prepares batches was ended from outside, most often because the machine, or its shared memory, is "
    f"out of memory; use {SHARED_MEMORY}, or fewer trainer.num_workers (0: none)"
)
REFUSALS = ("allocate memory", "enough memory", "bad_alloc", "can't start new thread", "out of memory", "ALLOC_FAILED")
"""What torch, Python and the GPU's libraries say where there is no more memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no more memory."""
    return (
        isinstance(error, MemoryError | OutOfMemory)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; not imported here
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError | ImportError) and any(refusal in str(error) for refusal in REFUSALS))
    )


def _is_of_device(error: BaseException) -> bool:
    """Whether an error about memory is about the GPU's."""
    return type(error).__name__ == "OutOfMemoryError" or any(name in str(error) for name in ("CUDA", "CUBLAS", "CUDNN"))


@dataclass(frozen=True)
class Held:
    """Bytes that a run holds on this process. `rest`: everything else in use, mostly activations."""

    frozen: int
    trained: int
    gradients: int
    state: int
    linear: int
    """Of the weights, what nf4 would save."""
    rest: int = 0
    device: str = ""

    @classmethod
    def of(cls, model: Any, optimizer: Any = None) -> Held:
        """What a model and an optimizer hold at this moment."""
        weights = [*model.parameters()]
        trained = sum(map(_bytes, (p for p in weights if p.requires_grad)))
        gradients = sum(map(_bytes, (p.grad for p in weights if p.grad is not None)))
        states = optimizer.state.values() if optimizer is not None else ()
        state = sum(_bytes(value) for each in states for value in _values(each))
        matrices = [module.weight for module in model.modules() if type(module).__name__ == "Linear"]
        linear = sum(_bytes(weight) - int(NF4 * weight.numel()) for weight in matrices)
        total = sum(map(_bytes, weights))
        return cls(total - trained, trained, gradients, state, linear, *_device(total + gradients + state))

    def __str__(self) -> str:
        parts = {
            "frozen weights": self.frozen,
            "trained weights": self.trained,
            "gradients": self.gradients,
            "optimizer state": self.state,
            "activations and the rest": self.rest,
        }
        shown = ", ".join(f"{name} {display.size(count, 'B')}" for name, count in parts.items() if count)
        return shown + self.device

    def savings(self) -> dict[str, int]:
        """Bytes that keys of SAVERS save, as far as what is held tells: a place for a planner that knows more."""
        state = max(self.state, 2 * self.trained)  # AdamW's two averages, which come with the first step
        return {
            "adapter": max(self.gradients, self.trained) + state,
            "quantization": self.linear,
            "optimizer.name": state * 3 // 4,
            "optimizer.offload": state,
        }


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size()) if hasattr(tensor, "element_size") else 0


def _values(state: dict[str, Any]) -> Iterator[Any]:
    """The values of one weight's state, which bitsandbytes nests."""
    for value in state.values():
        if isinstance(value, dict):
            yield from _values(value)
        else:
            yield value


def _device(known: int) -> tuple[int, str]:
    """What is in use besides `known` bytes, on the GPU or else by this process (on Linux), and a clause about a GPU."""
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        clause = f"; of the device's {display.size(total, 'B')}, {display.size(free, 'B')} are free"
        return max(torch.cuda.memory_allocated() - known, 0), clause
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return max(pages * resource.getpagesize() - known, 0), ""
    return 0, ""


@dataclass
class Circumstances:
    """What `note` adds to an error."""

    when: list[str] = field(default_factory=list)
    """From the inside out."""
    useless: set[str] = field(default_factory=set)
    held: Held | None = None


@contextmanager
def noted(when: str, *, model: Any = None, optimizer: Any = None, useless: Collection[str] = ()) -> Iterator[None]:
    """`note` on an error that leaves the context."""
    try:
        yield
    except Exception as error:
        note(error, when, model=model, optimizer=optimizer, useless=useless)
        raise


def note(
    error: Exception, when: str, *, model: Any = None, optimizer: Any = None, useless: Collection[str] = ()
) -> None:
    """Add to an error about memory `when` it happened, what `model` and `optimizer` hold, and which keys of SAVERS are
    `useless` there.
    """
    if not is_out_of_memory(error):
        return
    found: Circumstances = error.__dict__.setdefault("circumstances", Circumstances())
    found.when.append(when)
    found.useless |= {*useless}
    if model is not None and (found.held is None or optimizer is not None):
        found.held = Held.of(model, optimizer)


@contextmanager
def memory_advice(useless: Collection[str] = ("trainer.batch_tokens",)) -> Iterator[None]:
    """Turn running out of memory into an error that says what needs less. `useless`: keys of `SAVERS` that can't help,
    such as those that save memory already.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if str(error).startswith("DataLoader worker"):
            raise TrainingError(WORKER_DIED) from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_explanation(error, {*useless})) from error


def _explanation(error: BaseException, useless: set[str]) -> str:
    found: Circumstances = error.__dict__.get("circumstances", Circumstances())
    on_device = _is_of_device(error)
    useless |= found.useless | {*(NOT_ON_DEVICE if on_device else ONLY_ON_DEVICE)}
    machine = "out of memory: the machine, or a limit on this process (ulimit -v, a container's), refuses more"
    place = ", ".join(["out of device memory" if on_device else machine, *reversed(found.when)])
    held = f". Held: {found.held}" if found.held else ""
    advice = _advice(useless, found.held)
    return f"{place}{held}. Less is needed with {', '.join(advice[:-1])} or {advice[-1]}"


def _advice(useless: set[str], held: Held | None) -> list[str]:
    """What needs less, that which saves most first. What saves next to nothing is left out."""
    usable = {key: text for key, text in SAVERS.items() if key not in useless}
    if held is None:
        return [*usable.values()]
    savings = held.savings()
    least = (held.frozen + held.trained + held.rest) // 100
    rank = {**savings, **dict.fromkeys([*ACTIVATIONS, "trainer.gradient_checkpointing"], held.rest // 2)}
    told = {
        key: f"{text} (saves about {display.size(savings[key], 'B')})" if key in savings else text
        for key, text in usable.items()
        if savings.get(key, least) >= least
    }
    return [told[key] for key in sorted(told, key=lambda key: -rank.get(key, 0))]
