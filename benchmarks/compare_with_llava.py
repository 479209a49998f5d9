"""
Compares prefill, decoding, cache and memory of TA-LLaVA with `transformers.LlavaForConditionalGeneration` and with
InstructBLIP's Q-Former. All have the same vision tower and language model with the same random weights. They take turns in
one run on one machine.

    make bench
    python benchmarks/compare_with_llava.py --configs gemma-2-2b vicuna-7b --images 1 4 --device cuda
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    LlavaConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration
from ta_llava.library_versions import CACHE, one_hidden_state


NUM_TEXT_TOKENS = 40
NUM_DECODE_TOKENS = 16
NUM_QUERIES = 32  # queries of the Q-Former for each image

# The ids make no difference to the time, so all configurations have the same.
RESPONSE_MARKER_IDS = [4, 5]
IMAGE_TOKEN_ID = 6
FIRST_WORD_ID = 7

LLAVA, Q_FORMER, TA_LLAVA = "LLaVA", "Q-Former", "TA-LLaVA"
SECOND_QUESTION = "TA-LLaVA, second question"
TOWER, PREFILL, FIRST_TOKEN, DECODE = "vision tower", "prefill", "time to first token", "decode, per token"
TEXT_ONLY, KERNELS = "language model alone", "kernels of the prefill"


@dataclass(frozen=True)
class Setup:
    """
    The backbones that all systems share, and the prefix of TA-LLaVA.

    Args:
        description (`str`): The backbones in words.
        vision_config, text_config (`dict`): Configs of the backbones, with `model_type`.
        vision_feature_layer (`int`): Index of the tower's hidden state that gives the visual tokens.
        num_prefix_tokens (`int`): Number of prefix tokens, which replace the visual tokens.
        qformer_config (`dict`): Settings of the Q-Former that differ from InstructBLIP's.
        dtype (`str`): The default dtype.
        cpu_layers (`int`, *optional*): Layers of the language model to run on the CPU, if all would take too long or too
            much memory. Their time and memory are multiplied. Default: all.
        rounds_per_repeat (`int`): Measured rounds for each of `--repeats`. Quick configurations have more.
        reference (`str`, *optional*): A configuration whose LLaVA is another row of the tables, if it is measured too.
    """

    description: str
    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int
    num_prefix_tokens: int
    qformer_config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    cpu_layers: int | None = None
    rounds_per_repeat: int = 1
    reference: str | None = None

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.vision_config["image_size"] // self.vision_config["patch_size"]) ** 2

    def num_placeholders(self, num_images: int) -> dict[str, int]:
        """Tokens that the images of a row take up in the sequence of each system."""
        return {
            LLAVA: num_images * self.num_visual_tokens,
            Q_FORMER: num_images * NUM_QUERIES,
            TA_LLAVA: self.num_prefix_tokens,
        }

    def num_layers(self, device: torch.device) -> int:
        """Layers of the language model that are measured on a device."""
        full = self.text_config["num_hidden_layers"]
        return full if device.type != "cpu" or self.cpu_layers is None else self.cpu_layers

    def depth(self, device: torch.device) -> float:
        """Layers of the language model, divided by those that are measured on a device."""
        return self.text_config["num_hidden_layers"] / self.num_layers(device)


CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

SETUPS = {
    # The architecture of checkpoints/ta-llava-tiny.
    "tiny": Setup(
        description="the shipped model's backbones: CLIP of 5 layers and Gemma-2 of 8, both of width 128",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "projection_dim": 128,
        },
        text_config={
            "model_type": "gemma2",
            "vocab_size": 75,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "max_position_embeddings": 512,
            "sliding_window": 512,
        },
        vision_feature_layer=-1,
        num_prefix_tokens=4,
        qformer_config={
            "vocab_size": 75,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        rounds_per_repeat=10,
    ),
    # SmolLM2-135M-Instruct behind a tower of the paper's patches and image size, but of 22M parameters: CLIP ViT-L/14
    # with its 300M would outweigh the language model.
    "135M": Setup(
        description="a CLIP tower of 22M parameters (ViT-S/14, 336 pixels) and SmolLM2-135M",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
        vision_feature_layer=-2,
        num_prefix_tokens=32,
    ),
    # The paper's model.
    "gemma-2-2b": Setup(
        description="CLIP ViT-L/14 at 336 pixels and Gemma-2-2B",
        vision_config=CLIP_LARGE,
        text_config={
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        vision_feature_layer=-2,
        num_prefix_tokens=32,
        dtype="bfloat16",
        reference="vicuna-7b",
    ),
    # On the CPU four layers are enough: they have an eighth of the adapters, as they are an eighth of the layers.
    "vicuna-7b": Setup(
        description="LLaVA-1.5-7B's shapes: CLIP ViT-L/14 at 336 pixels and Vicuna-7B",
        vision_config=CLIP_LARGE,
        text_config={
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        vision_feature_layer=-2,
        num_prefix_tokens=32,
        dtype="bfloat16",
        cpu_layers=4,
    ),
}
DEFAULT_SETUPS = ["tiny", "135M"]


@dataclass(frozen=True)
class Inputs:
    """
    One batch for all systems: B rows of I images each.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B * I, 3, H, W)`): The images, row by row.
        input_ids (`dict`): Token ids `(B, placeholders + 40)` for each system.
        text_ids (`torch.LongTensor`): As many token ids as in TA-LLaVA's sequence, without placeholders.
        instruction_ids (`torch.LongTensor` of shape `(B * I, 38)`): The instruction that the Q-Former reads with each image,
            in its own vocabulary: the text without the response marker.
    """

    pixel_values: torch.Tensor
    input_ids: dict[str, torch.Tensor]
    text_ids: torch.Tensor
    instruction_ids: torch.Tensor


@dataclass(frozen=True)
class Measurement:
    """
    One batch size and number of images.

    Args:
        num_rounds (`int`): Number of measured rounds.
        seconds (`dict`): Medians by quantity and system.
        cache_bytes (`dict`): Bytes of the cache after the prefill, by system.
        peak_bytes (`dict`): By system, the peak of torch's memory from the pixels to the first token, without the weights.
    """

    num_rounds: int
    seconds: dict[tuple[str, str], float]
    cache_bytes: dict[str, int]
    peak_bytes: dict[str, int]


# --- models and inputs ---------------------------------------------------------------------------------------------


class QFormer(nn.Module):
    """
    InstructBLIP's replacement for LLaVA's projector, for a vision tower of any width: queries read the instruction and an
    image in a Q-Former, and are projected to the width of the language model.
    """

    def __init__(self, config: InstructBlipQFormerConfig, width: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, NUM_QUERIES, config.hidden_size))
        self.qformer = InstructBlipQFormerModel(config)
        self.language_projection = nn.Linear(config.hidden_size, width)

    def forward(self, instruction_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Visual tokens `(N, 32, d)` of the `features` `(N, M, vision width)` of N images, with an instruction each."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        outputs = self.qformer(
            input_ids=instruction_ids,
            attention_mask=instruction_ids.new_ones(len(features), NUM_QUERIES + instruction_ids.shape[1]),
            query_embeds=queries,
            encoder_hidden_states=features,
            encoder_attention_mask=instruction_ids.new_ones(features.shape[:2]),
        )
        return self.language_projection(outputs.last_hidden_state[:, :NUM_QUERIES])


@dataclass(frozen=True)
class Systems:
    """The compared systems. The Q-Former works in the LLaVA model, in place of its projector."""

    llava: PreTrainedModel
    qformer: QFormer
    ta_llava: PreTrainedModel

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The model that each system runs in."""
        return {LLAVA: self.llava, Q_FORMER: self.llava, TA_LLAVA: self.ta_llava}

    def weight_bytes(self, depth: float = 1) -> dict[str, int]:
        """Bytes of the parameters of each system, with `depth` times as many layers in the language model."""
        more = round((depth - 1) * count_bytes(self.llava.model.language_model.layers))
        llava, ta_llava = count_bytes(self.llava) + more, count_bytes(self.ta_llava) + more
        qformer = llava - count_bytes(self.llava.model.multi_modal_projector) + count_bytes(self.qformer)
        return {LLAVA: llava, Q_FORMER: qformer, TA_LLAVA: ta_llava}


def build_systems(setup: Setup, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> Systems:
    """
    Builds all systems with random weights. They share the tensors of the backbones. Each keeps its own projector: LLaVA's
    has two layers, TA-LLaVA's one. With a Gemma-2 language model a stock LLaVA leaves out `final_logit_softcapping`, which
    counts against TA-LLaVA: it is one `tanh` over the logits of one column. `attention` is the attention implementation of
    the language models. By default the library chooses it: eager for Gemma-2.
    """
    parts = {
        "vision_config": setup.vision_config,
        "text_config": {**setup.text_config, "num_hidden_layers": setup.num_layers(device)},
        "vision_feature_layer": setup.vision_feature_layer,
    }
    llava_config = LlavaConfig(**parts, image_token_index=IMAGE_TOKEN_ID, image_seq_length=setup.num_visual_tokens)
    ta_llava_config = TaLlavaConfig(
        **parts,
        num_prefix_tokens=setup.num_prefix_tokens,
        image_token_id=IMAGE_TOKEN_ID,
        response_marker_ids=RESPONSE_MARKER_IDS,
    )
    vision_width = setup.vision_config["hidden_size"]
    qformer_config = InstructBlipQFormerConfig(**setup.qformer_config, encoder_hidden_size=vision_width)
    with torch.device(device), no_init_weights():  # `normal_` below is faster, and enough here
        llava, ta_llava = (
            AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
            for config in (llava_config, ta_llava_config)
        )
        qformer = QFormer(qformer_config, setup.text_config["hidden_size"]).to(dtype).eval()
    # Before 5.23 the library lets Gemma-2 use SDPA, which cannot soft-cap; TA-LLaVA does not.
    attention = attention or ta_llava.model.language_model.config._attn_implementation
    for model in (llava, ta_llava):
        model.model.language_model.set_attn_implementation(attention)
    llava.tie_weights()
    share_parameters(llava.model.vision_tower, ta_llava.model.vision_tower)
    share_parameters(llava.model.language_model, ta_llava.model.language_model)
    share_parameters(llava.lm_head, ta_llava.lm_head)
    with torch.no_grad():
        # Not zeros: processors multiply them faster.
        for parameter in {*llava.parameters(), *ta_llava.parameters(), *qformer.parameters()}:
            parameter.normal_(std=0.02)
    return Systems(llava, qformer, ta_llava)


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the parameters of a module of the same build, not copies of them."""
    for name, parameter in source.named_parameters():
        parent, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(parent), leaf, parameter)


def make_inputs(
    setup: Setup, batch_size: int, num_images: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Inputs:
    """Random images and text. The text ends with the response marker, so everything before it is the instruction."""
    image_size, vocab_size = setup.vision_config["image_size"], setup.text_config["vocab_size"]
    marker = torch.tensor(RESPONSE_MARKER_IDS).expand(batch_size, -1)
    words = torch.randint(FIRST_WORD_ID, vocab_size, (batch_size, NUM_TEXT_TOKENS - marker.shape[1]))
    text = torch.cat([words, marker], dim=1)
    input_ids = {
        name: torch.cat([torch.full((batch_size, count), IMAGE_TOKEN_ID), text], dim=1).to(device)
        for name, count in setup.num_placeholders(num_images).items()
    }
    qformer_vocab_size = InstructBlipQFormerConfig(**setup.qformer_config).vocab_size
    instruction_ids = torch.randint(FIRST_WORD_ID, qformer_vocab_size, words.shape)
    return Inputs(
        pixel_values=torch.randn(batch_size * num_images, 3, image_size, image_size, dtype=dtype, device=device),
        input_ids=input_ids,
        text_ids=torch.randint(FIRST_WORD_ID, vocab_size, input_ids[TA_LLAVA].shape, device=device),
        instruction_ids=instruction_ids.repeat_interleave(num_images, dim=0).to(device),
    )


def count_bytes(module: nn.Module) -> int:
    """Bytes of the parameters of a module. Shared ones (tied embeddings) count once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def check_backbones(systems: Systems) -> None:
    """Raises unless both models have the same tensors and the same attention implementation in their backbones."""
    llava, ta_llava = systems.llava, systems.ta_llava
    for part, theirs, ours in (
        ("vision tower", llava.model.vision_tower, ta_llava.model.vision_tower),
        ("language model", llava.model.language_model, ta_llava.model.language_model),
        ("head", llava.lm_head, ta_llava.lm_head),
    ):
        addresses, our_addresses = (
            {name: parameter.data_ptr() for name, parameter in module.named_parameters()} for module in (theirs, ours)
        )
        if addresses != our_addresses:
            raise RuntimeError(f"The comparison is not fair: the weights of the {part} are not the same tensors.")
    implementations = attention_implementations(systems)
    for part in ("vision tower", "language model"):
        if len({implementation for name, implementation in implementations.items() if part in name}) > 1:
            raise RuntimeError(f"The comparison is not fair: the attention implementations are {implementations}.")


def attention_implementations(systems: Systems) -> dict[str, str]:
    """The attention implementation of each part."""
    modules = {"Q-Former": systems.qformer.qformer}
    for name, model in ((LLAVA, systems.llava), (TA_LLAVA, systems.ta_llava)):
        modules[f"{name}'s vision tower"] = model.model.vision_tower
        modules[f"{name}'s language model"] = model.model.language_model
    return {name: module.config._attn_implementation for name, module in modules.items()}


def check_length(name: str, what: str, found: int, expected: int) -> None:
    """Raises unless a length is as expected."""
    if found != expected:
        raise RuntimeError(f"{name}: {what} is {found}, expected {expected}.")


# --- what is timed -------------------------------------------------------------------------------------------------


def run_tower(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Features of N images before the projector, `(N, M, vision width)`, computed as each model does: stock LLaVA also runs
    the blocks after the one whose output it takes.
    """
    if hasattr(model, "get_vision_features"):
        return model.get_vision_features(pixel_values)
    layer = model.config.vision_feature_layer % (model.config.vision_config.num_hidden_layers + 1)
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=one_hidden_state(layer), return_dict=True)
    return outputs.hidden_states[layer][:, 1:]


def run_prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    cache: Cache | None = None,
) -> tuple[torch.Tensor, Cache]:
    """
    First token `(B, 1)` and the cache, from images `(N, 3, H, W)` with the tower, or from the `features` of `run_tower`
    without it. `project` makes the visual tokens of a LLaVA in place of its projector. By default the cache is dynamic.
    """
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    rows = (len(input_ids), -1)
    if features is None and project is not None:
        features = run_tower(model, pixel_values)
    if isinstance(model, TaLlavaForConditionalGeneration):
        name, values = ("pixel_values", pixel_values) if features is None else ("vision_features", features)
        images = {name: values.unflatten(0, rows)}
    elif features is None:
        images = {"pixel_values": pixel_values}
    else:
        visual_tokens = (project or model.model.multi_modal_projector)(features)
        images = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(visual_tokens))}}
    logits = model(input_ids=input_ids, logits_to_keep=1, **{CACHE: cache}, **images).logits
    return logits.argmax(dim=-1), cache


def run_text_only(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """First token `(B, 1)`, from the language model and its head alone."""
    cache = DynamicCache(config=model.config.text_config)
    states = model.model.language_model(input_ids=input_ids, **{CACHE: cache}).last_hidden_state
    return model.lm_head(states[:, -1:]).argmax(dim=-1)


def decode_step(model: PreTrainedModel, token: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The token `(B, 1)` after another one."""
    return model(input_ids=token, logits_to_keep=1, **{CACHE: cache}).logits.argmax(dim=-1)


def run_decode(model: PreTrainedModel, token: torch.Tensor, cache: Cache) -> None:
    """Decodes greedily after a prefill. The cache grows."""
    for _ in range(NUM_DECODE_TOKENS):
        token = decode_step(model, token, cache)


def count_cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of all layers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# --- measuring -----------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Waits until the GPU has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(function: Callable, *args, **kwargs) -> tuple[Any, float]:
    """Result of a call, and the seconds it took."""
    synchronize()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    synchronize()
    return result, time.perf_counter() - start


@contextmanager
def layers_timer(model: PreTrainedModel) -> Iterator[list[float]]:
    """Fills the list with the seconds that each pass takes in the layers of the language model (CPU)."""
    layers = model.model.language_model.layers
    starts: list[float] = []
    seconds: list[float] = []
    handles = [
        layers[0].register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        layers[-1].register_forward_hook(lambda *_: seconds.append(time.perf_counter() - starts.pop())),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def timed_at_depth(depth: float, model: PreTrainedModel, function: Callable, *args, **kwargs) -> tuple[Any, float]:
    """As [`timed`], extrapolated to `depth` times as many layers in the language model."""
    if depth == 1:
        return timed(function, model, *args, **kwargs)
    with layers_timer(model) as of_layers:
        result, seconds = timed(function, model, *args, **kwargs)
    return result, seconds + (depth - 1) * sum(of_layers)


def kernel_seconds(function: Callable, *args, **kwargs) -> float:
    """Seconds that a GPU computes in a call, without the time in which it waits for Python."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function(*args, **kwargs)
        synchronize()
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in events if event.key != "Activity Buffer Request") / 1e6


def allocated_bytes(function: Callable, *args, **kwargs) -> int:
    """Peak of torch's memory on the CPU during a call, in bytes beyond what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*args, **kwargs)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)  # freed memory is negative


def measure_peaks(setup: Setup, systems: Systems, inputs: Inputs, cache_bytes: dict[str, int]) -> dict[str, int]:
    """
    Peaks of memory as in [`Measurement`]. If only some layers are measured, the cache of the others is added. That is their
    part of the peak, or more if the peak is in the tower.
    """
    device = inputs.pixel_values.device
    peak_bytes = {}
    for name, model in systems.models.items():
        project = partial(systems.qformer, inputs.instruction_ids) if name == Q_FORMER else None
        images = {"pixel_values": inputs.pixel_values, "project": project}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run_prefill(model, inputs.input_ids[name], **images)
            peak_bytes[name] = torch.cuda.max_memory_allocated() - before
        else:
            peak = allocated_bytes(run_prefill, model, inputs.input_ids[name], **images)
            peak_bytes[name] = peak + round((1 - 1 / setup.depth(device)) * cache_bytes[name])
    return peak_bytes


def measure_round(
    setup: Setup, systems: Systems, turns: list[str], inputs: Inputs
) -> tuple[dict[tuple[str, str], float], dict[str, int]]:
    """
    Measures every quantity once, in seconds, and the bytes of the caches, as in [`Measurement`]. Within each quantity the
    systems take turns in the given order.

    Raises:
        `RuntimeError`: The number of visual tokens or the length of a cache is not as expected.
    """
    models = systems.models
    depth = setup.depth(inputs.pixel_values.device)
    project = dict.fromkeys(turns) | {Q_FORMER: partial(systems.qformer, inputs.instruction_ids)}
    seconds, features, prefilled, cache_bytes = {}, {}, {}, {}
    for name in turns:
        if name != Q_FORMER:  # it uses LLaVA's tower
            features[name], seconds[TOWER, name] = timed(run_tower, models[name], inputs.pixel_values)
            check_length(name, "the number of visual tokens", features[name].shape[1], setup.num_visual_tokens)
    features[Q_FORMER], seconds[TOWER, Q_FORMER] = features[LLAVA], seconds[TOWER, LLAVA]
    for name in turns:
        prefilled[name], seconds[PREFILL, name] = timed_at_depth(
            depth, models[name], run_prefill, inputs.input_ids[name], features=features[name], project=project[name]
        )
        cache = prefilled[name][1]
        check_length(name, "the cache after the prefill", cache.get_seq_length(), inputs.input_ids[name].shape[1])
        cache_bytes[name] = round(depth * count_cache_bytes(cache))
    _, seconds[TEXT_ONLY, TA_LLAVA] = timed_at_depth(depth, models[TA_LLAVA], run_text_only, inputs.text_ids)
    del features, cache
    for name in turns:
        token, cache = prefilled.pop(name)
        _, total = timed_at_depth(depth, models[name], run_decode, token, cache)
        seconds[DECODE, name] = total / NUM_DECODE_TOKENS
        num_columns = inputs.input_ids[name].shape[1] + NUM_DECODE_TOKENS
        check_length(name, "the cache after the decoding", cache.get_seq_length(), num_columns)
    del cache
    for name in turns:
        _, seconds[FIRST_TOKEN, name] = timed_at_depth(
            depth,
            models[name],
            run_prefill,
            inputs.input_ids[name],
            pixel_values=inputs.pixel_values,
            project=project[name],
        )
    return seconds, cache_bytes


def measure_kernels(systems: Systems, inputs: Inputs) -> dict[tuple[str, str], float]:
    """Seconds that the GPU computes in the prefill after the tower, by system."""
    seconds = {}
    for name, model in systems.models.items():
        project = partial(systems.qformer, inputs.instruction_ids) if name == Q_FORMER else None
        features = run_tower(model, inputs.pixel_values)
        seconds[KERNELS, name] = kernel_seconds(
            run_prefill, model, inputs.input_ids[name], features=features, project=project
        )
    return seconds


@torch.inference_mode()
def measure(
    setup: Setup,
    systems: Systems,
    batch_size: int,
    num_images: int,
    repeats: int,
    kernels: bool = False,
    warm_up: bool = False,
    progress: str | None = None,
) -> Measurement:
    """Medians of all rounds. With `warm_up`, or before several rounds, one more round comes first and does not count."""
    parameter = next(systems.llava.parameters())
    inputs = make_inputs(setup, batch_size, num_images, parameter.dtype, parameter.device)
    num_rounds = repeats * setup.rounds_per_repeat
    num_warmup_rounds = int(warm_up or num_rounds > 1)
    turns = list(systems.models)
    samples = defaultdict(list)
    for index in tqdm(range(num_warmup_rounds + num_rounds), desc=progress, unit="round"):
        # Later systems find the inputs and the code in the processor's caches, so the order changes every round.
        turns.reverse()
        seconds, cache_bytes = measure_round(setup, systems, turns, inputs)
        if index < num_warmup_rounds:
            continue
        for key, value in seconds.items():
            samples[key].append(value)
    medians = {key: median(values) for key, values in samples.items()}
    if kernels:
        medians |= measure_kernels(systems, inputs)
    return Measurement(num_rounds, medians, cache_bytes, measure_peaks(setup, systems, inputs, cache_bytes))


# --- report --------------------------------------------------------------------------------------------------------


# The columns of a table: key of a record, heading, unit and its size.
COLUMNS = {
    "tower_seconds": ("vision tower", "ms", 1e-3),
    "prefill_seconds": ("prefill after the tower", "ms", 1e-3),
    "prefill_kernel_seconds": ("of it kernels", "ms", 1e-3),
    "first_token_seconds": ("time to first token", "ms", 1e-3),
    "decode_seconds": ("decode, per token", "ms", 1e-3),
    "cache_bytes": ("cache after the prefill", "MiB", 2**20),
    "peak_bytes": ("peak memory beyond the weights", "MiB", 2**20),
    "peak_bytes_with_weights": ("peak memory", "MiB", 2**20),
}


def make_records(
    setup: Setup, batch_size: int, num_images: int, measurement: Measurement, weight_bytes: dict[str, int]
) -> list[dict[str, Any]]:
    """One record per system: its measurements at one batch size and number of images per row."""
    records = []
    for name, num_placeholders in setup.num_placeholders(num_images).items():
        seconds = {quantity: value for (quantity, of), value in measurement.seconds.items() if of == name}
        records.append(
            {
                "system": name,
                "batch_size": batch_size,
                "num_images": num_images,
                "num_rounds": measurement.num_rounds,
                "num_tokens": num_placeholders + NUM_TEXT_TOKENS,
                "tower_seconds": seconds[TOWER],
                "prefill_seconds": seconds[PREFILL],
                "prefill_kernel_seconds": seconds.get(KERNELS),
                "first_token_seconds": seconds[FIRST_TOKEN],
                "decode_seconds": seconds[DECODE],
                "decode_tokens_per_second": batch_size / seconds[DECODE],
                "text_only_prefill_seconds": seconds.get(TEXT_ONLY),
                "cache_bytes": measurement.cache_bytes[name],
                "weight_bytes": weight_bytes[name],
                "peak_bytes": measurement.peak_bytes[name],
                "peak_bytes_with_weights": measurement.peak_bytes[name] + weight_bytes[name],
            }
        )
    # The second question needs no vision tower, so its first token takes only the prefill.
    second = {**records[-1], "system": SECOND_QUESTION, "tower_seconds": None}
    second |= dict.fromkeys(("peak_bytes", "peak_bytes_with_weights", "text_only_prefill_seconds"))
    return [*records, {**second, "first_token_seconds": second["prefill_seconds"]}]


def format_value(value: float | None, of_llava: float | None, unit_size: float) -> str:
    """A value in its unit, and LLaVA's value divided by it; empty if there is no value."""
    if value is None:
        return ""
    value, of_llava = value / unit_size, None if of_llava is None else of_llava / unit_size
    digits = 2 if value < 10 else 1 if value < 1000 else 0
    text = f"{value:,.{digits}f}"
    return text if of_llava is None else f"{text} ({of_llava / value:.2f}x)"


def format_cell(records: list[dict[str, Any]]) -> str:
    """The records of one batch size and number of images as a Markdown table, one row per system, LLaVA first."""
    llava = records[0]
    columns = {key: column for key, column in COLUMNS.items() if llava[key] is not None}
    headings = ["", "tokens", *(f"{heading}, {unit}" for heading, unit, _ in columns.values()), "tokens/s"]
    lines = [f"| {' | '.join(headings)} |", f"|---{'|---:' * (len(headings) - 1)}|"]
    for record in records:
        cells = [record["system"], f"{record['num_tokens']:,}"]
        for key, (_, _, unit_size) in columns.items():
            cells.append(format_value(record[key], None if record is llava else llava[key], unit_size))
        cells.append(f"{record['decode_tokens_per_second']:,.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_section(name: str, results: dict[str, dict[str, Any]]) -> str:
    """All measurements of one configuration as a Markdown section."""
    setup, result = SETUPS[name], results[name]
    full, measured = setup.text_config["num_hidden_layers"], result["num_layers"]
    sections = [f"### {name}: {setup.description}", describe_run(result)]
    if measured < full:
        sections.append(
            f"**{measured} of the language model's {full} layers were measured**: the time in them, their part of the "
            f"cache and their weights are multiplied by {full // measured}."
        )
    cells = defaultdict(list)
    for record in result["records"]:
        cells[record["batch_size"], record["num_images"]].append(record)
    for record in results.get(setup.reference, {}).get("records", []):
        cell = cells.get((record["batch_size"], record["num_images"]))
        if cell is not None and record["system"] == LLAVA:
            cell.append({**record, "system": f"{LLAVA}, {setup.reference}"})
    for (batch_size, num_images), records in cells.items():
        prefill = records[2]["prefill_seconds"]
        share = 1 - records[2]["text_only_prefill_seconds"] / prefill
        images = f"{num_images} image" + "s" * (num_images > 1)
        rounds = f"{records[0]['num_rounds']} round" + "s" * (records[0]["num_rounds"] > 1)
        sections += [
            f"Batch {batch_size}, {images} and {NUM_TEXT_TOKENS} text tokens a row ({rounds}):",
            format_cell(records),
            f"Adapters, projector and prefix take {share:.0%} of TA-LLaVA's prefill, which is "
            f"{share * prefill / records[0]['prefill_seconds']:.1%} of LLaVA's.",
        ]
    return "\n\n".join(sections)


def describe_run(result: dict[str, Any]) -> str:
    """One line that says how a configuration was measured."""
    parts = ", ".join(f"{name} {implementation}" for name, implementation in result["attention"].items())
    return f"{result['machine']}. Attention: {parts}."


def describe_machine(dtype: torch.dtype, device: torch.device | str = "cpu") -> str:
    """One line that names versions, threads, dtype and hardware."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    line = f"{versions}, threads: {torch.get_num_threads()}, {str(dtype).removeprefix('torch.')}, {cpu_name()}"
    return line if torch.device(device).type == "cpu" else f"{line}, {torch.cuda.get_device_name(device)}"


def cpu_name() -> str:
    """Name of the processor, from a file on Linux and from `platform` elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


NOTES = f"""Medians. In brackets: LLaVA's value divided by this one. Weights are random; the backbones' are shared.

- LLaVA: `LlavaForConditionalGeneration`, all visual tokens of each image.
- Q-Former: InstructBLIP's way to the same language model, with {NUM_QUERIES} queries for each image; its vision tower is
  LLaVA's.
- TA-LLaVA: its prefix reads all images. A second question about the same images needs no vision tower, and so its time to
  first token is the prefill's; with the features of its images at hand, LLaVA's would be too.
- The adapters' share is what TA-LLaVA's prefill takes longer than its language model alone on as many tokens.
- Decoding: {NUM_DECODE_TOKENS} tokens.
- Peak memory: what torch has allocated at most from the pixels to the first token.
- Kernels (with `--kernel-time`): the time in which the GPU computes; the rest of the prefill it waits for Python."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="TA-LLaVA against LLaVA and the Q-Former with the same backbones.")
    parser.add_argument("--configs", nargs="+", choices=list(SETUPS), default=DEFAULT_SETUPS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--images", nargs="+", type=int, default=[1], help="numbers of images per row")
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help="take the median of this many rounds (10 times as many for tiny), after one that warms up",
    )
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's choice)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: float32, bfloat16 for gemma-2-2b and vicuna-7b"
    )
    parser.add_argument(
        "--attention",
        choices=["eager", "sdpa", "flex_attention", "flash_attention_2"],
        help="attention of the language models (default: the library's choice, which is eager for Gemma-2)",
    )
    parser.add_argument("--kernel-time", action="store_true", help="also profile the prefill's kernels (cuda)")
    parser.add_argument(
        "--output", type=Path, help="also write the tables to this Markdown file, and a JSON file beside it"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU.")
    if arguments.kernel_time and arguments.device != "cuda":
        parser.error("--kernel-time needs --device cuda.")
    return arguments


def measure_setup(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures a configuration. Yields one growing result, after each batch size and number of images."""
    setup, device = SETUPS[name], torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or setup.dtype)
    # Not in inference mode: parameters that are created in it take slower paths.
    systems = build_systems(setup, dtype, device, arguments.attention)
    check_backbones(systems)
    result: dict[str, Any] = {
        "machine": describe_machine(dtype, device),
        "attention": attention_implementations(systems),
        "num_layers": setup.num_layers(device),
        "records": [],
    }
    for num_images in arguments.images:
        for batch_size in arguments.batch_sizes:
            measurement = measure(
                setup,
                systems,
                batch_size,
                num_images,
                arguments.repeats,
                arguments.kernel_time,
                warm_up=not result["records"],
                progress=f"{name}, batch {batch_size}, images {num_images}",
            )
            weight_bytes = systems.weight_bytes(setup.depth(device))
            result["records"] += make_records(setup, batch_size, num_images, measurement, weight_bytes)
            yield result


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, Any]] = {}
    report = ""
    for name in arguments.configs:
        for result in measure_setup(name, arguments):
            results[name] = result
            report = "\n\n".join([*(format_section(measured, results) for measured in results), NOTES])
            if arguments.output is not None:  # after each, as the next may take long
                arguments.output.write_text(report + "\n")
                arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    print(report)


if __name__ == "__main__":
    main()
