"""Finished runs side by side: a ranking with statistics, and a page that shows it. It reads run folders only."""

from vlmtune.comparison.finish import PAGE, finish
from vlmtune.comparison.page import write
from vlmtune.comparison.ranking import Comparison, compare
from vlmtune.comparison.texts import table

__all__ = ["PAGE", "Comparison", "compare", "finish", "table", "write"]
