"""What the tests of runs share: the model, the losses and weights of a run, and runs by several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SHIPPED_MODEL
from transformers import AutoModelForImageTextToText

from ta_llava.training.recipe import Recipe
from ta_llava.training.summary import TrainingSummary


MODEL = SHIPPED_MODEL
READING = ["projector", "prefix", "adapters"]


def losses(folder) -> list[float]:
    return [loss for _, loss in TrainingSummary.read(folder).losses]


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def run_processes(phases: list[Recipe], folder: Path, kind: str, timeout: float = 300) -> None:
    """The recipes by two processes on the CPU, as `torchrun` starts them."""
    paths = []
    for index, recipe in enumerate(phases):
        paths.append(str(folder / f"recipe-{index}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(json.loads(json.dumps(recipe, default=vars))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    program = ["-m", "ta_llava.cli"] if kind == "ddp" else [str(ROOT / "tests" / "fsdp_on_cpu.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, *program, "curriculum", *paths],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its processes too, which wait for each other
        pytest.fail(f"The processes still wait for each other after {timeout} s: {process.communicate()[1][-4000:]}")
    assert process.returncode == 0, errors[-4000:]
