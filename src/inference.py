"""Loads a model and answers questions about images in batches, for the command line and the evaluation."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .building.compress import compressed_parts
from .common.adapters import is_adapter, merge_into, model_of_adapter
from .common.loading import check_processor, config_of, load_complete, loading_from
from .common.shipped_models import DEFAULT_MODEL
from .image_loading import open_images
from .vmtc_cmai_patch import VmtcCmaiLlavaForConditionalGeneration


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


def load(
    model: str | Path = DEFAULT_MODEL, num_visual_tokens: int | None = None, cmai_max_ratio: float | None = None
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

    Raises:
        `ValueError`: The model cannot be loaded, lacks weights, or cannot have VMTC and CMAI. The message says what is
            missing.
    """
    if is_adapter(model):
        source = model_of_adapter(model)
        base, processor = load(source, num_visual_tokens, cmai_max_ratio)
        return merge_into(base, model, source).eval(), processor
    on_gpu = torch.cuda.is_available()
    model_class: Any = AutoModelForImageTextToText
    kwargs: dict[str, Any] = {}
    if num_visual_tokens is not None or cmai_max_ratio is not None:
        _, config, processor = compressed_parts(model, num_visual_tokens, cmai_max_ratio)
        model_class, kwargs = VmtcCmaiLlavaForConditionalGeneration, {"config": config}
    else:
        config = config_of(model)
    if not kwargs:
        with loading_from(model):  # before any weights are downloaded
            processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    # The library would widen some weights of a model that bitsandbytes has quantised, and leave others.
    is_quantised = getattr(config, "quantization_config", None) is not None
    dtype = "auto" if on_gpu or is_quantised else torch.float32
    loaded = load_complete(model, model_class, dtype=dtype, **kwargs)
    check_processor(processor, model)
    return loaded.to("cuda" if on_gpu else "cpu").eval(), processor


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
        batch_size (`int`): Questions answered at a time; does not change an answer.
        max_new_tokens (`int`): Longest answer in tokens.
        progress (`bool`): Show a progress bar.

    Raises:
        `ValueError`: A question is empty or one of its images cannot be read.
    """
    generate: Any = model.generate  # of GenerationMixin, which `PreTrainedModel` does not name
    for images, question in questions:
        if not question.strip():
            raise ValueError(f"The question about {images} is empty.")
    with tqdm(total=len(questions), unit="question", disable=None if progress else True) as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            # The processors of the library take fewer kinds of images.
            conversations = [_conversation(open_images(images), question) for images, question in batch]
            inputs: Any = processor.apply_chat_template(  # a BatchFeature, since `return_dict` is set
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
            inputs = inputs.to(model.device)
            output = generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
            new_tokens = output[:, inputs["input_ids"].shape[1] :]
            bar.update(len(batch))
            yield from (text.strip() for text in processor.post_process_image_text_to_text(new_tokens))
