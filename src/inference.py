"""Loads a model and answers questions about images in batches, for the command line and the evaluation."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .building.compress import compressed_parts, with_vmtc_and_cmai
from .common.adapters import is_adapter, merge_into, model_of_adapter
from .common.families import LLAVA_TYPES, VIEWS_TYPES, family_of, has_views
from .common.loading import check_processor, config_of, load_complete, loading_from
from .common.shipped_models import DEFAULT_MODEL
from .image_loading import open_images
from .image_views import check_compilable
from .vision_language_model import is_compiled


# Arguments of `generate()` that take the likeliest token at each step and give one answer per question, whatever the model's
# generation_config.json says. That file still decides which tokens end an answer or are never written.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "token_healing": False,
    "prefill_chunk_size": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "return_dict_in_generate": False,
}

# Prompts of a compiled model are padded to a multiple of this number of columns, so that few lengths need graphs.
BUCKET_SIZE = 64
# Most graphs of one function, in place of the library's 8: each length and each number of rows or images has its own.
MAX_GRAPHS = 64


def load(
    model: str | Path = DEFAULT_MODEL,
    num_visual_tokens: int | None = None,
    cmai_max_ratio: float | None = None,
    compiled: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Loads the model and the processor of a folder or Hub repo, in evaluation mode, on the GPU if there is one. On the CPU,
    half precision weights become float32, unless the model is quantised.

    Args:
        model (`str` or `Path`): Folder or Hub repo. For a LoRA adapter, the model that it names is loaded and the adapter
            is merged into its weights.
        num_visual_tokens (`int`, *optional*): Turn VMTC of a LLaVA on and keep this many visual tokens per image. By
            default, the config decides.
        cmai_max_ratio (`float`, *optional*): Turn CMAI of a LLaVA on and inhibit this share of the image tokens in the last
            layer; 0 turns CMAI off. By default, the config decides.
        compiled (`bool`): Call [`compile_model`].

    Raises:
        `ValueError`: The model cannot be loaded, lacks weights, or cannot have VMTC and CMAI, or cannot be compiled. The
            message says what is missing.
    """
    if is_adapter(model):
        source = model_of_adapter(model)
        base, processor = load(source, num_visual_tokens, cmai_max_ratio, compiled)
        return merge_into(base, model, source).eval(), processor
    on_gpu = torch.cuda.is_available()
    model_class: Any = AutoModelForImageTextToText
    kwargs: dict[str, Any] = {}
    if num_visual_tokens is not None or cmai_max_ratio is not None:
        _, config, processor = compressed_parts(model, num_visual_tokens, cmai_max_ratio)
        model_class, kwargs = family_of(config.model_type).head, {"config": config}
    else:
        config = config_of(model)
    if compiled and config.model_type in LLAVA_TYPES:  # the stock classes keep no cache for compiled graphs
        model_class, kwargs = family_of(config.model_type).head, {"config": with_vmtc_and_cmai(config)}
        if has_views(config):
            check_compilable(kwargs["config"])
    if num_visual_tokens is None and cmai_max_ratio is None:
        processor = load_processor(model, config)  # before any weights are downloaded
    # The library would widen some weights of a model that bitsandbytes has quantised, and leave others.
    is_quantised = getattr(config, "quantization_config", None) is not None
    dtype = "auto" if on_gpu or is_quantised else torch.float32
    loaded = load_complete(model, model_class, dtype=dtype, **kwargs)
    check_processor(processor, model)
    loaded = loaded.to("cuda" if on_gpu else "cpu").eval()
    return compile_model(loaded) if compiled else loaded, processor


def load_processor(model: str | Path, config: Any) -> ProcessorMixin:
    """
    The processor of a folder or Hub repo, whose config is known. Models with views get ours: the stock processor of
    LLaVA-OneVision needs torchvision, though only for videos.

    Raises:
        `ValueError`: It cannot be loaded.
    """
    processor_class: Any = AutoProcessor
    if config.model_type in VIEWS_TYPES:
        processor_class = family_of(config.model_type).processor
    with loading_from(model):
        return processor_class.from_pretrained(model, trust_remote_code=False)


def compile_model(model: PreTrainedModel, backend: str = "inductor") -> PreTrainedModel:
    """
    Compiles the vision tower, the prefill and the decoding of a model in place, each without graph breaks, on a GPU as CUDA
    graphs. The graphs are made at the first calls. [`answer`] then uses a static cache, and pads prompts to multiples of
    `BUCKET_SIZE` columns. Each length has its graphs, and so has each number of rows or images. If you call `generate()`
    yourself, pass `cache_implementation="static"` and `disable_compile=True` (the library need not compile once more).

    Args:
        model ([`TaLlavaForConditionalGeneration`] or [`VmtcCmaiLlavaForConditionalGeneration`]): In evaluation mode.
        backend (`str`): A backend of `torch.compile`.

    Raises:
        `ValueError`: The model is of another class or on several devices, has a total budget of pictures in views, its
            quantised weights cannot be compiled, or there is no C++ compiler.
    """
    on_gpu = model.device.type == "cuda"
    if not hasattr(model, "_static_cache"):  # by name: the class may have come with a checkpoint
        raise ValueError(f"Only a TA-LLaVA or a LLaVA can be compiled, but the model is a {type(model).__name__}.")
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(f"A model on {len(devices)} devices cannot be compiled. Load it on one, or do not compile.")
    if has_views(model.config):
        check_compilable(model.config)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"Weights that {method} has quantised cannot be compiled. Leave them as they are, or do not compile."
        )
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if backend == "inductor" and not on_gpu and not any(map(shutil.which, compilers)):
        raise ValueError(
            "On the CPU, torch.compile needs a C++ compiler. Install one (on Debian: `apt-get install g++`)."
        )
    mode = "reduce-overhead" if on_gpu else None
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    base: Any = model.base_model
    base.vision_tower.compile(fullgraph=True, backend=backend, mode=mode)
    model.compile(fullgraph=True, backend=backend, mode=mode)
    return model


def _conversation(images: Iterable[Any], question: str) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: list[tuple[list[Any], str]],
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: bool = False,
) -> Iterator[str]:
    """
    Answers `(images, question)` pairs by greedy decoding. Yields the answers in order, as soon as they are there.

    Args:
        questions (`list[tuple[list, str]]`):
            Any number of images (path, URL, base64, bytes, PIL image or array), and the question about them.
        batch_size (`int`):
            Questions answered at a time; does not change an answer. A compiled model always gets this number of rows: if
            fewer questions are left, the last one is repeated.
        max_new_tokens (`int`): Longest answer in tokens.
        progress (`bool`): Show a progress bar.

    Raises:
        `ValueError`: A question is empty or one of its images cannot be read.
    """
    generate: Any = model.generate  # of GenerationMixin, which `PreTrainedModel` does not name
    compiled = is_compiled(model)
    static = {"cache_implementation": "static", "disable_compile": True} if compiled else {}
    padding = {"padding": True, "padding_side": "left", "pad_to_multiple_of": BUCKET_SIZE if compiled else None}
    for images, question in questions:
        if not question.strip():
            raise ValueError(f"The question about {images} is empty.")
    with tqdm(total=len(questions), unit="question", disable=None if progress else True) as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            num_asked = len(batch)
            if compiled:
                batch = batch + batch[-1:] * (batch_size - num_asked)
            # The processors of the library take fewer kinds of images.
            conversations = [_conversation(open_images(images), question) for images, question in batch]
            inputs: Any = processor.apply_chat_template(  # a BatchFeature, since `return_dict` is set
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=padding,
            )
            inputs = inputs.to(model.device)
            output = generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY, **static)
            new_tokens = output[:num_asked, inputs["input_ids"].shape[1] :]
            bar.update(num_asked)
            yield from (text.strip() for text in processor.post_process_image_text_to_text(new_tokens))
