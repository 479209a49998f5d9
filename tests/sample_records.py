"""Records of samples in LLaVA's format, their images, and processors with chat templates of several kinds."""

import json
from pathlib import Path

from conftest import EXAMPLE_IMAGE
from PIL import Image
from tiny_parts import build_image_processor, build_tokenizer
from transformers import PreTrainedTokenizerFast

from ta_llava import TaLlavaProcessor, VmtcCmaiLlavaProcessor
from ta_llava.building.chat_templates import GEMMA_CHAT_TEMPLATE


NUM_VISUAL_TOKENS, NUM_PREFIX_TOKENS = 9, 3
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
# As on the Hub: images first, lists only, and no token at the end of a turn.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Text only; the last answer is preceded by an empty thought, which a prefix of a conversation has elsewhere.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What ends a conversation does not end a turn.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# As Gemma's own, which also has no system messages.
GEMMA_TEXT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build_byte_tokenizer(model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """A token for every byte, so that any text comes back as it was, and a BOS token before everything."""
    return build_tokenizer(
        "bytes",
        ["<image>", "<start_of_turn>", "<end_of_turn>", "<|im_end|>", "<|end|>"],
        {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"},
        starts_with_bos=True,
        model_max_length=model_max_length,
        padding_side="left",
    )


def build_ta_llava(chat_template: str = GEMMA_CHAT_TEMPLATE, **kwargs) -> TaLlavaProcessor:
    return TaLlavaProcessor(
        build_image_processor(),
        build_byte_tokenizer(**kwargs),
        num_prefix_tokens=NUM_PREFIX_TOKENS,
        chat_template=chat_template,
    )


def build_llava(chat_template: str = VICUNA, **kwargs) -> VmtcCmaiLlavaProcessor:
    return VmtcCmaiLlavaProcessor(
        build_image_processor(),
        build_byte_tokenizer(**kwargs),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        use_vmtc=True,
        vmtc_num_visual_tokens=NUM_VISUAL_TOKENS,
        chat_template=chat_template,
    )


BUILDERS = {"ta_llava": build_ta_llava, "llava": build_llava}


def turns(*values: str) -> list[dict]:
    return [{"from": "gpt" if index % 2 else "human", "value": value} for index, value in enumerate(values)]


def record(*values: str, **kwargs) -> dict:
    return {"id": "a", "image": "one.png", "conversations": turns(*values or ("<image>\nWhat?", "A ball.")), **kwargs}


def write_json(path: Path, records: list) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


def save_images(images: Path) -> Path:
    """Images one.png to three.png, of one colour and different sizes each."""
    (images / "sub").mkdir(parents=True)
    for index, name in enumerate(["one", "two", "sub/three"]):
        Image.new("RGB", (30 + 10 * index, 40), (80 * index, 0, 200)).save(images / f"{name}.png")
    (images / "text.png").write_text("no image")
    content = EXAMPLE_IMAGE.read_bytes()
    (images / "truncated.png").write_bytes(content[: len(content) // 2])
    return images


def answers(processor, labels) -> str:
    """What the labels say, a bar for each gap."""
    groups: list[list[int]] = [[]]
    for label in [*labels]:
        if label != -100:
            groups[-1].append(int(label))
        elif groups[-1]:
            groups.append([])
    return "|".join(processor.tokenizer.decode(group) for group in groups if group)
