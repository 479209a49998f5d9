"""Tokens that an answer never has."""

from typing import Any

import torch


class SuppressedTokensMixin:
    """
    Before a model class of vLLM: gives no probability to the `suppress_tokens` of `generation_config.json`, which vLLM
    itself does not read. The placeholder of images is among them.
    """

    suppressed: list[int] = []

    def read_suppressed_tokens(self, model_config: Any) -> None:
        self.suppressed = list(model_config.try_get_generation_config().get("suppress_tokens") or ())

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)  # type: ignore[misc]
        if self.suppressed and logits is not None:  # tensor parallel gathers them on one process only
            logits[:, self.suppressed] = -torch.inf
        return logits
