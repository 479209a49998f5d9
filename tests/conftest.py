"""Small models of both systems with lively weights, prompts and images for them, and environments without this package."""

import os
import shutil
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from ta_llava import (
    TaLlavaConfig,
    TaLlavaForConditionalGeneration,
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
)


FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent

PAD, EOS, BOS, TURN, MODEL, IMAGE, VOCAB = 0, 1, 2, 3, 4, 7, 60
NUM_PREFIX_TOKENS = 3


def text_config(backbone: str, **kwargs):
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **kwargs,
    }
    # The windows are shorter than the prompts, so a prefix that slides out of the window shows.
    config_class, defaults = {
        "gemma2": (Gemma2Config, {"query_pre_attn_scalar": 8, "sliding_window": 8}),
        "gemma3": (Gemma3TextConfig, {"query_pre_attn_scalar": 8, "sliding_window": 8, "sliding_window_pattern": 2}),
        "llama": (LlamaConfig, {"tie_word_embeddings": False}),
        "mistral": (MistralConfig, {"sliding_window": 12}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {}),
    }[backbone]
    return config_class(**{**defaults, **config})


def build_config(backbone: str = "gemma2", text_kwargs: dict | None = None, **kwargs) -> TaLlavaConfig:
    vision_config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=12,
        patch_size=4,
        projection_dim=24,
    )
    return TaLlavaConfig(
        vision_config=vision_config,
        **{
            "text_config": text_config(backbone, **(text_kwargs or {})),
            "num_prefix_tokens": NUM_PREFIX_TOKENS,
            "image_token_id": IMAGE,
            "response_marker_ids": [TURN, MODEL],
            **kwargs,
        },
    )


def make_lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Make the weights so large that attention is far from uniform. Every part then matters for what a test compares."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(parameter + 0.1 * values)
            elif "embed" in name:
                parameter.copy_(values * (1.0 if "vision" in name else 0.5))
            else:
                parameter.copy_(values * 1.5 / parameter[0].numel() ** 0.5)
    return model


def build_model(backbone: str = "gemma2", **kwargs) -> TaLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return make_lively(TaLlavaForConditionalGeneration(build_config(backbone, **kwargs))).eval()


@pytest.fixture(scope="session", params=["gemma2", "llama"])
def model(request) -> TaLlavaForConditionalGeneration:
    """One model per backbone. A test that changes it must build its own."""
    return build_model(request.param)


@pytest.fixture(scope="session")
def gemma() -> TaLlavaForConditionalGeneration:
    return build_model("gemma2")


def random_tokens(length: int, seed: int) -> list[int]:
    """Ids of ordinary words, without special tokens and placeholders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB, (length,), generator=generator).tolist()


def prompt_ids(length: int = 6, seed: int = 0, image: bool = True, response: int = 0) -> list[int]:
    """`[placeholders, BOS, question, marker, response]` of a row."""
    placeholders = [IMAGE] * NUM_PREFIX_TOKENS if image else []
    question = random_tokens(length, seed)
    return [*placeholders, BOS, *question, TURN, MODEL, *random_tokens(response, seed + 1000)]


def random_images(rows: int, images: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, images, 3, 12, 12, generator=generator)


def batch_of(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of the rows, padded on one side."""
    length = max(len(row) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (length - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(row, PAD) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
    }


SHIPPED_MODEL = ROOT / "checkpoints" / "ta-llava-tiny"
SHIPPED_LLAVA = ROOT / "checkpoints" / "llava-tiny"
EXAMPLE_IMAGE = ROOT / "examples" / "teal_triangle.png"


def copy_without_a_weight(folder: Path) -> str:
    """Copy the shipped model without one of its weights, and return the name of that weight."""
    shutil.copytree(SHIPPED_MODEL, folder, ignore=shutil.ignore_patterns("*.py"))
    weights = load_file(SHIPPED_MODEL / "model.safetensors")
    name = next(name for name in weights if "prefix" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text("mine")
    return name


@pytest.fixture(scope="session")
def processor():
    """The processor of the shipped model."""
    return AutoProcessor.from_pretrained(SHIPPED_MODEL)


def make_environment(folder: Path, *packages: str) -> Path:
    """Make an environment with these packages and their requirements, linked from this one. Return its Python."""
    venv.create(folder, with_pip=False)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    done, todo = set(), [Requirement(package) for package in packages]
    while todo:
        requirement = todo.pop()
        if str(requirement) in done:
            continue
        done.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:  # for another platform, or of an extra that is not installed
            continue
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site_packages / name).is_symlink():
                (site_packages / name).symlink_to(package.locate_file(name))
        extras = ["", *requirement.extras]
        needed = map(Requirement, package.requires or ())
        todo += [each for each in needed if not each.marker or any(each.marker.evaluate({"extra": x}) for x in extras)]
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def python_without_the_package(tmp_path_factory) -> Path:
    """The Python of an environment with the packages that models on the Hub need, and no others."""
    return make_environment(tmp_path_factory.mktemp("environment"), "transformers", "torch", "pillow")


def run_without_the_package(python: Path, folder: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """Run a script in a folder with `python_without_the_package`, and return the lines that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [python, "-c", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.splitlines()


# --- LLaVA ---------------------------------------------------------------------------------------------------------

# The models of `build_llava` read 24 x 24 pixels as 36 patches, and VMTC keeps this many visual tokens.
NUM_VISUAL_TOKENS = 9


def build_llava_config(backbone: str = "llama", **kwargs) -> VmtcCmaiLlavaConfig:
    """CLIP of 5 layers, a language model of 4 layers, VMTC to 9 visual tokens, and CMAI."""
    vision_config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=24,
        patch_size=4,
        projection_dim=24,
    )
    return VmtcCmaiLlavaConfig(
        **{
            "vision_config": vision_config,
            "text_config": text_config(backbone, num_hidden_layers=4),
            "image_token_index": IMAGE,
            "use_vmtc": True,
            "vmtc_num_visual_tokens": NUM_VISUAL_TOKENS,
            "vmtc_merge_weights": "normalized",
            "use_cmai": True,
            **kwargs,
        }
    )


def build_llava(backbone: str = "llama", **kwargs) -> VmtcCmaiLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return make_lively(VmtcCmaiLlavaForConditionalGeneration(build_llava_config(backbone, **kwargs))).eval()


def llava_prompt(length: int = 6, seed: int = 0, images: int = 1, num_visual_tokens: int = NUM_VISUAL_TOKENS):
    """`[BOS, words, placeholders, words]` of a row, with two words after each image."""
    row = [BOS, *random_tokens(2, seed + 100)]
    for image in range(images):
        row += [IMAGE] * num_visual_tokens + random_tokens(2, seed + 200 + image)
    return row + random_tokens(length, seed)


def llava_inputs(rows: list[list[int]], side: str = "left", seed: int = 0, num_visual_tokens: int = NUM_VISUAL_TOKENS):
    """`input_ids`, `attention_mask` and, if there are images, `pixel_values` of the rows, padded on one side."""
    inputs = batch_of(rows, side)
    count = sum(row.count(IMAGE) for row in rows) // num_visual_tokens
    if count:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(count, 3, 24, 24, generator=generator)
    return inputs
