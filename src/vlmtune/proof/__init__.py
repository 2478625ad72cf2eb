"""What is proven, and decided, on a run's own rows before its first step."""

from vlmtune.proof.decision import decide
from vlmtune.proof.pairs import sample_rows
from vlmtune.proof.probes import rewrites_agree
from vlmtune.proof.prove import prove, prove_passes
from vlmtune.proof.row_checker import limits_of
from vlmtune.proof.rows import check_rows

__all__ = ["check_rows", "decide", "limits_of", "prove", "prove_passes", "rewrites_agree", "sample_rows"]
