"""Tokens that an answer never has."""

from typing import Any

import torch


class SuppressedTokensMixin:
    """
    Before a model class of vLLM: gives no probability to the `suppress_tokens` of `generation_config.json`, which vLLM
    itself does not read. The placeholder of images is among them.
    """

    suppressed: torch.Tensor

    def read_suppressed_tokens(self: Any, model_config: Any) -> None:
        tokens = model_config.try_get_generation_config().get("suppress_tokens") or []
        self.register_buffer("suppressed", torch.tensor(tokens, dtype=torch.long), persistent=False)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)  # type: ignore[misc]
        if logits is None:  # tensor parallel may gather them on one process only
            return None
        return logits.index_fill_(-1, self.suppressed, -torch.inf)
