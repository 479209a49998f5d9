"""
Counts the operations that Python starts for one prefill and one step of the decoding, in eager mode. On a GPU at batch 1
this number, more than the arithmetic, decides how long a call takes: each operation is at least one kernel to launch.

    python benchmarks/count_launches.py --output benchmarks/results/count_launches.md

The models have the papers' depths, narrow layers and random weights, so this takes seconds and needs no GPU. Counted is what
ATen dispatches, without views and allocations, which launch nothing.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ta_llava import (
    TaLlavaConfig,
    TaLlavaForConditionalGeneration,
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
)


IMAGE_TOKEN = 5
NUM_PATCHES, NUM_VISUAL_TOKENS = 576, 64
TEXT = [2, *range(10, 30)]
# Operations of these names allocate, or wrap a number of Python.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}


@dataclass(frozen=True)
class Row:
    """
    A row of the table.

    Args:
        ours, stock (`int`): Operations of our system, and of LLaVA with the same backbones.
        budget (`float`): How many times those of LLaVA they may be. The tests hold them to it.
    """

    name: str
    ours: int
    stock: int
    budget: float


class LaunchCounter(TorchDispatchMode):
    """
    Counts operations while it is on, but for those within `excluded` modules. `nn.functional.rms_norm` counts as one: it is
    one kernel on a GPU, though six operations on a CPU.
    """

    def __init__(self, *excluded: torch.nn.Module):
        super().__init__()
        self.count, self._depth, self._excluded = 0, 0, excluded
        self._hooks: list[Any] = []

    def __enter__(self):
        def shift(by: int):
            def hook(*_):
                self._depth += by

            return hook

        for module in self._excluded:
            self._hooks.append(module.register_forward_pre_hook(shift(1)))
            self._hooks.append(module.register_forward_hook(shift(-1)))
        self._rms_norm = torch.nn.functional.rms_norm

        def rms_norm(*args, **kwargs):
            self.count += self._depth == 0
            self._depth += 1
            try:
                return self._rms_norm(*args, **kwargs)
            finally:
                self._depth -= 1

        torch.nn.functional.rms_norm = rms_norm
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        torch.nn.functional.rms_norm = self._rms_norm
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._depth == 0 and not func.is_view and func.overloadpacket.__name__ not in _ALLOCATIONS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def clip_config(num_hidden_layers: int) -> CLIPVisionConfig:
    """A narrow CLIP of LLaVA's 24 x 24 patches."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        image_size=24 * 4,
        patch_size=4,
    )


def llama_config() -> LlamaConfig:
    """A narrow Vicuna-7B."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
    )


def gemma_config() -> Gemma2Config:
    """A narrow Gemma-2-2B."""
    return Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=64,
        final_logit_softcapping=None,  # the library's LLaVA does not cap the logits of any language model
    )


@torch.no_grad()
def count_call(model: Any, *excluded: torch.nn.Module, **inputs: Any) -> int:
    """Operations of one call, without those of the `excluded` modules."""
    with LaunchCounter(*excluded) as counter:
        model(**inputs)
    return counter.count


def count_answer(model: Any, num_image_tokens: int) -> tuple[int, int]:
    """Operations behind the vision tower: of the prefill of a prompt with one image, and of the second decoding step."""
    cache = DynamicCache(config=model.config.text_config)
    prompt = torch.tensor([[IMAGE_TOKEN] * num_image_tokens + TEXT])
    images = {"pixel_values": torch.randn(1, 3, 96, 96)}
    token = torch.tensor([[30]])
    prefill = count_call(model, model.model.vision_tower, input_ids=prompt, past_key_values=cache, **images)
    count_call(model, input_ids=token, past_key_values=cache)
    return prefill, count_call(model, input_ids=token, past_key_values=cache)


def count_ta_llava() -> list[Row]:
    """TA-LLaVA on Gemma-2-2B, against a LLaVA with the same backbones."""
    tower, text = clip_config(2), gemma_config()
    stock_config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN)
    stock = LlavaForConditionalGeneration._from_config(stock_config, attn_implementation={"text_config": "eager"})
    config = TaLlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN, response_marker_ids=[29])
    ours = TaLlavaForConditionalGeneration(config)
    prefills, steps = zip(
        count_answer(ours.eval(), config.num_prefix_tokens), count_answer(stock.eval(), NUM_PATCHES), strict=True
    )
    return [Row("TA-LLaVA: prefill behind the tower", *prefills, 1.30), Row("TA-LLaVA: decoding step", *steps, 1.0)]


def count_vmtc() -> list[Row]:
    """A CLIP ViT-L, up to its second-last block, with VMTC and without."""
    counts = []
    for use_vmtc in (True, False):
        config = VmtcCmaiLlavaConfig(
            vision_config=clip_config(24),
            text_config=llama_config(),
            image_token_id=IMAGE_TOKEN,
            use_vmtc=use_vmtc,
            vmtc_num_visual_tokens=NUM_VISUAL_TOKENS,
        )
        model = VmtcCmaiLlavaForConditionalGeneration(config).eval()
        with torch.no_grad(), LaunchCounter(model.model.multi_modal_projector) as counter:
            model.get_image_features(torch.randn(1, 3, 96, 96))
        counts.append(counter.count)
    return [Row(f"VMTC: vision tower, {NUM_PATCHES} to {NUM_VISUAL_TOKENS} tokens", *counts, 1.6)]


def count_cmai() -> list[Row]:
    """The language model of LLaVA-1.5-7B with CMAI and without."""
    counts = []
    for use_cmai in (True, False):
        config = VmtcCmaiLlavaConfig(
            vision_config=clip_config(2), text_config=llama_config(), image_token_id=IMAGE_TOKEN, use_cmai=use_cmai
        )
        counts.append(count_answer(VmtcCmaiLlavaForConditionalGeneration(config).eval(), NUM_PATCHES))
    prefills, steps = zip(*counts, strict=True)
    return [Row("CMAI: prefill behind the tower", *prefills, 1.25), Row("CMAI: decoding step", *steps, 1.25)]


def format_table(rows: list[Row]) -> str:
    lines = ["| operations of one call, batch 1, eager | ours | LLaVA | ratio |", "|---|---:|---:|---:|"]
    lines += [f"| {row.name} | {row.ours:,} | {row.stock:,} | {row.ours / row.stock:.2f} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    table = format_table([*count_ta_llava(), *count_vmtc(), *count_cmai()])
    print(table)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
