"""
Measures what VMTC saves in LLaVA-NeXT, compared with `transformers.LlavaNextForConditionalGeneration`, on a picture of four
tiles: 2,928 tokens against 322 and 162. All variants share the same random weights, and take turns in one run.

    python benchmarks/compare_llava_next.py --output benchmarks/results/compare_llava_next.md

In bfloat16 a CPU without instructions for it is slow; the prefill alone, in one thread, beside other programs:

    OMP_NUM_THREADS=1 python benchmarks/compare_llava_next.py --dtypes bfloat16 --prefill-only --cpu-time --repeats 1
"""

import argparse
import time
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from compare_vmtc_cmai import SETUPS as LLAVA_SETUPS
from compare_vmtc_cmai import count_bytes, last_layer_timer, share_weights
from compare_with_llava import (
    DECODE,
    FIRST_WORD_ID,
    IMAGE_TOKEN_ID,
    NUM_DECODE_TOKENS,
    NUM_TEXT_TOKENS,
    PREFILL,
    TOWER,
    describe_machine,
    run_decode,
    run_prefill,
    timed,
)
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, LlavaNextConfig
from transformers.initialization import no_init_weights

from ta_llava import VmtcCmaiLlavaNextConfig, VmtcCmaiLlavaNextForConditionalGeneration
from ta_llava.common.files import write_text
from ta_llava.common.precision import has_fast_bfloat16
from ta_llava.vmtc import TRAINING_FREE_VMTC


TILES = 2  # on each side of the picture
BUDGETS = {"7B": (64, 32), "tiny": (7, 4)}  # visual tokens of each view
LAST_LAYER = "last layer in the prefill"
STOCK = "LLaVA-NeXT"


def build_models(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The stock model, and one with VMTC for each budget, all of the same random weights."""
    setup = LLAVA_SETUPS[name]
    size = TILES * setup.vision_config["image_size"]
    parts = {
        "vision_config": setup.vision_config,
        "text_config": setup.text_config,
        "vision_feature_layer": setup.vision_feature_layer,
        "image_grid_pinpoints": [[size, size]],
        "image_token_index": IMAGE_TOKEN_ID,
        "attn_implementation": "sdpa",
    }
    with no_init_weights():  # `normal_` below is faster, and enough here
        stock: Any = AutoModelForImageTextToText.from_config(LlavaNextConfig(**parts), dtype=dtype).eval()
    stock.tie_weights()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.02)
    models = {STOCK: stock}
    for budget in BUDGETS[name]:
        config = VmtcCmaiLlavaNextConfig(**parts, use_vmtc=True, vmtc_num_visual_tokens=budget, **TRAINING_FREE_VMTC)
        with torch.device("meta"):
            model = VmtcCmaiLlavaNextForConditionalGeneration(config)
        share_weights(model.eval(), stock)
        models[f"VMTC, {budget} of each view"] = model
    return models


def count_tokens(model: Any, pixels: torch.Tensor, image_sizes: torch.Tensor) -> int:
    """The visual tokens of a picture, from a run of the model without weights."""
    with torch.device("meta"):
        empty = type(model)(deepcopy(model.config)).eval().float()
        return len(
            empty.model.get_image_features(pixels.float().to("meta"), image_sizes, return_dict=True).pooler_output[0]
        )


@torch.inference_mode()
def measure(
    name: str, batch_size: int, repeats: int, dtype: torch.dtype, prefill_only: bool = False
) -> tuple[dict[str, int], dict[tuple[str, str], float], dict[str, int]]:
    """
    By variant: visual tokens of a picture, median seconds of each quantity, and bytes of the cache after the prefill. With
    `prefill_only`, the visual tokens are random, and there is no round to warm up.
    """
    with torch.inference_mode(False):
        models = build_models(name, dtype)
    setup = LLAVA_SETUPS[name]
    size = setup.vision_config["image_size"]
    pixels = torch.randn(batch_size, 1 + TILES**2, 3, size, size, dtype=dtype)
    image_sizes = torch.tensor([[TILES * size, TILES * size]] * batch_size)
    words = torch.randint(FIRST_WORD_ID, setup.text_config["vocab_size"], (batch_size, NUM_TEXT_TOKENS))
    samples, lengths, cache_bytes = defaultdict(list), {}, {}
    turns = list(models.items())
    for number in tqdm(range(prefill_only, repeats + 1), desc=f"{name}, {dtype}, batch {batch_size}", unit="round"):
        turns.reverse()
        for variant, model in turns:
            if prefill_only:
                width = setup.text_config["hidden_size"]
                features = torch.randn(batch_size, count_tokens(model, pixels, image_sizes), width, dtype=dtype)
            else:
                outputs, tower = timed(model.get_image_features, pixels, image_sizes, return_dict=True)
                features = torch.stack(list(outputs.pooler_output))
            lengths[variant] = features.shape[1]
            placeholders = torch.full((batch_size, features.shape[1]), IMAGE_TOKEN_ID)
            ids = torch.cat([placeholders, words], dim=1)
            with last_layer_timer(model) as of_layer:
                (token, cache), prefill = timed(run_prefill, model, ids, features=features, project=lambda x: x)
            cache_bytes[variant] = count_bytes(cache)
            seconds = {PREFILL: prefill, LAST_LAYER: sum(of_layer)}
            if not prefill_only:
                _, decode = timed(run_decode, model, token, cache)
                seconds |= {TOWER: tower, DECODE: decode / NUM_DECODE_TOKENS}
            if number > 0:  # the first round warms up
                for quantity, value in seconds.items():
                    samples[quantity, variant].append(value)
    return lengths, {key: median(values) for key, values in samples.items()}, cache_bytes


def format_table(
    name: str, lengths: dict[str, int], seconds: dict[tuple[str, str], float], cache_bytes: dict[str, int]
) -> str:
    setup = LLAVA_SETUPS[name]
    missing = setup.full_depth - setup.num_layers
    prefill = {variant: seconds[PREFILL, variant] + missing * seconds[LAST_LAYER, variant] for variant in lengths}
    full = {"prefill behind it": prefill}
    if (TOWER, STOCK) in seconds:
        tower = {variant: seconds[TOWER, variant] for variant in lengths}
        full = {"vision tower": tower, **full}
        full["both"] = {variant: tower[variant] + prefill[variant] for variant in lengths}
        full["decoding step"] = {variant: seconds[DECODE, variant] for variant in lengths}
    order = list(full)
    lines = [f"| | tokens | {' | '.join(order)} | cache |", "|---" + "|---:" * (len(order) + 2) + "|"]
    for variant, length in sorted(lengths.items(), key=lambda item: -item[1]):
        cells = [
            f"{1000 * full[part][variant]:,.0f} ms ({full[part][STOCK] / full[part][variant]:.2f}x)" for part in order
        ]
        cells.append(f"{cache_bytes[variant] / 1024:,.0f} KiB ({cache_bytes[STOCK] / cache_bytes[variant]:.2f}x)")
        lines.append(f"| {variant} | {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


NOTES = (
    f"One picture of {TILES} x {TILES} tiles and {NUM_TEXT_TOKENS} text tokens a row; VMTC has the training-free preset. In "
    "brackets: the stock model's value divided by this one; more is better. The vision tower contains the projector. "
    "In the prefill, the layers of the language model that were left out count as long as its last one. The decoding step "
    "and the cache are those of the layers that were run."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=list(BUDGETS), default="7B")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="take the median of this many rounds, after one")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        help="default: bfloat16 too if the CPU has instructions for it",
    )
    parser.add_argument(
        "--prefill-only", action="store_true", help="neither tower nor decoding, and no round to warm up"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time, which other programs hardly change, for one thread"
    )
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    if arguments.cpu_time and torch.get_num_threads() > 1:
        parser.error(f"--cpu-time is for one thread, not {torch.get_num_threads()}: set OMP_NUM_THREADS=1.")
    torch.manual_seed(0)
    sections = [f"### {arguments.config}: {LLAVA_SETUPS[arguments.config].description}"]
    dtypes = arguments.dtypes or (["float32", "bfloat16"] if has_fast_bfloat16() else ["float32"])
    for dtype in (getattr(torch, name) for name in dtypes):
        with patch("time.perf_counter", time.process_time) if arguments.cpu_time else nullcontext():
            measured = measure(
                arguments.config, arguments.batch_size, arguments.repeats, dtype, arguments.prefill_only
            )
        clock = ", CPU time" if arguments.cpu_time else ""
        sections += [f"Batch {arguments.batch_size}, rounds: {arguments.repeats}{clock}, {describe_machine(dtype)}:"]
        sections += [format_table(arguments.config, *measured)]
    report = "\n\n".join([*sections, NOTES])
    print(report)
    if arguments.output is not None:
        write_text(arguments.output, report + "\n")


if __name__ == "__main__":
    main()
