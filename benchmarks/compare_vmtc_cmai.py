"""
Measures what VMTC and CMAI cost and save in LLaVA, compared with `transformers.LlavaForConditionalGeneration`. All variants
share the same random weights, and take turns in one run on one machine.

    python benchmarks/compare_vmtc_cmai.py --output-dir benchmarks/results
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compare_with_llava import (
    DECODE,
    FIRST_WORD_ID,
    IMAGE_TOKEN_ID,
    NUM_DECODE_TOKENS,
    NUM_TEXT_TOKENS,
    PREFILL,
    TOWER,
    count_cache_bytes,
    describe_machine,
    run_decode,
    run_prefill,
    timed,
)
from compare_with_llava import SETUPS as BACKBONES
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, Cache, LlavaConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ta_llava import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration
from ta_llava.common.precision import has_fast_bfloat16
from ta_llava.vision_towers import TowerCompression, compression_of_call
from ta_llava.vmtc import TRAINING_FREE_VMTC


OWN_WORK = "VMTC's own work"
LAST_LAYER_OF = {PREFILL: "last layer in the prefill", DECODE: "last layer in the decoding"}


@dataclass(frozen=True)
class Variant:
    """
    One way to use the weights. With VMTC and CMAI off it is the stock model.

    Args:
        num_visual_tokens (`int`): Number of visual tokens of an image in the language model.
        use_vmtc, use_cmai (`bool`): See [`VmtcCmaiLlavaConfig`].
    """

    num_visual_tokens: int
    use_vmtc: bool = False
    use_cmai: bool = False

    @property
    def without_cmai(self) -> "Variant":
        """The variant with the same vision tower and CMAI off."""
        return replace(self, use_cmai=False)

    @property
    def label(self) -> str:
        """Name in the tables."""
        names = ["CMAI"] * self.use_cmai + ["VMTC"] * self.use_vmtc
        return f"{' + '.join(names) or 'LLaVA'}, {self.num_visual_tokens}"


@dataclass(frozen=True)
class Setup:
    """
    The backbones that all variants share, and the budgets to compress them to.

    Args:
        description (`str`): The backbones in words.
        vision_config, text_config (`dict`): Configs of the backbones, with `model_type`.
        vision_feature_layer (`int`): Index of the tower's hidden state that gives the visual tokens.
        budgets (`tuple`): Three numbers of visual tokens per image for VMTC. The last is not combined with CMAI.
        full_depth (`int`): Number of layers of the real language model, which may be more than are measured.
        rounds_per_repeat (`int`): Measured rounds for each of `--repeats`. Quick configurations have more.
        max_large_rounds (`int`, *optional*): Maximum number of rounds for batches of more than one row.
    """

    description: str
    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int
    budgets: tuple[int, int, int]
    full_depth: int
    rounds_per_repeat: int = 1
    max_large_rounds: int | None = None

    @property
    def stock(self) -> Variant:
        """The stock model, in which each patch is a visual token."""
        return Variant((self.vision_config["image_size"] // self.vision_config["patch_size"]) ** 2)

    @property
    def variants(self) -> list[Variant]:
        """All measured variants, the stock model first."""
        half, small, smallest = (Variant(budget, use_vmtc=True) for budget in self.budgets)
        combined = [replace(variant, use_cmai=True) for variant in (self.stock, half, small)]
        return [self.stock, half, small, smallest, *combined]

    @property
    def num_layers(self) -> int:
        """Number of measured layers of the language model."""
        return self.text_config["num_hidden_layers"]

    def num_rounds(self, batch_size: int, repeats: int) -> int:
        """Number of measured rounds for a batch size."""
        rounds = repeats * self.rounds_per_repeat
        return rounds if batch_size == 1 or self.max_large_rounds is None else min(rounds, self.max_large_rounds)


def _backbones(name: str) -> dict[str, Any]:
    """The fields that a configuration takes from `compare_with_llava.py`."""
    names = ("description", "vision_config", "text_config", "vision_feature_layer", "rounds_per_repeat")
    return {field: getattr(BACKBONES[name], field) for field in names}


SETUPS = {
    "tiny": Setup(  # Llama, since Gemma-2 has no SDPA
        **{
            **_backbones("tiny"),
            "description": "CLIP of 5 layers, with 64 patches, and Llama of 8, both of width 128",
            "text_config": {
                "model_type": "llama",
                "vocab_size": 75,
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
            },
        },
        budgets=(32, 7, 4),
        full_depth=8,
    ),
    "135M": Setup(**_backbones("135M"), budgets=(288, 64, 36), full_depth=30),
    # LLaVA-1.5-7B with two of its 32 layers in the language model. They are enough: CMAI does nothing in the first layer of
    # any model, and the other 30 would be like the second.
    "7B": Setup(
        description="LLaVA-1.5-7B's shapes: CLIP ViT-L/14 at 336 pixels with all its 24 blocks, and 2 of Vicuna-7B's 32 "
        "layers",
        vision_config=BACKBONES["vicuna-7b"].vision_config,
        text_config={**BACKBONES["vicuna-7b"].text_config, "num_hidden_layers": 2},
        vision_feature_layer=-2,
        budgets=(288, 64, 36),
        full_depth=32,
        max_large_rounds=1,
    ),
}


@dataclass(frozen=True)
class Inputs:
    """
    One batch for all variants.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B * I, 3, H, W)`): The images, row by row.
        input_ids (`dict`): Token ids `(B, placeholders + 40)` by number of placeholders, all with the same text.
    """

    pixel_values: torch.Tensor
    input_ids: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Measurement:
    """
    One batch size of one configuration in one dtype.

    Args:
        setup ([`Setup`]): The configuration.
        num_rounds (`int`): Number of measured rounds.
        seconds (`dict`): Medians by quantity and variant. Towers are measured without CMAI only. `OWN_WORK` is a share of
            the tower's time, from 0 to 1.
        cache_bytes (`dict`): Bytes of the cache after the prefill, by variant.
    """

    setup: Setup
    num_rounds: int
    seconds: dict[tuple[str, Variant], float]
    cache_bytes: dict[Variant, int]

    def tower(self, variant: Variant) -> float:
        """Seconds of the vision tower, which CMAI does not change."""
        return self.seconds[TOWER, variant.without_cmai]

    def at_full_depth(self, quantity: str, variant: Variant) -> float:
        """
        Seconds of the prefill, or of decoding a token, extrapolated to all layers of the language model: each missing layer
        counts as long as the last one. With no missing layers this is the measured time.
        """
        num_missing = self.setup.full_depth - self.setup.num_layers
        return self.seconds[quantity, variant] + num_missing * self.seconds[LAST_LAYER_OF[quantity], variant]

    def whole_prefill(self, variant: Variant, full_depth: bool = False) -> float:
        """Seconds from the pixels to the first token."""
        prefill = self.at_full_depth(PREFILL, variant) if full_depth else self.seconds[PREFILL, variant]
        return self.tower(variant) + prefill


# Keys: dtype, configuration and batch size.
Measurements = dict[tuple[str, str, int], Measurement]


# --- models and inputs ---------------------------------------------------------------------------------------------


def build_models(
    setup: Setup,
    dtype: torch.dtype,
    variants: list[Variant] | None = None,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> dict[Variant, PreTrainedModel]:
    """
    One model per variant: the stock model and `variants`, by default all others. All have the random weights of the stock
    model. `attention` is the attention implementation of all parts.
    """
    parts = {
        "vision_config": setup.vision_config,
        "text_config": setup.text_config,
        "vision_feature_layer": setup.vision_feature_layer,
        "image_token_index": IMAGE_TOKEN_ID,
        "attn_implementation": attention,
    }
    with torch.device(device), no_init_weights():  # `normal_` below is faster, and enough here
        stock = AutoModelForImageTextToText.from_config(LlavaConfig(**parts), dtype=dtype).eval()
    stock.tie_weights()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.02)
    models = {setup.stock: stock}
    for variant in setup.variants[1:] if variants is None else variants:
        budget = variant.num_visual_tokens if variant.use_vmtc else None
        config = VmtcCmaiLlavaConfig(
            **parts,
            use_vmtc=variant.use_vmtc,
            vmtc_num_visual_tokens=budget,
            use_cmai=variant.use_cmai,
            **TRAINING_FREE_VMTC,
        )
        with torch.device("meta"):
            models[variant] = VmtcCmaiLlavaForConditionalGeneration(config)
        share_weights(models[variant].eval(), stock)
    return models


def share_weights(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Gives a `model` on the meta device the tensors of another of the same build, not copies of them."""
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    for name, buffer in source.named_buffers():  # a state dict does not have the buffers of positions
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)


def make_inputs(
    setup: Setup, batch_size: int, dtype: torch.dtype, num_images: int = 1, device: torch.device | str = "cpu"
) -> Inputs:
    """Random images and text."""
    image_size, vocab_size = setup.vision_config["image_size"], setup.text_config["vocab_size"]
    words = torch.randint(FIRST_WORD_ID, vocab_size, (batch_size, NUM_TEXT_TOKENS))
    input_ids = {
        count: torch.cat([torch.full((batch_size, num_images * count), IMAGE_TOKEN_ID), words], dim=1).to(device)
        for count in {variant.num_visual_tokens for variant in setup.variants}
    }
    shape = (batch_size * num_images, 3, image_size, image_size)
    return Inputs(torch.randn(shape, dtype=dtype, device=device), input_ids)


def check(what: str, variant: Variant, expected: Any, found: Any) -> None:
    """Raises unless a value of a variant is as expected."""
    if found != expected:
        raise RuntimeError(f"{variant.label}: {what} is {found}, expected {expected}.")


def check_models(models: dict[Variant, PreTrainedModel]) -> None:
    """Raises unless all variants share their weights and use SDPA."""
    addresses = None
    for variant, model in models.items():
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        found = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tensors.items()}
        addresses = found if addresses is None else addresses
        if found != addresses:
            raise RuntimeError(f"The comparison is not fair: {variant.label} has weights of its own.")
        for part in ("vision_tower", "language_model"):
            implementation = getattr(model.model, part).config._attn_implementation
            check(f"the attention of the {part}", variant, "sdpa", implementation)


def check_lengths(models: dict[Variant, PreTrainedModel], inputs: Inputs) -> None:
    """Raises unless towers and caches have the expected lengths, and caches keep only what CMAI needs."""
    for variant, model in models.items():
        features, own_seconds = run_tower(model, inputs.pixel_values)
        check("the number of visual tokens", variant, variant.num_visual_tokens, features.shape[1])
        check("whether VMTC was at work", variant, variant.use_vmtc, own_seconds > 0)
        num_columns = variant.num_visual_tokens + NUM_TEXT_TOKENS
        token, cache = run_prefill(model, inputs.input_ids[variant.num_visual_tokens], features=features)
        check("the length of the cache", variant, num_columns, cache.get_seq_length())
        for layer_idx, layer in enumerate(cache.layers):
            shape = getattr(getattr(layer, "text_to_image", None), "shape", None)
            expected = (len(features), NUM_TEXT_TOKENS, variant.num_visual_tokens)
            expected = expected if variant.use_cmai and layer_idx > 0 else None  # the first inhibits nothing
            check(f"what layer {layer_idx} keeps of the focus", variant, expected, shape and tuple(shape))
        run_decode(model, token, cache)
        check("the length of the cache", variant, num_columns + NUM_DECODE_TOKENS, cache.get_seq_length())


# --- what is timed -------------------------------------------------------------------------------------------------


class TimedCompression(TowerCompression):
    """Measures VMTC's own work: importance scores, clusters and merged tokens of all stages."""

    seconds = 0.0

    def attention_row(self, *args, **kwargs) -> torch.Tensor:
        return self._timed(super().attention_row, *args, **kwargs)

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        return self._timed(super().__call__, *args, **kwargs)

    def _timed(self, function: Callable, *args, **kwargs) -> Any:
        result, seconds = timed(function, *args, **kwargs)
        self.seconds += seconds
        return result


def run_tower(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    Features of one image per row before the projector, `(B, n, vision width)`, computed as `get_image_features` does, and
    the seconds of VMTC's own work in it. Measuring costs only two looks at the clock per stage.
    """
    layer, kwargs, compression = model.config.vision_feature_layer, {}, None
    if isinstance(model, VmtcCmaiLlavaForConditionalGeneration):
        compression = compression_of_call(model.config, model.model.vision_tower, pixel_values, layer)
    if compression is not None:
        compression = kwargs["compression"] = TimedCompression(**vars(compression))
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
    return outputs.hidden_states[layer][:, 1:], 0.0 if compression is None else compression.seconds


def count_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of all layers, and of the tensors that CMAI keeps beside them."""
    names = ("text_to_image", "text_columns", "image_columns")
    states = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return count_cache_bytes(cache) + sum(state.nbytes for state in states if state is not None)


@contextmanager
def last_layer_timer(model: PreTrainedModel) -> Iterator[list[float]]:
    """Fills the list with the seconds of each call of the language model's last layer."""
    layer = model.model.language_model.layers[-1]
    starts: list[float] = []
    seconds: list[float] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        layer.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - starts.pop())),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


# --- measuring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_round(
    turns: list[tuple[Variant, PreTrainedModel]], inputs: Inputs
) -> tuple[dict[tuple[str, Variant], float], dict[Variant, int]]:
    """
    Measures every quantity once, as in [`Measurement`]. Within each quantity the variants take turns in the given order.
    CMAI does not change the tower, so variants with CMAI get the features of those without.
    """
    seconds, features, prefilled = {}, {}, {}
    for variant, model in turns:
        if not variant.use_cmai:
            (features[variant], own), seconds[TOWER, variant] = timed(run_tower, model, inputs.pixel_values)
            seconds[OWN_WORK, variant] = own / seconds[TOWER, variant]
    for variant, model in turns:
        with last_layer_timer(model) as of_layer:
            prefilled[variant], seconds[PREFILL, variant] = timed(
                run_prefill,
                model,
                inputs.input_ids[variant.num_visual_tokens],
                features=features[variant.without_cmai],
            )
        seconds[LAST_LAYER_OF[PREFILL], variant] = sum(of_layer)
    cache_bytes = {variant: count_bytes(cache) for variant, (_, cache) in prefilled.items()}
    for variant, model in turns:
        with last_layer_timer(model) as of_layer:
            _, total = timed(run_decode, model, *prefilled.pop(variant))
        seconds[DECODE, variant] = total / NUM_DECODE_TOKENS
        seconds[LAST_LAYER_OF[DECODE], variant] = sum(of_layer) / NUM_DECODE_TOKENS
    return seconds, cache_bytes


def measure(
    setup: Setup, name: str, batch_sizes: list[int], repeats: int, dtype: torch.dtype
) -> dict[int, Measurement]:
    """
    Medians of all rounds, for each batch size. The models are built outside inference mode, as users do. In inference mode
    torch multiplies by the head's weights on a slower path, which takes seconds in bfloat16.
    """
    models = build_models(setup, dtype)
    check_models(models)
    check_lengths(models, make_inputs(setup, min(batch_sizes), dtype))  # this also warms up
    measurements = {}
    for batch_size in batch_sizes:
        inputs = make_inputs(setup, batch_size, dtype)
        turns = list(models.items())
        samples = defaultdict(list)
        num_rounds = setup.num_rounds(batch_size, repeats)
        for _ in tqdm(range(num_rounds), desc=f"{name}, {dtype}, batch {batch_size}", unit="round"):
            # Later variants find the inputs and the code in the processor's caches, so the order changes every round.
            turns.reverse()
            seconds, cache_bytes = measure_round(turns, inputs)
            for key, value in seconds.items():
                samples[key].append(value)
        medians = {key: median(values) for key, values in samples.items()}
        measurements[batch_size] = Measurement(setup, num_rounds, medians, cache_bytes)
    return measurements


# --- report --------------------------------------------------------------------------------------------------------


def format_cell(value: float, stock: float, unit: str, digits: int) -> str:
    """A value, and the stock model's value divided by it."""
    return f"{value:,.{digits}f} {unit} ({stock / value:.2f}x)"


def format_table(measurement: Measurement) -> str:
    """One batch size of one configuration as a Markdown table, one row per variant."""
    setup, stock = measurement.setup, measurement.setup.stock

    def milliseconds(seconds_of: Callable[[Variant], float], variant: Variant) -> str:
        return format_cell(1000 * seconds_of(variant), 1000 * seconds_of(stock), "ms", digits=1)

    columns: dict[str, Callable[[Variant], float]] = {
        TOWER: measurement.tower,
        "prefill without the tower": lambda variant: measurement.seconds[PREFILL, variant],
        "whole prefill": measurement.whole_prefill,
    }
    if setup.full_depth > setup.num_layers:
        columns[f"whole prefill, extrapolated to {setup.full_depth} layers"] = lambda variant: (
            measurement.whole_prefill(variant, full_depth=True)
        )
    columns[f"decode, per token of {NUM_DECODE_TOKENS}"] = lambda variant: measurement.seconds[DECODE, variant]
    header = ["variant, visual tokens", *columns, "cache after the prefill", OWN_WORK]
    lines = [f"| {' | '.join(header)} |", f"|---{'|---:' * (len(header) - 1)}|"]
    for variant in setup.variants:
        kibibytes, of_stock = (measurement.cache_bytes[which] / 1024 for which in (variant, stock))
        cells = [
            variant.label,
            *(milliseconds(seconds_of, variant) for seconds_of in columns.values()),
            format_cell(kibibytes, of_stock, "KiB", digits=0),
            f"{measurement.seconds[OWN_WORK, variant.without_cmai]:.1%}" if variant.use_vmtc else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_setup(name: str, setup: Setup, measurements: dict[int, Measurement]) -> str:
    """All batch sizes of one configuration as a Markdown section."""
    sections = [f"### {name}: {setup.description}"]
    for batch_size, measurement in measurements.items():
        rounds = f"{measurement.num_rounds} round" + "s" * (measurement.num_rounds > 1)
        sections += [f"Batch {batch_size}, {rounds}:", format_table(measurement)]
    return "\n\n".join(sections)


@dataclass(frozen=True)
class Bar:
    """
    A limit to compare a measured number with.

    Args:
        label (`str`): Name of the number.
        value (`Callable`): Takes a [`Measurement`] and returns the number.
        limit (`Callable`): Takes a setup and a batch size and returns the limit, or `None` if there is none.
        is_most (`bool`): Whether the limit is a maximum, not a minimum.
        is_share (`bool`): Whether the number is a share, not a ratio.
    """

    label: str
    value: Callable[[Measurement], float]
    limit: Callable[[Setup, int], float | None]
    is_most: bool = False
    is_share: bool = False

    def format(self, number: float) -> str:
        return f"{number:.1%}" if self.is_share else f"{number:.2f}x"

    def cell(self, measurement: Measurement, batch_size: int) -> str:
        """The measured number, the limit, and whether the number meets it."""
        value, limit = self.value(measurement), self.limit(measurement.setup, batch_size)
        if limit is None:
            return self.format(value)
        is_met = value <= limit if self.is_most else value >= limit
        sign = "≤" if self.is_most else "≥"
        return f"{self.format(value)} {sign} {self.format(limit)}: {'yes' if is_met else '**no**'}"


def list_bars() -> list[Bar]:
    """
    All bars. A place names the number of visual tokens, which differs by configuration: place 0 has the stock model's
    tokens, places 1 to 3 have those of the budgets.
    """

    def variant_at(setup: Setup, place: int, use_cmai: bool = False) -> Variant:
        return replace(setup.variants[place], use_cmai=use_cmai)

    names = ["all", *(str(budget) for budget in SETUPS["7B"].budgets)]
    bars = []
    for place in (1, 2, 3):
        bars.append(
            Bar(
                f"{OWN_WORK}, of the tower's time, {names[place]} tokens",
                lambda measured, place=place: measured.seconds[OWN_WORK, variant_at(measured.setup, place)],
                lambda setup, batch_size: 0.05,
                is_most=True,
                is_share=True,
            )
        )
    for place in (1, 2):
        bars.append(
            Bar(
                f"vision tower, stock / {names[place]} tokens",
                lambda measured, place=place: (
                    measured.tower(measured.setup.stock) / measured.tower(variant_at(measured.setup, place))
                ),
                lambda setup, batch_size: 1.0,
            )
        )
    for quantity, label in ((PREFILL, "prefill without the tower"), (DECODE, "decode step")):
        for place in (0, 1, 2):
            bars.append(
                Bar(
                    f"{label}, CMAI / without, {names[place]} tokens",
                    lambda measured, quantity=quantity, place=place: (
                        measured.at_full_depth(quantity, variant_at(measured.setup, place, use_cmai=True))
                        / measured.at_full_depth(quantity, variant_at(measured.setup, place))
                    ),
                    lambda setup, batch_size: 1.1,
                    is_most=True,
                )
            )
    for full_depth, label in ((False, "as measured"), (True, "extrapolated")):
        for place, use_cmai in ((2, False), (2, True)):
            bars.append(
                Bar(
                    f"whole prefill, stock / {names[place]} tokens{' and CMAI' * use_cmai}, {label}",
                    lambda measured, full_depth=full_depth, place=place, use_cmai=use_cmai: (
                        measured.whole_prefill(measured.setup.stock, full_depth)
                        / measured.whole_prefill(variant_at(measured.setup, place, use_cmai), full_depth)
                    ),
                    lambda setup, batch_size: None if setup is not SETUPS["7B"] else 2.0 if batch_size == 1 else 4.0,
                )
            )
    return bars


def format_bars(measurements: Measurements) -> str:
    """The bars as a Markdown section: one row per bar, one column per batch size, configuration and dtype."""
    header = [f"{name}, {dtype}, batch {batch_size}" for dtype, name, batch_size in measurements]
    lines = ["### Bars", "", f"| | {' | '.join(header)} |", f"|---{'|---:' * len(header)}|"]
    for bar in list_bars():
        cells = [bar.cell(measured, batch_size) for (_, _, batch_size), measured in measurements.items()]
        lines.append(f"| {bar.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


NOTES = (
    f"Medians; {NUM_TEXT_TOKENS} text tokens and one image a row. In brackets: the stock model's value divided by this one, "
    "so that more is better. The whole prefill is the sum of tower and prefill; the prefill contains the projector. "
    "VMTC has the training-free preset, whose late stages save less of the tower than the paper's. "
    "CMAI does not touch the tower: variants with it have the tower's time of those without. VMTC's own work are the "
    "importance scores, the clusters and the merged tokens, as a share of the time of its tower. The cache is keys, "
    "values and what CMAI keeps beside them.\n\n"
    "Extrapolated: the layers of the language model that were left out would each take as long as its last one, whose "
    "time is measured in the same calls. The bars of CMAI are for all layers, too: it does nothing in the first, which "
    "with few layers would hide half of its cost. The bars name the tokens of 576; `tiny` has 64 of them in all."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="VMTC and CMAI in LLaVA against the stock model, on the CPU.")
    parser.add_argument("--configs", nargs="+", choices=list(SETUPS), default=["7B", "135M"])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"] if has_fast_bfloat16() else ["float32"],
        help="default: both, or float32 on a CPU that is slow in bfloat16",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="take the median of this many rounds (10 times as many for tiny, one for 7B above batch 1)",
    )
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's choice)")
    parser.add_argument("--output-dir", type=Path, help="also write the tables to compare_vmtc_cmai.md in this folder")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    sections: list[str] = []
    measurements: Measurements = {}
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        sections.append(describe_machine(dtype))
        for name in arguments.configs:
            setup = SETUPS[name]
            of_batch_sizes = measure(setup, name, arguments.batch_sizes, arguments.repeats, dtype)
            sections.append(format_setup(name, setup, of_batch_sizes))
            measurements |= {(dtype_name, name, size): measured for size, measured in of_batch_sizes.items()}
    report = "\n\n".join([*sections, format_bars(measurements), NOTES])
    print(report)
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "compare_vmtc_cmai.md").write_text(report + "\n")


if __name__ == "__main__":
    main()
