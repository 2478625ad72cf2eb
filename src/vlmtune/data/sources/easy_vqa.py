"""easy-VQA: 5,000 drawings of 64 x 64 pixels with 48,248 questions, a real public set in a 3 MB package.

Victor Zhou, MIT licence, https://github.com/vzhou842/easy-VQA. `train` and `validation` are the package's train and
test splits. Scores on validation are only test scores if nothing is chosen by them, as in the default config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmtune.config.schema import DataConfig
from vlmtune.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def load(config: DataConfig) -> dict[str, pd.DataFrame]:
    """Both splits, with the columns image_path, question and answer. Raises DataError if the package is missing."""
    try:
        import easy_vqa
    except ImportError:
        raise DataError("data=easy_vqa needs the package easy-vqa: pip install easy-vqa") from None
    return {
        "train": _frame(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "validation": _frame(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }


def _frame(questions: tuple[Sequence[str], Sequence[str], Sequence[int]], paths: dict[int, str]) -> pd.DataFrame:
    import pandas as pd

    texts, answers, images = questions
    columns = {"image_path": [paths[image] for image in images], "question": texts, "answer": answers}
    return pd.DataFrame(columns, dtype=str)
