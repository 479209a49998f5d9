"""
Tokens that an answer never has: the `suppress_tokens` of `generation_config.json`, which vLLM itself does not read. The
placeholder of images is among them.
"""

from typing import Any

import torch


def suppressed_tokens(model_config: Any) -> torch.Tensor:
    """Their ids."""
    return torch.tensor(model_config.try_get_generation_config().get("suppress_tokens") or [], dtype=torch.long)


def suppress(logits: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    """Sets logits `(T, vocabulary)` to -inf, in place. With tensor parallel one process alone may have them."""
    return None if logits is None else logits.index_fill_(-1, tokens, -torch.inf)
