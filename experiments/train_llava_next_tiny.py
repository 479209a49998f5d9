"""
Trains a small LLaVA-NeXT on pictures of several shapes (`shape_pictures.py`), with LLaVA's recipe for instruction tuning.

It starts from the weights of `checkpoints/llava-tiny`, which knows one shape in an image of 64 x 64 pixels. Here a picture
has two to four tiles of that size, beside the whole picture. The result never saw VMTC. Rerun the same command to resume.

    python experiments/train_llava_next_tiny.py --output-dir runs/llava-next-tiny
"""

from pathlib import Path

import torch
from shape_pictures import build_pictures, write_llava_format
from train_llava_tiny import RECIPES
from train_ta_llava_tiny import argument_parser
from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ta_llava import VmtcCmaiLlavaNextConfig, VmtcCmaiLlavaNextForConditionalGeneration, VmtcCmaiLlavaNextProcessor
from ta_llava.common.files import atomic_folder
from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.training.recipe import load_recipe
from ta_llava.training.run import run_curriculum


TRAIN_PICTURES, TEST_PICTURES = 9600, 1000
STEPS, BATCH_SIZE = 1200, 16
TILE = 64  # pixels
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def build_start(out: Path, seed: int) -> None:
    """Writes the shipped LLaVA as a LLaVA-NeXT in float32. Only the newline of its image tokens is new."""
    llava = LlavaForConditionalGeneration.from_pretrained(DEFAULT_LLAVA, dtype=torch.float32)
    config = VmtcCmaiLlavaNextConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        image_token_index=llava.config.image_token_id,
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=llava.config.tie_word_embeddings,
    )
    set_seed(seed)
    model = VmtcCmaiLlavaNextForConditionalGeneration(config)
    model.load_state_dict({"model.image_newline": model.model.image_newline, **llava.state_dict()})
    model.generation_config = llava.generation_config
    shipped = AutoProcessor.from_pretrained(DEFAULT_LLAVA)
    processor = VmtcCmaiLlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
        ),
        shipped.tokenizer,
        patch_size=shipped.patch_size,
        vision_feature_select_strategy=shipped.vision_feature_select_strategy,
        num_additional_image_tokens=shipped.num_additional_image_tokens,
        image_token=shipped.image_token,
        chat_template=shipped.chat_template,
    )
    with atomic_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)


def train_llava_next_tiny(output_dir: Path, seed: int = 0, scale: float = 1.0) -> None:
    """
    Trains, and writes the trained model to `output_dir/model` and the questions of the test to `output_dir/data/test.json`.

    Args:
        output_dir (`Path`): Folder for the model, and for the data and the checkpoints to resume from.
        seed (`int`): Seed of the training. The pictures of the test are always the same.
        scale (`float`): Factor for the number of steps and pictures. Small values make a quick trial.
    """
    data, start = output_dir / "data", output_dir / "init"
    if not data.is_dir():
        with atomic_folder(data) as unfinished:
            for split, count in (("train", TRAIN_PICTURES), ("test", TEST_PICTURES)):
                write_llava_format(unfinished, split, build_pictures(split, max(int(count * scale), 5)), seed)
    if not start.is_dir():
        build_start(start, seed)
    settings = {
        "model": start,
        "output_dir": output_dir / "model",
        "data.path": data / "train.json",
        "data.image_folder": data,
        "global_batch_size": BATCH_SIZE,
        "training_arguments.seed": seed,
        "training_arguments.max_steps": max(int(STEPS * scale), 1),
        "training_arguments.learning_rate": 1e-3,
        "training_arguments.per_device_train_batch_size": BATCH_SIZE,
        "training_arguments.bf16": "false",
        "training_arguments.gradient_checkpointing": "false",
        "training_arguments.dataloader_num_workers": 0,
        "training_arguments.save_steps": 200,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    run_curriculum([load_recipe(RECIPES / "finetune.yaml", overrides)])


def main() -> None:
    arguments = argument_parser(__doc__, "runs/llava-next-tiny").parse_args()
    train_llava_next_tiny(arguments.output_dir, arguments.seed, arguments.scale)
    print(f"The model is in {arguments.output_dir / 'model'}.")


if __name__ == "__main__":
    main()
