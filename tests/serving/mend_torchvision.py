"""
Lets torchvision of PyPI, which is built for CUDA, be imported beside a torch for the CPU. Its compiled operators cannot be
loaded there, and its import fails because two of them are not even declared. vLLM needs only its image transforms, so
declaring them is enough. `make test-vllm` runs this in its own environment.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


DECLARATIONS = """import torch

_operators = torch.library.Library("torchvision", "DEF")
for _operator in ("nms", "qnms"):
    _operators.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""


def mend() -> None:
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0:
        return  # a torchvision for the CPU
    path = Path(find_spec("torchvision").origin)
    path.write_text(DECLARATIONS + path.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    mend()
