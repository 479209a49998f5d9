"""How fast this machine multiplies matrices in bfloat16."""

import torch


# A CPU with AVX2 alone takes thirty times as long as in float32 (a product of 9,000 x 192 and 192 x 512, torch 2.13).
_SLOW_CPUS = ("DEFAULT", "NO AVX", "AVX2")


def has_fast_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 is not much slower than float32 on a type of device: any accelerator, or a CPU with AVX-512."""
    return device != "cpu" or torch.backends.cpu.get_cpu_capability() not in _SLOW_CPUS
