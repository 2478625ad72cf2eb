"""How much memory a run will take, computed without weights: `answer` for a person, `predicted` for a run itself."""

from vlmtune.planning.answer import answer
from vlmtune.planning.predicted import predicted
from vlmtune.planning.rows import Row

__all__ = ["Row", "answer", "predicted"]
