"""
Engines of vLLM on the CPU, in float32 and without compiling, and `generate()` to compare them with. Import it before vLLM,
which reads its environment when it is imported.
"""

import gc
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest


if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the sampler would be compiled
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from conftest import make_lively, text_config
from families import build, build_processor
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_parts import LANGUAGE_MODELS, save_language_model, save_tower
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.config import CUDAGraphMode

from ta_llava.building.assemble import assemble_llava, assemble_ta_llava
from ta_llava.inference import load


MAX_NEW_TOKENS = 8
TEXT = "what is in the image? compare the two. is the model an assistant, or a user? helpful answers."
# The heads of the other tests are too narrow for the kernels of vLLM.
SIZES = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
# Of a family of `LANGUAGE_MODELS`, with another backbone.
FAMILIES = {"gemma3": "gemma", "qwen3": "chatml"}


class Request(NamedTuple):
    images: list[Any]
    question: str
    uuids: Sequence[str] = ()  # of the images, for vLLM


class Answer(NamedTuple):
    prompt_ids: list[int]
    ids: list[int]
    log_probabilities: Any  # of the first token: by id, or of the whole vocabulary


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(pixels).resize((40 + 3 * seed % 20, 40), Image.Resampling.NEAREST)


def requests(count: int) -> list[Request]:
    """Questions of many lengths about one image, two images or none. Some share an image, and some a question."""
    words = TEXT.split()
    return [
        Request(
            images=[picture(n % 7 + k) for k in range((1, 1, 0, 2, 1)[n % 5])],
            question=" ".join(words[(n + k) % len(words)] for k in range(1 + n * 5 % 31)),
        )
        for n in range(count)
    ]


def engine(folder: str | Path, **kwargs: Any) -> LLM:
    gc.collect()  # an engine that ends later would take the process groups of this one with it
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "disable_log_stats": True,
        "kv_cache_memory_bytes": 2**27,
        **kwargs,
    }
    return LLM(str(folder), **settings)


def messages(request: Request, kind: str) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = [{"type": kind, kind: image} for image in request.images]
    if kind == "image_pil":
        for image, uuid in zip(images, request.uuids):
            image["uuid"] = uuid
    return [{"role": "user", "content": [*images, {"type": "text", "text": request.question}]}]


def ask_vllm(llm: LLM, asked: list[Request]) -> list[Answer]:
    """Answers to requests that are offered at once."""
    outputs = llm.chat(
        [messages(request, "image_pil") for request in asked],
        SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, logprobs=5),
        use_tqdm=False,
    )
    return [
        Answer(
            list(output.prompt_token_ids),
            list(output.outputs[0].token_ids),
            {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()},
        )
        for output in outputs
    ]


@torch.no_grad()
def ask_generate(folder: str | Path, asked: list[Request], model: Any = None, processor: Any = None) -> list[Answer]:
    """Answers of `generate()`, one request at a time."""
    if model is None:
        model, processor = load(folder)
    answers = []
    for request in asked:
        inputs = processor.apply_chat_template(
            messages(request, "image"),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        length = inputs["input_ids"].shape[1]
        answers.append(
            Answer(
                inputs["input_ids"][0].tolist(),
                output.sequences[0, length:].tolist(),
                output.scores[0][0].log_softmax(dim=-1),
            )
        )
    return answers


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    """Prompt ids and greedy answers are identical, and log-probabilities of the first token within 2e-3."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.prompt_ids == other.prompt_ids
        assert one.ids == other.ids
        for token, log_probability in one.log_probabilities.items():
            assert abs(log_probability - float(other.log_probabilities[token])) < 2e-3


def save_random_model(
    folder: Path, system: str, family: str, tower: str, config_fields: dict[str, Any] | None = None, **arguments: Any
) -> Path:
    """
    A TA-LLaVA ("ta-llava") or LLaVA ("llava") with lively random weights, of a language model of `LANGUAGE_MODELS` or
    `FAMILIES` and a tower of `save_tower`. `arguments` are those of `assemble_...`.
    """
    parts = folder / "parts"
    save_tower(parts / tower, tower)
    known = FAMILIES.get(family, family)
    if family in FAMILIES:
        LANGUAGE_MODELS[family] = (family, *LANGUAGE_MODELS[known][1:])
    save_language_model(parts / family, family, **SIZES)
    make = {"llava": assemble_llava, "ta-llava": assemble_ta_llava}[system]
    make(folder / "new", parts / tower, parts / family, **arguments)
    model = make_lively(AutoModelForImageTextToText.from_pretrained(folder / "new", **(config_fields or {})))
    model.save_pretrained(folder / "lively")
    AutoProcessor.from_pretrained(folder / "new").save_pretrained(folder / "lively")
    return folder / "lively"


def save_model_of_views(folder: Path, family: str, **fields: Any) -> Path:
    """A LLaVA of `VIEWS`, with lively random weights."""
    processor = build_processor(family, **fields)
    sizes = {"vocab_size": len(processor.tokenizer), "num_hidden_layers": 4, "max_position_embeddings": 512, **SIZES}
    model = build(family, text_config=text_config("llama", **sizes), use_cmai=False, **fields)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def num_preemptions(llm: LLM) -> int:
    """Of an engine with `disable_log_stats=False`."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def rename_tower(folder: Path) -> None:
    """Writes `vision_model.` into the names of the tower, as transformers did before 5.23, or takes it out."""
    weights = load_file(folder / "model.safetensors")
    has_old = any(".vision_model." in name for name in weights)
    old, new = (
        ("vision_tower.vision_model.", "vision_tower.") if has_old else ("vision_tower.", "vision_tower.vision_model.")
    )
    renamed = {name.replace(old, new): weight for name, weight in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def graph_mode(name: str) -> CUDAGraphMode:
    """One of vLLM's ways to use CUDA graphs."""
    return CUDAGraphMode[name]
