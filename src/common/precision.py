"""How fast this machine multiplies matrices in bfloat16."""

import torch


# A CPU with AVX2 alone takes thirty times as long as in float32 (a product of 9,000 x 192 and 192 x 512, torch 2.13).
_SLOW_CPUS = ("DEFAULT", "NO AVX", "AVX2")


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is no slower than float32 here: on an accelerator, or on a CPU that has instructions for it."""
    return torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability() not in _SLOW_CPUS
