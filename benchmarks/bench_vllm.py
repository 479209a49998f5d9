"""
Measures both systems on vLLM against stock LLaVA on vLLM, with the same backbones and random weights: requests per second
and time to first token of 64 requests that are offered at once, and how many requests fit a KV cache of 1 GiB.

    make bench-vllm
    .venv-vllm-0.32.0/bin/python benchmarks/bench_vllm.py --setup tiny --num-requests 4   # tries it out

All engines run at the same time, each in its process, and are asked by turns. Each request has an image of its own and 40
text tokens; an answer has 16 tokens.
"""

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any


os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import transformers
from compare_with_llava import NUM_TEXT_TOKENS, SETUPS, Setup, cpu_name
from PIL import Image
from transformers import AutoProcessor, LlavaConfig, PreTrainedConfig
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version

from ta_llava import TaLlavaConfig, TaLlavaProcessor, VmtcCmaiLlavaConfig, VmtcCmaiLlavaProcessor


ROOT = Path(__file__).parent.parent
NUM_ANSWER_TOKENS = 16
STOCK = "LLaVA"
TA_LLAVA = "TA-LLaVA"


@dataclass(frozen=True)
class Round:
    """Seconds that all requests of a round took, and until each had its first token."""

    seconds: float
    first_token_seconds: list[float]


def save_parts(folder: Path, config: PreTrainedConfig, processor: Any) -> Path:
    """All of a checkpoint but its weights, which vLLM makes up (`load_format="dummy"`)."""
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def systems(setup: Setup, folder: Path) -> dict[str, Path]:
    """The folders of stock LLaVA, VMTC with 1/2 and 1/9 of the visual tokens, and TA-LLaVA."""
    shipped = AutoProcessor.from_pretrained(ROOT / "checkpoints" / "llava-tiny")
    size, patch_size = setup.vision_config["image_size"], setup.vision_config["patch_size"]
    shipped.image_processor.size = {"height": size, "width": size}
    shipped.patch_size = patch_size
    image_token_id = shipped.tokenizer.convert_tokens_to_ids(shipped.image_token)
    parts = {
        "vision_config": setup.vision_config,
        "text_config": {**setup.text_config, "architectures": ["LlamaForCausalLM"]},
        "vision_feature_layer": setup.vision_feature_layer,
    }
    stock = LlavaConfig(**parts, image_token_index=image_token_id, architectures=["LlavaForConditionalGeneration"])
    folders = {STOCK: save_parts(folder / "stock", stock, shipped)}
    num_patches = (size // patch_size) ** 2
    for budget in (num_patches // 2, num_patches // 9):
        vmtc = {"use_vmtc": True, "vmtc_num_visual_tokens": budget}
        config = VmtcCmaiLlavaConfig(
            **parts,
            **vmtc,
            image_token_index=image_token_id,
            architectures=["VmtcCmaiLlavaForConditionalGeneration"],
        )
        processor = VmtcCmaiLlavaProcessor(
            shipped.image_processor,
            shipped.tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **vmtc,
        )
        folders[f"VMTC, {budget} tokens"] = save_parts(folder / f"vmtc-{budget}", config, processor)
    ta_llava = TaLlavaConfig(
        **parts,
        num_prefix_tokens=setup.num_prefix_tokens,
        image_token_id=image_token_id,
        response_marker_ids=[4, 25],  # of the tokenizer
        architectures=["TaLlavaForConditionalGeneration"],
    )
    processor = TaLlavaProcessor(shipped.image_processor, shipped.tokenizer, num_prefix_tokens=setup.num_prefix_tokens)
    folders[TA_LLAVA] = save_parts(folder / "ta-llava", ta_llava, processor)
    return folders


def make_requests(count: int, size: int, image_token_id: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with an image before 40 text tokens, which end with the response marker. No two images are the same."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for _ in range(count):
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy()
        words = torch.randint(10, 70, (NUM_TEXT_TOKENS - 2,), generator=generator).tolist()
        ids = [image_token_id, *(word for word in words if word != 25), 4, 25]
        requests.append({"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(pixels)}})
    return requests


def run(llm: LLM, requests: list[dict[str, Any]]) -> tuple[Round, int]:
    """A round, and the longest sequence of it in tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    lengths = [len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in outputs]
    return Round(seconds, [output.metrics.first_token_latency for output in outputs]), max(lengths)


def measure(setup: Setup, num_requests: int, num_rounds: int) -> dict[str, dict[str, float]]:
    """By system: requests per second, seconds to the first token, and requests that fit the KV cache."""
    size = setup.vision_config["image_size"]
    with tempfile.TemporaryDirectory() as folder:
        folders = systems(setup, Path(folder))
        image_token_id = json.loads((folders[STOCK] / "config.json").read_text())["image_token_index"]
        engines = {
            name: LLM(
                str(path),
                load_format="dummy",
                dtype="float32",
                enforce_eager=True,
                max_model_len=min(1024, setup.text_config["max_position_embeddings"]),
                max_num_seqs=num_requests,
                disable_log_stats=False,
            )
            for name, path in folders.items()
        }
        rounds: dict[str, list[Round]] = {name: [] for name in engines}
        alone: dict[str, list[Round]] = {name: [] for name in engines}
        lengths = {}
        for index in range(num_rounds + 1):  # the first only warms up
            for name, llm in engines.items():
                count = num_requests if index else 2
                result, lengths[name] = run(llm, make_requests(count, size, image_token_id, seed=index))
                single, _ = run(llm, make_requests(1, size, image_token_id, seed=1000 + index))
                if index:
                    rounds[name].append(result)
                    alone[name].append(single)
        results = {}
        for name, llm in engines.items():
            cache = llm.llm_engine.vllm_config.cache_config
            results[name] = {
                "requests per second": num_requests / median(each.seconds for each in rounds[name]),
                "seconds to the first token, mean of all": median(
                    sum(each.first_token_seconds) / num_requests for each in rounds[name]
                ),
                "seconds to the first token, alone": median(each.first_token_seconds[0] for each in alone[name]),
                "tokens of a sequence": lengths[name],
                "requests that fit the KV cache": cache.num_gpu_blocks // math.ceil(lengths[name] / cache.block_size),
            }
        return results


def format_table(results: dict[str, dict[str, float]]) -> str:
    """A row for each system. In brackets: how many times better than stock LLaVA."""
    names = list(results[STOCK])
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for system, values in results.items():
        cells = []
        for name, value in values.items():
            ratio = value / results[STOCK][name]
            better = 1 / ratio if "seconds" in name or "sequence" in name else ratio
            cells.append(f"{value:.3g}" if system == STOCK else f"{value:.3g} ({better:.2f}x)")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=SETUPS, default="135M", help="sizes of the backbones")
    parser.add_argument("--num-requests", type=int, default=64, help="requests that are offered at once")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each system; medians are reported")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    arguments = parser.parse_args()
    setup = SETUPS[arguments.setup]
    results = measure(setup, arguments.num_requests, arguments.rounds)
    heading = (
        f"{setup.description}; {arguments.num_requests} requests at once, {NUM_TEXT_TOKENS} text tokens and an image each, "
        f"{NUM_ANSWER_TOKENS} answer tokens, rounds: {arguments.rounds}. vLLM {vllm_version}, eager, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, float32, {cpu_name()}. vLLM chooses its threads."
    )
    report = f"{heading}\n\n{format_table(results)}\n"
    print(report)
    if arguments.output:
        arguments.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
