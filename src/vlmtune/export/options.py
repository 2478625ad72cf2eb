"""The keys of the command merge; conf/merge.yaml explains them to users."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlmtune.config.schema import number, one_of
from vlmtune.errors import nearest

METHODS = (
    *("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
    *("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"),
)
"""PEFT's names."""
EQUAL_RANKS = frozenset(METHODS) - {"cat"} - {name for name in METHODS if name.endswith("svd")}
SPARSE = frozenset(name for name in METHODS if name.startswith(("ties", "dare", "magnitude")))
SIGNED = frozenset(name for name in METHODS if "ties" in name)
DENSITY = 0.5


@dataclass
class Options:
    run: str | None = None
    """A finished run, whose adapter is merged into its base model."""
    runs: list[str] = field(default_factory=list)
    """Several finished runs, whose adapters become one."""
    output: str | None = None
    """The folder to write; it must not exist."""
    weights: list[float] | None = None
    """One for each run; null: equal ones that add up to 1."""
    method: str = one_of(*METHODS)
    """How several adapters become one."""
    methods: list[str] = field(default_factory=list)
    """Methods to try on data.test; the best one is written."""
    density: float | None = number(None, above=0, most=1)
    """Share of the values that ties, dare_* and magnitude_prune keep; null: 0.5."""
    majority_sign_method: str = one_of("total", "frequency")
    """How ties finds the sign of a sum: of the values themselves, or of their signs."""
    seed: int = number(0, least=0)
    """Of the values that dare_* drops at random."""
    dtype: str = one_of("auto", "fp32", "bf16", "fp16")
    """Data type of the weights that are written; auto: as the base model is stored."""
    push_to_hub: str | None = None
    """Name of a repository on the hub to upload the folder to, OWNER/NAME."""
    public: bool = False
    """Whether that repository is public if it is new."""

    gguf: str | None = None
    """llama.cpp's convert_hf_to_gguf.py, to write GGUF files with."""

    @property
    def folders(self) -> list[str]:
        return self.runs or ([self.run] if self.run else [])

    @property
    def tried(self) -> list[str]:
        """The methods to compute."""
        return self.methods or [self.method]

    @property
    def shares(self) -> list[float]:
        """The weight of each run."""
        return self.weights or [1 / len(self.folders)] * len(self.folders)


def problems_of(options: Options, *, has_data: bool) -> list[str]:
    """What is wrong with the keys, before any file is looked at."""
    found = []
    if options.run and options.runs:
        found.append("run, runs: give one run, or a list of several")
    if not options.folders:
        found.append("run: missing; give a run folder, for instance run=outputs/runs/<stamp>")
    if not str(options.output or "").strip():
        found.append("output: missing; name the folder to write, for instance output=merged")
    if len({*options.folders}) < len(options.folders):
        found.append("runs: names the same run twice; give it one weight")
    if options.weights is not None and len(options.weights) != len(options.folders):
        found.append(f"weights={options.weights}: {len(options.folders)} runs need as many weights")
    if options.weights and not any(options.weights):
        found.append(f"weights={options.weights}: leave nothing of any adapter")
    wrong = [name for name in options.methods if name not in METHODS]
    found += [f"methods: {name}: {nearest(name, METHODS)}" for name in wrong]
    if options.gguf and not Path(options.gguf).expanduser().is_file():
        found.append(f"gguf={options.gguf}: no such file; give the path of llama.cpp's convert_hf_to_gguf.py")
    if options.methods and not has_data:
        found.append("methods: need rows to be compared on; set data.test=FILE")
    return found + _useless(options)


def _useless(options: Options) -> list[str]:
    """Keys that would have no effect."""
    found = []
    if len(options.folders) == 1:
        given = [key for key in ("weights", "methods", "density") if getattr(options, key)]
        found += [f"{key}: has no effect on one run; give several: runs=[A,B]" for key in given]
    elif options.density is not None and not SPARSE & {*options.tried}:
        found.append(f"density: has no effect on {', '.join(options.tried)}; only on {', '.join(sorted(SPARSE))}")
    if options.majority_sign_method != "total" and not SIGNED & {*options.tried}:
        found.append(f"majority_sign_method: has no effect without one of {', '.join(sorted(SIGNED))}")
    if options.public and not options.push_to_hub:
        found.append("public: has no effect without push_to_hub=OWNER/NAME")
    return found
