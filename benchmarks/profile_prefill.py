"""
Shows where the time to TA-LLaVA's first token goes, and its floor: the operations and bytes of each stage, divided by the
rates of this machine, which are measured first. The weights are random. `PROFILE.md` explains the results.

    python benchmarks/profile_prefill.py --output benchmarks/results/profile.md
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compare_with_llava import (
    NUM_DECODE_TOKENS,
    NUM_TEXT_TOKENS,
    SETUPS,
    TA_LLAVA,
    Inputs,
    build_systems,
    describe_machine,
    make_inputs,
    run_decode,
    run_prefill,
    synchronize,
    timed,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ta_llava import TaLlavaForConditionalGeneration
from ta_llava.analysis.cost import CPU_ATTENTION


ROWS = (1, 8, 32, 72, 144, 288, 616, 1232, 4928)  # of a matrix product; TA-LLaVA's prefill has 72, LLaVA's 616
OTHER = "all else: norms, rotary embedding, residuals, masks"


# --- rates of the machine ------------------------------------------------------------------------------------------


def best_seconds(function: Any, repeats: int = 5) -> float:
    """The shortest time of several calls, after one that warms up."""
    function()
    return min(timed(function)[1] for _ in range(repeats))


def measure_rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Operations per second of a large matrix product, and bytes per second of a large copy, read and written."""
    a, b = (torch.randn(4096, 4096, dtype=dtype, device=device) for _ in range(2))
    operations = 2 * 4096**3 / best_seconds(lambda: a @ b)
    source = torch.randn(2**27, device=device)
    target = torch.empty_like(source)
    return operations, 2 * source.nbytes / best_seconds(lambda: target.copy_(source))


def measure_rows(width: int, inner: int, dtype: torch.dtype, device: torch.device) -> list[tuple[int, float, float]]:
    """
    Numbers of rows, each with the seconds of its product with a weight `(inner, width)`: by `torch.nn.Linear`, and compiled
    with a frozen weight, which the compiler lays out once. Four weights take turns, so that none stays in the caches.
    """
    layers = [nn.Linear(width, inner, bias=False, dtype=dtype, device=device) for _ in range(4)]
    results = []
    for rows in tqdm(ROWS, desc="rows of a matrix product"):
        x = torch.randn(rows, width, dtype=dtype, device=device)
        frozen = [torch.compile(layer, options={"freezing": True}, dynamic=False) for layer in layers]
        seconds = (best_seconds(partial(_run_all, chosen, x)) / len(layers) for chosen in (layers, frozen))
        results.append((rows, *seconds))
        torch._dynamo.reset()
    return results


def _run_all(layers: list[Any], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


# --- stages of the model -------------------------------------------------------------------------------------------


def stages_of(model: TaLlavaForConditionalGeneration) -> dict[nn.Module, str]:
    """The stage of each timed module. An adapter has two stages: it makes keys and values, and it reads."""
    base = model.model
    stages: dict[nn.Module, str] = {
        base.vision_tower: "vision tower",
        base.multi_modal_projector: "projector",
        base.vision_adapter: "vision adapter",
        base.text_adapter: "text adapter",
        model.lm_head: "language modelling head",
    }
    for layer in base.language_model.layers:
        stages[layer.self_attn], stages[layer.mlp] = "language model, attention", "language model, MLP"
    return stages


@contextmanager
def counting(model: TaLlavaForConditionalGeneration, count: Any) -> Iterator[dict[str, float]]:
    """Sums the growth of `count()` in each stage of the model."""
    sums: dict[str, float] = defaultdict(float)
    begun: list[float] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        begun.append(count())

    def end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        stage = stages[module]
        if stage.endswith("adapter"):
            stage += ", reading" if args[0] == "read" else ", keys and values"
        sums[stage] += count() - begun.pop()

    stages = stages_of(model)
    with ExitStack() as hooks:
        for module in stages:
            hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        yield sums


@contextmanager
def counting_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Counts the bytes that matrix products read and write, with weights, in the first item of a list."""
    total = [0]

    def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        total[0] += module.weight.nbytes + args[0].nbytes + output.nbytes

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                hooks.callback(module.register_forward_hook(count).remove)
        yield total


def clock() -> float:
    synchronize()
    return time.perf_counter()


def profile(
    model: TaLlavaForConditionalGeneration, inputs: Inputs, repeats: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Median seconds, operations and bytes of each stage of a prefill with an image, and of the whole (`"all"`)."""

    def run() -> Any:
        return run_prefill(model, inputs.input_ids[TA_LLAVA], pixel_values=inputs.pixel_values)

    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, counting(model, counter.get_total_flops) as operations:
        run()
    operations = {**operations, "all": counter.get_total_flops()}
    with counting_bytes(model) as total, counting(model, lambda: total[0]) as num_bytes:
        run()
    num_bytes = {**num_bytes, "all": total[0]}
    samples = defaultdict(list)
    for _ in tqdm(range(repeats), desc="prefill"):
        with counting(model, clock) as seconds:
            _, whole = timed(run)
        for stage, value in {**seconds, "all": whole}.items():
            samples[stage].append(value)
    return {stage: median(values) for stage, values in samples.items()}, operations, num_bytes


# --- report --------------------------------------------------------------------------------------------------------


def format_stages(
    seconds: dict[str, float], operations: dict[str, float], num_bytes: dict[str, float], rates: tuple[float, float]
) -> str:
    """A table of the stages: time, operations, bytes, floor, and time divided by floor."""
    lines = ["| stage | ms | share | GFLOP | MB | floor, ms | time / floor |", "|---|---:|---:|---:|---:|---:|---:|"]
    stages = [stage for stage in seconds if stage != "all"]
    floors = {}
    for stage in stages:
        floors[stage] = max(operations[stage] / rates[0], num_bytes[stage] / rates[1])
        lines.append(
            f"| {stage} | {seconds[stage] * 1000:,.1f} | {seconds[stage] / seconds['all']:.0%} | "
            f"{operations[stage] / 1e9:,.1f} | {num_bytes[stage] / 1e6:,.0f} | {floors[stage] * 1000:,.1f} | "
            f"{seconds[stage] / floors[stage]:.1f} |"
        )
    rest = seconds["all"] - sum(seconds[stage] for stage in stages)
    lines.append(f"| {OTHER} | {rest * 1000:,.1f} | {rest / seconds['all']:.0%} | | | | |")
    floor = sum(floors.values())
    lines.append(
        f"| **time to first token** | {seconds['all'] * 1000:,.1f} | 100% | {operations['all'] / 1e9:,.1f} | "
        f"{num_bytes['all'] / 1e6:,.0f} | {floor * 1000:,.1f} | {seconds['all'] / floor:.1f} |"
    )
    return "\n".join(lines)


def format_rows(results: list[tuple[int, float, float]], width: int, inner: int, rates: tuple[float, float]) -> str:
    """A table of the matrix products: time, rate and floor by the number of rows."""
    lines = ["| rows | ms | of it a row, µs | GFLOP/s | frozen, ms | floor, ms |", "|---:|---:|---:|---:|---:|---:|"]
    for rows, seconds, frozen in results:
        operations = 2 * rows * width * inner
        floor = max(operations / rates[0], 2 * (width * inner + rows * (width + inner)) / rates[1])
        lines.append(
            f"| {rows:,} | {seconds * 1000:.2f} | {seconds / rows * 1e6:.1f} | {operations / seconds / 1e9:,.0f} | "
            f"{frozen * 1000:.2f} | {floor * 1000:.2f} |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=list(SETUPS), default="gemma-2-2b")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3, help="take the median of this many prefills")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    setup, dtype, device = SETUPS[arguments.config], getattr(torch, arguments.dtype), torch.device(arguments.device)
    torch.manual_seed(0)

    rates = measure_rates(dtype, device)
    width, inner = setup.text_config["hidden_size"], setup.text_config["intermediate_size"]
    with torch.inference_mode(False), torch.no_grad():
        rows = measure_rows(width, inner, dtype, device)
        model = build_systems(setup, dtype, device).ta_llava
    parts = [
        f"{setup.description}, {NUM_TEXT_TOKENS} text tokens and one image a row. {describe_machine(dtype, device)}.",
        f"Rates of the machine: {rates[0] / 1e9:,.0f} GFLOP/s (a product of matrices of 4096 x 4096), "
        f"{rates[1] / 1e9:,.1f} GB/s (a copy of 0.5 GB, read and written).",
        f"A product with a weight of {inner:,} x {width:,}, by the number of rows:",
        format_rows(rows, width, inner, rates),
    ]
    for batch_size in arguments.batch_sizes:
        inputs = make_inputs(setup, batch_size, 1, dtype, device)
        seconds, operations, num_bytes = profile(model, inputs, arguments.repeats)
        token, cache = run_prefill(model, inputs.input_ids[TA_LLAVA], pixel_values=inputs.pixel_values)
        with counting_bytes(model) as total:
            run_decode(model, token, cache)
        step_floor = total[0] / NUM_DECODE_TOKENS / rates[1]
        _, decoded = timed(run_decode, model, token, cache)
        parts += [
            f"Batch {batch_size}:",
            format_stages(seconds, operations, num_bytes, rates),
            f"A decoding step takes {decoded / NUM_DECODE_TOKENS * 1000:,.1f} ms; reading the weights once takes "
            f"{step_floor * 1000:,.1f} ms at least.",
        ]
    report = "\n\n".join(parts)
    print(report)
    if arguments.output is not None:
        arguments.output.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
