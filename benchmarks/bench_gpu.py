"""
Measures both systems on one GPU against LLaVA with the same backbones: TA-LLaVA on Gemma-2-2B's shapes, VMTC and CMAI on
LLaVA-1.5-7B's, with random weights; eager, compiled, and compiled as CUDA graphs. Runs the tests of quantised weights too.

    pip install -e '.[quantization]' pytest              # on Linux, PyPI has the CUDA build of torch
    pip install flash-attn --no-build-isolation          # for the rows with flash attention
    python benchmarks/bench_gpu.py                       # or `make bench-gpu`
    python benchmarks/bench_gpu.py --device cpu --tiny   # tries everything out in a minute, without a GPU

A cell is one batch of one comparison. The most important cells are measured first. Each finished one is kept in the JSON
file, so the same command resumes. Those that are left when the time is up are named. On the CPU there are no CUDA graphs.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import FunctionType
from typing import Any

import compare_vmtc_cmai as vmtc_cmai
import compare_with_llava as ta_llava_and_llava
import torch
from compare_vmtc_cmai import Variant
from compare_with_llava import (
    DECODE,
    FIRST_TOKEN,
    LLAVA,
    NUM_DECODE_TOKENS,
    NUM_TEXT_TOKENS,
    PREFILL,
    TA_LLAVA,
    TOWER,
    allocated_bytes,
    cpu_name,
    decode_step,
    describe_machine,
    kernel_seconds,
    run_decode,
    run_prefill,
    run_tower,
    synchronize,
    timed,
)
from transformers import Cache, PreTrainedModel, StaticCache

from ta_llava.cmai_cache import prepare_cache, reserve_state


ROOT = Path(__file__).parent.parent
KERNELS, PEAK, COMPILE = "kernels of the first token", "peak memory beyond the weights", "compilation"
MAX_SECONDS = 15  # a cell that takes longer has fewer rounds, but at least three
QUANTITIES = {TOWER: "ms", PREFILL: "ms", FIRST_TOKEN: "ms", DECODE: "ms", KERNELS: "ms", PEAK: "MiB", COMPILE: "s"}
UNITS = {"ms": 1e-3, "MiB": 2**20, "s": 1.0}

EAGER, COMPILED, CUDA_GRAPHS = "eager", "compiled", "CUDA graphs"
MODES: dict[str, dict[str, Any]] = {COMPILED: {}, CUDA_GRAPHS: {"mode": "reduce-overhead"}}
BY_TA_LLAVA, BY_VMTC_CMAI, QUANTIZATION = "ta-llava", "vmtc-cmai", "quantization"
LIBRARY, FLASH = "library's choice", "flash_attention_2"


@dataclass(frozen=True)
class Cell:
    """One batch of one comparison, in which all systems take turns."""

    part: str
    attention: str
    mode: str
    batch_size: int
    num_images: int

    @property
    def name(self) -> str:
        images = f"{self.num_images} image" + "s" * (self.num_images > 1)
        return f"{self.part}, attention {self.attention}, {self.mode}, batch {self.batch_size}, {images}"


@dataclass(frozen=True)
class Comparison:
    """
    Systems with the same weights, and their inputs.

    Args:
        description (`str`): The backbones in words.
        models (`dict[str, PreTrainedModel]`): By name; LLaVA, or what counts as such, comes first.
        make_inputs (`Callable`): Takes batch size and images per row. Returns pixels, and token ids by name.
    """

    description: str
    models: dict[str, PreTrainedModel]
    make_inputs: Callable[[int, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Bar:
    """A limit of the ratio of two systems' values of a quantity; `is_most` if it is a maximum."""

    quantity: str
    system: str
    baseline: str
    limit: float
    is_most: bool = False


# --- cells and bars ------------------------------------------------------------------------------------------------


def list_cells(parts: list[str], batch_sizes: list[int], images: list[int], modes: list[str]) -> list[Cell]:
    """All cells, the most important first: eager ones take seconds, and CUDA graphs have bars that eager mode has not."""
    kinds = [(LIBRARY, mode) for mode in (EAGER, CUDA_GRAPHS, COMPILED) if mode in modes]
    kinds += [(FLASH, EAGER)] if EAGER in modes else []
    batches = [(size, count) for count in images for size in batch_sizes]
    compared = [part for part in parts if part != QUANTIZATION]
    cells = [Cell(part, *kind, *batch) for kind in kinds[:1] for part in compared for batch in batches]
    cells += [Cell(part, *kind, *batch) for kind in kinds[1:] for batch in batches for part in compared]
    return cells


def bars_of(cell: Cell, systems: list[str]) -> list[Bar]:
    """The limits that a cell is held to. All ratios are of the same mode."""
    if cell.part == BY_TA_LLAVA:
        bars = [Bar(DECODE, TA_LLAVA, LLAVA, 1.0)]
        if cell.batch_size == 1:
            bars.append(Bar(FIRST_TOKEN, TA_LLAVA, LLAVA, 1.0 if cell.mode == EAGER else 1.5))
        elif cell.batch_size >= 8 and cell.mode != EAGER:
            bars.append(Bar(FIRST_TOKEN, TA_LLAVA, LLAVA, 3.0))
        return bars
    stock, compressed = systems[:2]
    bars = [Bar(DECODE, compressed, stock, 1.0)]
    if cell.batch_size == 1 or cell.batch_size >= 8:
        bars.append(Bar(FIRST_TOKEN, compressed, stock, 1.5 if cell.batch_size == 1 else 3.0))
    for with_cmai, without in zip(systems[2:], systems):
        bars += [Bar(quantity, with_cmai, without, 1.1, is_most=True) for quantity in (FIRST_TOKEN, DECODE)]
    return bars


# --- systems -------------------------------------------------------------------------------------------------------


def build_comparison(part: str, size: str, device: torch.device, attention: str) -> Comparison:
    """The systems of a part. The attention of the library is eager for Gemma-2, which soft-caps, and otherwise SDPA."""
    if part == BY_TA_LLAVA:
        setup = ta_llava_and_llava.SETUPS[{"full": "gemma-2-2b"}.get(size, size)]
        dtype = getattr(torch, setup.dtype)
        asked = None if attention == LIBRARY else attention
        systems = ta_llava_and_llava.build_systems(setup, dtype, device, asked)
        models = {name: systems.models[name] for name in (LLAVA, TA_LLAVA)}
        if asked is not None:
            for model in models.values():
                model.model.vision_tower.set_attn_implementation(asked)
        ta_llava_and_llava.check_backbones(systems)

        def make_inputs(batch_size: int, num_images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            inputs = ta_llava_and_llava.make_inputs(setup, batch_size, num_images, dtype, device)
            return inputs.pixel_values, inputs.input_ids

        return Comparison(setup.description, models, make_inputs)

    backbones = ta_llava_and_llava.SETUPS["vicuna-7b"]
    of_size = vmtc_cmai.SETUPS[{"full": "7B"}.get(size, size)]
    if size == "full":
        of_size = replace(of_size, text_config=backbones.text_config, description=backbones.description)
    dtype = torch.bfloat16 if size == "full" else torch.float32
    stock, compressed = of_size.stock, Variant(of_size.budgets[1], use_vmtc=True)
    variants = [compressed]
    if attention == LIBRARY:  # flash attention cannot hide single keys from single queries, as CMAI does
        variants += [replace(stock, use_cmai=True), replace(compressed, use_cmai=True)]
    implementation = "sdpa" if attention == LIBRARY else attention
    built = vmtc_cmai.build_models(of_size, dtype, variants, device, implementation)

    def make_inputs(batch_size: int, num_images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs = vmtc_cmai.make_inputs(of_size, batch_size, dtype, num_images, device)
        return inputs.pixel_values, {each.label: inputs.input_ids[each.num_visual_tokens] for each in built}

    return Comparison(of_size.description, {variant.label: model for variant, model in built.items()}, make_inputs)


class Runner:
    """
    One system in one mode, for one batch.

    Args:
        options (`dict`, *optional*): Arguments of `torch.compile`; eager by default.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        options: dict[str, Any] | None = None,
    ):
        self.model, self.input_ids, self.pixel_values = model, input_ids, pixel_values
        self.is_compiled = options is not None
        functions: list[Any] = [run_tower, run_prefill, decode_step]
        if options is not None:
            functions = [torch.compile(with_own_code(each, name), fullgraph=True, **options) for each in functions]
        self._tower, self._prefill, self._step = functions
        self._cache = self._allocate_cache() if self.is_compiled else None

    def _allocate_cache(self) -> Cache:
        """As `generate()` of a compiled model does."""
        model: Any = self.model
        cache = StaticCache(model.config.text_config, max_cache_len=self.input_ids.shape[1] + NUM_DECODE_TOKENS)
        shape = model._get_static_cache_init_shape()
        cache.early_initialization(len(self.input_ids), *shape, dtype=model.dtype, device=model.device)
        return cache

    def _empty_cache(self) -> Cache:
        cache: Any = self._cache
        cache.reset()
        config = self.model.config
        if getattr(config, "use_cmai", False):
            prepare_cache(cache, config.text_config)
            reserve_state(cache, self.input_ids == config.image_token_id, config.cmai_focus)
        return cache

    def tower(self) -> torch.Tensor:
        """Features of the images."""
        features = self._tower(self.model, self.pixel_values)
        return features.clone() if self.is_compiled else features  # the next CUDA graph writes over what one returns

    def prefill(self, features: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """First token and cache, from the features."""
        if not self.is_compiled:
            return run_prefill(self.model, self.input_ids, features=features)
        token, cache = self._prefill(self.model, self.input_ids, features=features, cache=self._empty_cache())
        return token.clone(), cache

    def first_token(self) -> tuple[torch.Tensor, Cache]:
        """First token and cache, from the pixels."""
        if not self.is_compiled:
            return run_prefill(self.model, self.input_ids, pixel_values=self.pixel_values)
        return self.prefill(self.tower())

    def decode(self, token: torch.Tensor, cache: Cache) -> None:
        """Decodes greedily after a prefill."""
        if not self.is_compiled:
            run_decode(self.model, token, cache)
            return
        for _ in range(NUM_DECODE_TOKENS):
            token = self._step(self.model, token, cache).clone()


def with_own_code(function: Any, name: str) -> Any:
    """
    A copy of a function that the compiler tells from others. Of one function it takes shapes that differ between calls for
    variables, and the systems differ in theirs.
    """
    code = function.__code__.replace(co_name=f"{function.__name__} of {name}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


# --- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_cell(cell: Cell, comparison: Comparison, repeats: int) -> dict[str, dict[str, float]]:
    """Medians by system and quantity, in seconds or bytes."""
    pixel_values, input_ids = comparison.make_inputs(cell.batch_size, cell.num_images)
    runners, compile_seconds = {}, {}
    for name, model in comparison.models.items():
        eager = Runner(name, model, input_ids[name], pixel_values)
        first, _ = eager.first_token()  # this also warms up, and installs the hooks that capture hidden states
        runners[name] = eager
        if cell.mode != EAGER:
            runners[name] = Runner(name, model, input_ids[name], pixel_values, MODES[cell.mode])
            (token, cache), compile_seconds[name] = timed(runners[name].first_token)
            compile_seconds[name] += timed(runners[name].decode, token, cache)[1]
            check_first_token(cell, name, first, token)
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in runners}
    turns, start = list(runners), time.monotonic()
    for index in range(2 + repeats):  # CUDA graphs are recorded at the second call, and replayed from the third on
        if index >= 5 and time.monotonic() - start > MAX_SECONDS:
            break
        turns.reverse()  # later systems find warm caches
        seconds = measure_round({name: runners[name] for name in turns})
        if index >= 2:
            for name, values in seconds.items():
                for quantity, value in values.items():
                    samples[name][quantity].append(value)
    medians = {name: {quantity: median(of) for quantity, of in values.items()} for name, values in samples.items()}
    for name, runner in runners.items():
        medians[name][PEAK] = peak_bytes(runner)
        if pixel_values.device.type == "cuda":
            medians[name][KERNELS] = kernel_seconds(runner.first_token)
        if name in compile_seconds:
            medians[name][COMPILE] = compile_seconds[name]
    return medians


def check_first_token(cell: Cell, name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Warns of other tokens than in eager mode: with random weights, many are nearly as likely as the likeliest."""
    if not torch.equal(expected, found):
        same = (expected == found).float().mean().item()
        print(f"{cell.name}: {same:.0%} of the first tokens of {name} are those of eager mode.", file=sys.stderr)


def measure_round(runners: dict[str, Runner]) -> dict[str, dict[str, float]]:
    """Seconds of each quantity, once. Within a quantity the systems take turns."""
    seconds: dict[str, dict[str, float]] = {name: {} for name in runners}
    features, prefilled = {}, {}
    for name, runner in runners.items():
        features[name], seconds[name][TOWER] = timed(runner.tower)
    for name, runner in runners.items():
        prefilled[name], seconds[name][PREFILL] = timed(runner.prefill, features[name])
    for name, runner in runners.items():
        seconds[name][DECODE] = timed(runner.decode, *prefilled.pop(name))[1] / NUM_DECODE_TOKENS
    for name, runner in runners.items():
        seconds[name][FIRST_TOKEN] = timed(runner.first_token)[1]
    return seconds


def peak_bytes(runner: Runner) -> int:
    """
    Peak of memory from the pixels to the first token, beyond what there was before. The cache of a compiled model, and the
    memory of a CUDA graph, are there before.
    """
    if runner.pixel_values.device.type != "cuda":
        return allocated_bytes(runner.first_token)
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.first_token()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_quantization_tests() -> str:
    """The last line of what the tests of quantised weights print."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_quantization.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    failed = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([*failed, (printed.strip().splitlines() or ["no output"])[-1].strip("= ")])


# --- report --------------------------------------------------------------------------------------------------------


def format_cell(cell: Cell, medians: dict[str, dict[str, float]]) -> str:
    """A table of one cell, with the ratios of the first system's values to those of each."""
    base = next(iter(medians.values()))
    quantities = [quantity for quantity in QUANTITIES if quantity in base]
    lines = [f"| {cell.mode} | {' | '.join(quantities)} |", f"|---{'|---:' * len(quantities)}|"]
    for name, values in medians.items():
        cells = []
        for quantity in quantities:
            unit, value = QUANTITIES[quantity], values[quantity]
            ratio = f" ({base[quantity] / value:.2f}x)" if value > 0 and quantity != COMPILE else ""
            cells.append(f"{value / UNITS[unit]:,.2f} {unit}{ratio}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_bars(cell: Cell, medians: dict[str, dict[str, float]]) -> list[str]:
    """A row of the table of bars for each bar of a cell."""
    rows = []
    for bar in bars_of(cell, list(medians)):
        ours, theirs = medians[bar.system][bar.quantity], medians[bar.baseline][bar.quantity]
        ratio = ours / theirs if bar.is_most else theirs / ours
        is_met = ratio <= bar.limit if bar.is_most else ratio >= bar.limit
        label = f"{bar.system} / {bar.baseline}" if bar.is_most else f"{bar.baseline} / {bar.system}"
        sign = "≤" if bar.is_most else "≥"
        where = f"{cell.mode}, batch {cell.batch_size}, images {cell.num_images}"
        where += "" if cell.attention == LIBRARY else f", {cell.attention}"
        met = "yes" if is_met else "**no**"
        rows.append(f"| {bar.quantity}: {label} | {where} | {ratio:.2f}x | {sign} {bar.limit:.2f}x | {met} |")
    return rows


NOTES = f"""Medians, in turns within one run; {NUM_TEXT_TOKENS} text tokens a row, {NUM_DECODE_TOKENS} tokens decoded. In
brackets: LLaVA's value divided by this one. Weights are random and shared. The prefill begins behind the tower, the first
token at the pixels. Kernels: the time in which the GPU computes. Compiled modes have a static cache, which is there before
the first token and so not in its peak. Compilation: the first call of tower, prefill and decoding step together. A bar
compares two systems of the same mode."""


def format_report(result: dict[str, Any], cells: list[Cell]) -> str:
    """The whole report in Markdown, with what was skipped and why."""
    measured = [
        (cell, result["cells"][cell.name]) for cell in cells if "medians" in result["cells"].get(cell.name, {})
    ]
    lines = [f"# {result['card']}", result["machine"]]
    bars = [row for cell, record in measured for row in format_bars(cell, record["medians"])]
    if bars:
        lines += ["## Bars", "\n".join(["| | where | ratio | bar | met |", "|---|---|---:|---:|---|", *bars])]
    for part in dict.fromkeys(cell.part for cell, _ in measured):
        for cell, record in measured:
            if cell.part == part:
                images = f"{cell.num_images} image" + "s" * (cell.num_images > 1)
                where = f"{cell.mode}, batch {cell.batch_size}, {images}, attention: {cell.attention}"
                lines += [f"### {record['description']}: {where}", format_cell(cell, record["medians"])]
    if QUANTIZATION in result["cells"]:
        lines += ["## Quantised weights", f"`tests/test_quantization.py`: {result['cells'][QUANTIZATION]['outcome']}"]
    if result["skipped"]:
        lines += ["## Skipped", "\n".join(f"- {name}: {why}" for name, why in result["skipped"].items())]
    return "\n\n".join([*lines, NOTES]) + "\n"


def write(result: dict[str, Any], cells: list[Cell], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(format_report(result, cells), encoding="utf-8")


# --- the run -------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="full", help="tiny shapes")
    size.add_argument("--small", dest="size", action="store_const", const="135M", help="shapes of 135M parameters")
    parts = [BY_TA_LLAVA, BY_VMTC_CMAI, QUANTIZATION]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    modes = [EAGER, COMPILED, CUDA_GRAPHS]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4], help="numbers of images per row")
    parser.add_argument(
        "--repeats", type=int, default=9, help="take the median of this many rounds, after two that warm up"
    )
    parser.add_argument(
        "--budget", type=float, default=450, help="begin nothing after this many seconds (default: %(default)s)"
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU. To try the script out: --device cpu --tiny.")
    return parsed


def why_skipped(cell: Cell, device: torch.device) -> str | None:
    """Why a cell cannot be measured on this machine."""
    if cell.mode == CUDA_GRAPHS and device.type != "cuda":
        return "there is no GPU"
    if cell.attention == FLASH and (device.type != "cuda" or find_spec("flash_attn") is None):
        return "flash-attn or a GPU is missing"
    return None


def main(arguments: list[str] | None = None) -> None:
    options, start = parse_arguments(arguments), time.monotonic()
    device = torch.device(options.device)
    torch.manual_seed(0)
    card = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    size = "" if options.size == "full" else f"_{options.size}"
    output = options.output_dir / f"bench_gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}{size}.json"
    machine = describe_machine(torch.bfloat16 if options.size == "full" else torch.float32, device)
    result: dict[str, Any] = {"card": card, "machine": machine, "cells": {}, "skipped": {}}
    if output.exists():
        earlier = json.loads(output.read_text(encoding="utf-8"))
        if earlier["machine"] == machine:
            result["cells"] = earlier["cells"]
    cells = list_cells(options.parts, options.batch_sizes, options.images, options.modes)
    longest: dict[str, float] = defaultdict(float)  # seconds of a cell, by mode
    comparisons: dict[tuple[str, str], Comparison] = {}
    for cell in cells:
        if cell.name in result["cells"]:
            continue
        why = why_skipped(cell, device)
        begin = time.monotonic()
        if why is None and begin - start + longest[cell.mode] > options.budget:
            why = f"the budget of {options.budget:g} seconds is used up; run the same command again"
        if why is not None:
            result["skipped"][cell.name] = why
            continue
        print(f"{begin - start:5.0f} s  {cell.name}", flush=True)
        try:
            result["cells"][cell.name] = run_cell(cell, comparisons, options.size, device, options.repeats)
        except Exception as error:  # one cell that fails must not cost the others
            result["skipped"][cell.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(result["skipped"][cell.name], file=sys.stderr)
        free_memory()
        longest[cell.mode] = max(longest[cell.mode], time.monotonic() - begin)
        write(result, cells, output)
    if QUANTIZATION in options.parts and QUANTIZATION not in result["cells"]:
        if time.monotonic() - start > options.budget:
            result["skipped"][QUANTIZATION] = f"the budget of {options.budget:g} seconds is used up"
        else:
            comparisons.clear()
            free_memory()
            result["cells"][QUANTIZATION] = {"outcome": run_quantization_tests()}
    write(result, cells, output)
    print(format_report(result, cells))
    print(f"Wrote {output} and {output.with_suffix('.md')} after {time.monotonic() - start:.0f} seconds.")


def run_cell(
    cell: Cell, comparisons: dict[tuple[str, str], Comparison], size: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """The record of a cell. Comparisons with one attention implementation stay in memory for further cells."""
    key = cell.part, cell.attention
    if key not in comparisons:
        if any(attention != cell.attention for _, attention in comparisons):
            comparisons.clear()
            free_memory()
        comparisons[key] = build_comparison(cell.part, size, device, cell.attention)
    medians = measure_cell(cell, comparisons[key], repeats)
    return {**asdict(cell), "description": comparisons[key].description, "medians": medians}


def free_memory() -> None:
    """Frees the graphs of compiled models, and what torch keeps."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
