"""
The shipped models with weights that torchao or bitsandbytes quantised: what is quantised, what comes out, what is saved. The
tests use a GPU if there is one.
"""

from typing import Any

import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_LLAVA, SHIPPED_MODEL
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    TorchAoConfig,
)
from transformers.utils import is_accelerate_available, is_bitsandbytes_available, is_torchao_available

from ta_llava import VmtcCmaiLlavaForConditionalGeneration
from ta_llava.building.compress import compressed_parts
from ta_llava.inference import answer, load
from ta_llava.publishing.export import export_model


needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="torchao is not installed")
needs_bitsandbytes = pytest.mark.skipif(
    not (is_bitsandbytes_available() and is_accelerate_available()),
    reason="bitsandbytes or accelerate is not installed",
)
BACKENDS = [
    pytest.param("torchao_int8", marks=needs_torchao),
    pytest.param("bitsandbytes_int8", marks=needs_bitsandbytes),
    pytest.param("bitsandbytes_nf4", marks=needs_bitsandbytes),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUESTIONS = ["what color is the shape?", "is there a circle?", "does the image not contain a teal shape?"]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def quantization(backend: str, skip: list[str] | None = None) -> Any:
    """A `quantization_config` as users pass it. It says nothing about modules except `skip`."""
    if backend == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)
    if backend == "bitsandbytes_int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)


def load_shipped(name: str, backend: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and processor. The LLaVA has VMTC and CMAI on."""
    kwargs = {"dtype": dtype, "quantization_config": None if backend is None else quantization(backend)}
    if name == "ta-llava":
        model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, **kwargs)
        return model.to(DEVICE), AutoProcessor.from_pretrained(SHIPPED_MODEL)
    _, config, processor = compressed_parts(SHIPPED_LLAVA, num_visual_tokens=16, cmai_max_ratio=0.6)
    # By novelty, rounded weights keep other patches, and outputs are of other columns.
    config.vmtc_kept_tokens = "importance"
    model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(SHIPPED_LLAVA, config=config, **kwargs)
    return model.to(DEVICE), processor


def is_quantised(linear: nn.Linear) -> bool:
    """bitsandbytes replaces the module, and torchao the tensor."""
    return type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def names_of_quantised(model: nn.Module) -> set[str]:
    return {name for name, linear in linears(model).items() if is_quantised(linear)}


def batch(processor: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The questions about the example image, padded on the left."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "path": str(EXAMPLE_IMAGE)}, {"type": "text", "text": text}]}]
        for text in QUESTIONS
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(DEVICE, dtype)


# --- what is quantised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModel])
def test_language_model_and_tower_are_quantised_and_nothing_else(backend, auto_class):
    original, model = (
        auto_class.from_pretrained(SHIPPED_MODEL, dtype=torch.bfloat16, quantization_config=config).to(DEVICE)
        for config in (None, quantization(backend))
    )
    for name, linear in linears(model).items():
        part = name.removeprefix("model.").split(".")[0]
        assert is_quantised(linear) == (part in ("language_model", "vision_tower")), name
    for part in ("text_adapter", "vision_adapter", "prefix_embedding", "multi_modal_projector"):
        for name, parameter in model.base_model.get_submodule(part).named_parameters(prefix=part):
            assert parameter.dtype == torch.bfloat16, name
            assert torch.equal(parameter, original.base_model.get_parameter(name)), name


def test_own_list_of_modules_is_added_to_them(backend):
    skip = ["model.vision_tower", "lm_head"]
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, quantization_config=quantization(backend, skip))
    for name, linear in linears(model).items():
        assert is_quantised(linear) == name.startswith("model.language_model."), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_quantisation_all_weights_have_one_dtype(dtype):
    model, _ = load_shipped("ta-llava", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_adapters_learn_on_a_frozen_quantised_model(backend):
    model, processor = load_shipped("ta-llava", backend)
    inputs = batch(processor)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, linear in linears(model).items():
        if is_quantised(linear):
            assert not linear.weight.requires_grad and linear.weight.grad is None, name
        elif "adapter" in name or "projector" in name:
            assert linear.weight.grad.isfinite().all() and linear.weight.grad.any(), name
    assert model.model.prefix_embedding.weight.grad.any()


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ta-llava", "llava"])
def test_outputs_are_close_to_the_original_with_and_without_a_cache(backend, name):
    original, processor = load_shipped(name)
    model, _ = load_shipped(name, backend)
    inputs = batch(processor)
    with torch.no_grad():
        expected, given = (each(**inputs).logits[inputs["attention_mask"].bool()] for each in (original, model))
    assert 0 < (given - expected).norm() / expected.norm() < 0.15

    generate = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generate |= {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(**inputs, **generate, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    # The tolerance is wide because bitsandbytes also rounds the input of a matrix, so its last bit may decide.
    expected = torch.stack(uncached.logits)
    assert (torch.stack(cached.logits) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("name", ["ta-llava", "llava"])
def test_answers_are_right_alone_and_in_a_batch(backend, name):
    model, processor = load_shipped(name, backend)
    questions = [([EXAMPLE_IMAGE], text) for text in QUESTIONS]
    for batch_size in (1, 3):
        assert list(answer(model, processor, questions, batch_size)) == ["teal", "no", "no"]


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ta-llava", "llava"])
def test_saved_and_exported_is_loaded(backend, name, tmp_path):
    model, processor = load_shipped(name, backend, torch.bfloat16)
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    original = {"ta-llava": SHIPPED_MODEL, "llava": SHIPPED_LLAVA}[name]
    size, size_before = ((folder / "model.safetensors").stat().st_size for folder in (saved, original))
    assert size < 0.65 * size_before
    export_model(saved, exported)
    inputs = batch(processor, torch.bfloat16)
    with torch.no_grad():
        expected = model(**inputs).logits
        for loaded in (type(model).from_pretrained(saved).to(DEVICE), load(saved)[0], load(exported)[0]):
            assert names_of_quantised(loaded) == names_of_quantised(model)
            assert torch.equal(loaded(**inputs).logits, expected)


def test_quantised_stock_llava_loads_as_it_is(backend, tmp_path):
    """Its projector is quantised too. A class that left the projector out would not fit the files."""
    stock = LlavaForConditionalGeneration.from_pretrained(
        SHIPPED_LLAVA, quantization_config=quantization(backend), dtype=torch.bfloat16
    ).to(DEVICE)
    stock.save_pretrained(tmp_path)
    model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(tmp_path).to(DEVICE)
    inputs = batch(AutoProcessor.from_pretrained(SHIPPED_LLAVA), torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
