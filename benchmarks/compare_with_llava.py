"""
Measures prefill, decode and cache of TA-LLaVA against `transformers.LlavaForConditionalGeneration` with the same
vision tower and language model: random weights, one machine, one run, the two models by turns.

    make bench
"""

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration


NUM_TEXT_TOKENS = 40
NUM_DECODE_TOKENS = 16

# Which ids these are makes no difference to the time, so both configurations have the same.
RESPONSE_MARKER_IDS = [4, 5]
IMAGE_TOKEN_ID = 6
FIRST_WORD_ID = 7

LLAVA, TA_LLAVA = "LLaVA", "TA-LLaVA"
TOWER, PREFILL, FIRST_TOKEN, DECODE = "vision tower", "prefill", "time to first token", "decode, per token"
TEXT_ONLY = "language model alone"


@dataclass(frozen=True)
class Setup:
    """
    The backbones that both models share, and the prefix of TA-LLaVA.

    Args:
        description (`str`): The backbones in words.
        vision_config, text_config (`dict`): Of the backbones, `model_type` included.
        vision_feature_layer (`int`): Index into the hidden states of the tower that gives the visual tokens.
        num_prefix_tokens (`int`): What replaces the visual tokens.
        rounds_per_repeat (`int`): Measured rounds for each of `--repeats`; more where a round takes milliseconds.
    """

    description: str
    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int
    num_prefix_tokens: int
    rounds_per_repeat: int = 1

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.vision_config["image_size"] // self.vision_config["patch_size"]) ** 2

    @property
    def num_placeholders(self) -> dict[str, int]:
        """Tokens that the image of a row takes in the sequence of each model."""
        return {LLAVA: self.num_visual_tokens, TA_LLAVA: self.num_prefix_tokens}


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
}


@dataclass(frozen=True)
class Inputs:
    """
    One batch for both models.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): One image a row.
        input_ids (`dict`): Token ids `(B, placeholders + 40)` for each model.
        text_ids (`torch.LongTensor`): As many token ids as TA-LLaVA has, without placeholders.
    """

    pixel_values: torch.Tensor
    input_ids: dict[str, torch.Tensor]
    text_ids: torch.Tensor


@dataclass(frozen=True)
class Measurement:
    """Medians in seconds by quantity and model, cache in bytes by model."""

    seconds: dict[tuple[str, str], float]
    cache_bytes: dict[str, int]


# --- models and inputs ---------------------------------------------------------------------------------------------


def build_models(setup: Setup, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """
    Both models with random weights. Each keeps its own kind of projector: LLaVA two layers, TA-LLaVA one. With a
    Gemma-2 language model a stock LLaVA leaves out `final_logit_softcapping`, which is immaterial here: it would be
    one `tanh` over the logits of one column.
    """
    parts = {
        "vision_config": setup.vision_config,
        "text_config": setup.text_config,
        "vision_feature_layer": setup.vision_feature_layer,
    }
    llava_config = LlavaConfig(**parts, image_token_index=IMAGE_TOKEN_ID, image_seq_length=setup.num_visual_tokens)
    ta_llava_config = TaLlavaConfig(
        **parts,
        num_prefix_tokens=setup.num_prefix_tokens,
        image_token_id=IMAGE_TOKEN_ID,
        response_marker_ids=RESPONSE_MARKER_IDS,
    )
    models = {
        LLAVA: LlavaForConditionalGeneration(llava_config),
        TA_LLAVA: TaLlavaForConditionalGeneration(ta_llava_config),
    }
    return {name: model.to(dtype).eval() for name, model in models.items()}


def make_inputs(setup: Setup, batch_size: int, dtype: torch.dtype) -> Inputs:
    """Random images and text. The text ends with the response marker: all before it is instruction, as in a chat."""
    image_size, vocab_size = setup.vision_config["image_size"], setup.text_config["vocab_size"]
    marker = torch.tensor(RESPONSE_MARKER_IDS).expand(batch_size, -1)
    words = torch.randint(FIRST_WORD_ID, vocab_size, (batch_size, NUM_TEXT_TOKENS - marker.shape[1]))
    text = torch.cat([words, marker], dim=1)
    input_ids = {
        name: torch.cat([torch.full((batch_size, count), IMAGE_TOKEN_ID), text], dim=1)
        for name, count in setup.num_placeholders.items()
    }
    return Inputs(
        pixel_values=torch.randn(batch_size, 3, image_size, image_size, dtype=dtype),
        input_ids=input_ids,
        text_ids=torch.randint(FIRST_WORD_ID, vocab_size, input_ids[TA_LLAVA].shape),
    )


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of all `modules` together, those they share (tied embeddings) once."""
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in parameters)


def check_equal(what: str, llava: Any, ta_llava: Any) -> None:
    """Raises unless both models have the same of something."""
    if llava != ta_llava:
        raise RuntimeError(f"The comparison is not fair: {what} is {llava} in LLaVA but {ta_llava} in TA-LLaVA.")


def check_backbones(models: dict[str, PreTrainedModel]) -> None:
    """Raises unless the backbones have the same size, attention implementation and dtype in both models."""
    llava, ta_llava = models[LLAVA], models[TA_LLAVA]
    check_equal(
        "the parameter count of the language model and its head",
        count_parameters(llava.model.language_model, llava.lm_head),
        count_parameters(ta_llava.model.language_model, ta_llava.lm_head),
    )
    for part in ("vision_tower", "language_model"):
        theirs, ours = getattr(llava.model, part), getattr(ta_llava.model, part)
        check_equal(f"the parameter count of {part}", count_parameters(theirs), count_parameters(ours))
        check_equal(f"the dtype of {part}", theirs.dtype, ours.dtype)
        check_equal(
            f"the attention implementation of {part}",
            theirs.config._attn_implementation,
            ours.config._attn_implementation,
        )


def check_lengths(setup: Setup, models: dict[str, PreTrainedModel], inputs: Inputs) -> None:
    """Raises unless the caches hold as many columns as expected, after the prefill and after the decoding."""
    for name, model in models.items():
        features = run_tower(model, inputs.pixel_values)
        if features.shape[1] != setup.num_visual_tokens:
            raise RuntimeError(f"{name} has {features.shape[1]} visual tokens, expected {setup.num_visual_tokens}.")
        expected = setup.num_placeholders[name] + NUM_TEXT_TOKENS
        for images in ({"pixel_values": inputs.pixel_values}, {"features": features}):
            token, cache = run_prefill(model, inputs.input_ids[name], **images)
            if cache.get_seq_length() != expected:
                raise RuntimeError(
                    f"{name}'s prefill has cached {cache.get_seq_length()} columns, expected {expected}."
                )
        run_decode(model, token, cache)
        if cache.get_seq_length() != expected + NUM_DECODE_TOKENS:
            raise RuntimeError(
                f"{name} has decoded {cache.get_seq_length() - expected} tokens, not {NUM_DECODE_TOKENS}."
            )


# --- what is timed -------------------------------------------------------------------------------------------------


def run_tower(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Features of one image a row before the projector, `(B, M, vision width)`: the same calls in both models."""
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    return outputs.hidden_states[model.config.vision_feature_layer][:, 1:]


def run_prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DynamicCache]:
    """
    First token `(B, 1)` and the cache, from images, tower included, or from the `features` of `run_tower`: what is
    left are the projector, the language model and in TA-LLaVA the adapters.
    """
    cache = DynamicCache(config=model.config.text_config)
    if features is None:
        images = {"pixel_values": pixel_values}
    elif isinstance(model, TaLlavaForConditionalGeneration):
        images = {"vision_features": features[:, None]}
    else:
        visual_tokens = model.model.multi_modal_projector(features)
        images = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(visual_tokens))}}
    logits = model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1, **images).logits
    return logits.argmax(dim=-1), cache


def run_text_only(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """First token `(B, 1)` by the language model and its head alone."""
    cache = DynamicCache(config=model.config.text_config)
    states = model.model.language_model(input_ids=input_ids, past_key_values=cache).last_hidden_state
    return model.lm_head(states[:, -1:]).argmax(dim=-1)


def run_decode(model: PreTrainedModel, token: torch.Tensor, cache: DynamicCache) -> None:
    """Greedy steps after a prefill; the cache grows with them."""
    for _ in range(NUM_DECODE_TOKENS):
        token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits.argmax(dim=-1)


def count_cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values of all layers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# --- measuring -----------------------------------------------------------------------------------------------------


def timed(function: Callable, *args, **kwargs) -> tuple[Any, float]:
    """Result of a call, and its seconds."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def measure_round(
    turns: list[tuple[str, PreTrainedModel]], inputs: Inputs
) -> tuple[dict[tuple[str, str], float], dict[str, int]]:
    """
    Every quantity once, in seconds, and the bytes of the caches. Within each quantity the models take turns in the
    given order.
    """
    seconds, features, prefilled = {}, {}, {}
    for name, model in turns:
        features[name], seconds[TOWER, name] = timed(run_tower, model, inputs.pixel_values)
    for name, model in turns:
        prefilled[name], seconds[PREFILL, name] = timed(
            run_prefill, model, inputs.input_ids[name], features=features[name]
        )
    _, seconds[TEXT_ONLY, TA_LLAVA] = timed(run_text_only, dict(turns)[TA_LLAVA], inputs.text_ids)
    cache_bytes = {name: count_cache_bytes(cache) for name, (_, cache) in prefilled.items()}
    for name, model in turns:
        _, total = timed(run_decode, model, *prefilled.pop(name))
        seconds[DECODE, name] = total / NUM_DECODE_TOKENS
    for name, model in turns:
        _, seconds[FIRST_TOKEN, name] = timed(
            run_prefill, model, inputs.input_ids[name], pixel_values=inputs.pixel_values
        )
    return seconds, cache_bytes


@torch.inference_mode()
def measure(
    setup: Setup, name: str, batch_sizes: list[int], repeats: int, dtype: torch.dtype
) -> dict[int, Measurement]:
    """Medians of all rounds, for each batch size."""
    with torch.inference_mode(False):  # parameters born in inference mode take slower paths
        models = build_models(setup, dtype)
    check_backbones(models)
    measurements = {}
    for batch_size in batch_sizes:
        inputs = make_inputs(setup, batch_size, dtype)
        check_lengths(setup, models, inputs)  # runs what is timed, and so warms up
        turns = list(models.items())
        samples = defaultdict(list)
        for _ in tqdm(range(repeats * setup.rounds_per_repeat), desc=f"{name}, batch {batch_size}", unit="round"):
            # Who comes second finds the inputs and the code in the processor's caches: each does so every other round.
            turns.reverse()
            seconds, cache_bytes = measure_round(turns, inputs)
            for key, value in seconds.items():
                samples[key].append(value)
        measurements[batch_size] = Measurement({key: median(values) for key, values in samples.items()}, cache_bytes)
    return measurements


# --- report --------------------------------------------------------------------------------------------------------


def format_row(quantity: str, batch_size: int, values: dict[str, float], unit: str, digits: int) -> str:
    """A row of the table: what both models have of a quantity, and how many times as much LLaVA has."""
    llava, ta_llava = values[LLAVA], values[TA_LLAVA]
    ratio = f"{llava / ta_llava:.2f}x" if llava < 10 * ta_llava else f"{llava / ta_llava:.1f}x"
    return f"| {quantity} | {batch_size} | {llava:,.{digits}f} {unit} | {ta_llava:,.{digits}f} {unit} | {ratio} |"


def format_table(name: str, setup: Setup, measurements: dict[int, Measurement]) -> str:
    """The measurements of one configuration as a Markdown section."""
    lengths = {model: count + NUM_TEXT_TOKENS for model, count in setup.num_placeholders.items()}
    lines = [
        f"### {name}: {setup.description}",
        "",
        f"{NUM_TEXT_TOKENS} text tokens and one image a row: {lengths[LLAVA]} tokens in LLaVA, {lengths[TA_LLAVA]} in "
        "TA-LLaVA.",
        "",
        "| | batch | LLaVA | TA-LLaVA | LLaVA / TA-LLaVA |",
        "|---|---:|---:|---:|---:|",
    ]
    for quantity, label in (
        (TOWER, "vision tower"),
        (PREFILL, "prefill without the tower"),
        (FIRST_TOKEN, "time to first token"),
        (DECODE, f"decode, per token of {NUM_DECODE_TOKENS}"),
    ):
        for batch_size, measurement in measurements.items():
            milliseconds = {model: measurement.seconds[quantity, model] * 1000 for model in (LLAVA, TA_LLAVA)}
            lines.append(format_row(label, batch_size, milliseconds, "ms", digits=1))
    for batch_size, measurement in measurements.items():
        kibibytes = {model: count / 1024 for model, count in measurement.cache_bytes.items()}
        lines.append(format_row("cache after the prefill", batch_size, kibibytes, "KiB", digits=0))
    for batch_size, measurement in measurements.items():
        share = 1 - measurement.seconds[TEXT_ONLY, TA_LLAVA] / measurement.seconds[PREFILL, TA_LLAVA]
        lines.append(f"| adapters' share of the prefill | {batch_size} | | {share:.0%} | |")
    return "\n".join(lines)


def describe_machine(dtype: torch.dtype) -> str:
    """One line on what the numbers were measured with."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, threads: {torch.get_num_threads()}, {str(dtype).removeprefix('torch.')}, {cpu_name()}"


def cpu_name() -> str:
    """Name of the processor; Linux tells it in a file, other systems through `platform`."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


NOTES = (
    "Medians. The adapters' share is what TA-LLaVA's prefill takes longer than its language model alone on as many "
    "tokens: adapters, projector and prefix."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="TA-LLaVA against LLaVA with the same backbones, on the CPU.")
    parser.add_argument("--configs", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--repeats", type=int, default=7, help="rounds that a median is over (10 times as many for tiny)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    sections = [describe_machine(dtype)]
    for name in arguments.configs:
        measurements = measure(SETUPS[name], name, arguments.batch_sizes, arguments.repeats, dtype)
        sections.append(format_table(name, SETUPS[name], measurements))
    report = "\n\n".join([*sections, NOTES])
    print(report)
    if arguments.output is not None:
        arguments.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
