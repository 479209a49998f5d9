"""How many samples of a dataset were kept, and how many were left out for which reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class DataReport:
    """
    Counts of the samples that were kept, and of those that were left out. The report of a streamed dataset grows while
    the main process reads the data for the first time.

    Args:
        kept (`int`): Samples to train on.
        text_only (`int`): Samples that were left out because they have no image.
        too_long (`int`): Samples that were left out because they have more than `max_length` tokens.
        bad (`int`): Samples that were left out because they cannot be trained on.
        max_length (`int`): Limit on the tokens of a sample.
        began_with_answer (`int`): Kept samples whose conversation began with an answer. That answer was dropped.
    """

    kept: int = 0
    text_only: int = 0
    too_long: int = 0
    bad: int = 0
    max_length: int = 0
    began_with_answer: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.text_only + self.too_long + self.bad

    def __str__(self) -> str:
        text = (
            f"{self.kept} of {self.total} samples kept; left out: {self.text_only} without an image, {self.too_long} over "
            f"{self.max_length} tokens, {self.bad} bad"
        )
        if self.began_with_answer:
            text += f"; {self.began_with_answer} began with an answer, which was dropped"
        return text

    def count(self, row: Mapping[str, Any]) -> None:
        """Adds a row, whose `outcome` is the name of a field."""
        setattr(self, row["outcome"], getattr(self, row["outcome"]) + 1)
        self.began_with_answer += row["outcome"] == "kept" and row["began_with_answer"]
