"""
Trains a small LLaVA-NeXT on pictures of several shapes (`shape_pictures.py`), with LLaVA's recipe for instruction tuning.
Then scores it with all visual tokens and with fewer.

It starts from the weights of `checkpoints/llava-tiny`, which knows one shape in an image of 64 x 64 pixels. Here a picture
has two to four tiles of that size, beside the whole picture. The result never saw VMTC. Rerun the same command to resume.

    python experiments/train_llava_next_tiny.py --output-dir runs/llava-next-tiny
"""

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from scipy import stats
from shape_pictures import build_pictures, write_llava_format
from train_llava_tiny import RECIPES
from train_ta_llava_tiny import argument_parser, claim_folder
from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ta_llava import VmtcCmaiLlavaNextConfig, VmtcCmaiLlavaNextForConditionalGeneration, VmtcCmaiLlavaNextProcessor
from ta_llava.building.compress import compress_llava
from ta_llava.common.files import atomic_folder, write_text
from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.data.easy_vqa import QUESTION_TYPES
from ta_llava.evaluation.evaluate import evaluate
from ta_llava.training.recipe import load_recipe
from ta_llava.training.run import run_curriculum


TRAIN_PICTURES, TEST_PICTURES = 6400, 1000
STEPS, BATCH_SIZE = 800, 16
TILE = 64  # pixels
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]

# How the trained model is scored: arguments of `compress_llava`, by name. A view has 64 patches, and a picture of the test
# has 3.4 views on average, so that the budgets of a whole picture come to as many tokens as those of each view.
BUDGETS: dict[str, dict[str, Any]] = {
    "all": {},
    "half": {"num_visual_tokens": 32},
    "half-paper": {"num_visual_tokens": 32, "preset": "paper"},
    "half-total": {"total_visual_tokens": 109},
    "half-random": {"num_visual_tokens": 32},
    "ninth": {"num_visual_tokens": 7},
    "ninth-paper": {"num_visual_tokens": 7, "preset": "paper"},
    "ninth-total": {"total_visual_tokens": 24},
    "ninth-random": {"num_visual_tokens": 7},
}


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
        seed (`int`): Seed of the training. The questions of the test are always the same.
        scale (`float`): Factor for the number of steps and pictures. Small values make a quick trial.
    """
    claim_folder(output_dir, seed, scale)
    data, start = output_dir / "data", output_dir / "init"
    if not data.is_dir():
        with atomic_folder(data) as unfinished:
            for split, count in (("train", TRAIN_PICTURES), ("test", TEST_PICTURES)):
                pictures = build_pictures(split, max(int(count * scale), 5))
                write_llava_format(unfinished, split, pictures, seed if split == "train" else 0)
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


# --- scores --------------------------------------------------------------------------------------------------------


def with_budget(output_dir: Path, name: str) -> Path:
    """
    Writes the folder of the trained model with one of `BUDGETS` anew, since the model may be another one by now. Random
    tokens need `random_importance` too.
    """
    model, folder = output_dir / "model", output_dir / "budgets" / name
    if not BUDGETS[name]:
        return model
    shutil.rmtree(folder, ignore_errors=True)
    compress_llava(model, folder, **BUDGETS[name])
    if name.endswith("random"):
        pruned = {"vmtc_method": "last_layer_prune", "vmtc_kept_tokens": "importance"}
        VmtcCmaiLlavaNextConfig.from_pretrained(folder, **pruned).save_pretrained(folder)
    return folder


def random_importance(attention_row: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Takes the place of `importance_scores`, and knows nothing about the patches."""
    return torch.rand(len(attention_row), num_patches)


def score(output_dir: Path) -> str:
    """
    Asks the questions of the test with each of `BUDGETS`, as `ta-llava evaluate` does.

    Returns:
        `str`: A Markdown table of accuracies in percent, with Wilson's 95 % intervals, which take the
            questions about a picture as independent.
    """
    test = output_dir / "data" / "test.json"
    samples = json.loads(test.read_text(encoding="utf-8"))
    lines = [
        f"| | visual tokens of a picture | {' | '.join(QUESTION_TYPES)} | all | 95 % interval |",
        "|---" + "|---:" * (len(QUESTION_TYPES) + 3) + "|",
        _row("most frequent answer", "0", _scores_of_a_guess(samples)),
    ]
    for name in BUDGETS:
        folder, is_random = with_budget(output_dir, name), name.endswith("random")
        set_seed(0)
        with (
            patch("ta_llava.vision_towers.importance_scores", random_importance) if is_random else nullcontext(),
            patch("ta_llava.image_views.importance_scores", random_importance) if is_random else nullcontext(),
        ):
            out = output_dir / "scores" / name
            results = evaluate(folder, "json", out, data=test, batch_size=64, max_new_tokens=4)
        lines.append(_row(name, f"{_mean_tokens(folder, samples, test.parent):.1f}", results["scores"]))
    return "\n".join(lines) + "\n"


def _mean_tokens(model: Path, samples: list[dict[str, Any]], folder: Path) -> float:
    """Visual tokens of a picture of the test on average, newlines among them."""
    processor = VmtcCmaiLlavaNextProcessor.from_pretrained(model)
    sizes = [Image.open(folder / image).size for image in sorted({sample["image"] for sample in samples})]
    counts = processor._get_num_multimodal_tokens([(height, width) for width, height in sizes]).num_image_tokens
    return sum(counts) / len(counts)


def _scores_of_a_guess(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The scores of the most frequent answer to each type of question."""
    answers = {kind: Counter() for kind in QUESTION_TYPES}
    for sample in samples:
        answers[sample["type"]][sample["conversations"][1]["value"]] += 1
    right = {kind: counts.most_common(1)[0][1] for kind, counts in answers.items() if counts}
    asked = {kind: answers[kind].total() for kind in right}
    right["all"], asked["all"] = sum(right.values()), sum(asked.values())
    return {kind: {"questions": asked[kind], "accuracy": right[kind] / asked[kind]} for kind in right}


def _row(name: str, tokens: str, scores: dict[str, dict[str, float]]) -> str:
    cells = [f"{scores[kind]['accuracy']:.1%}" if kind in scores else "" for kind in (*QUESTION_TYPES, "all")]
    asked = int(scores["all"]["questions"])
    right = round(scores["all"]["accuracy"] * asked)
    low, high = stats.binomtest(right, asked).proportion_ci(method="wilson")
    return f"| {name} | {tokens} | {' | '.join(cells)} | {low:.1%} to {high:.1%} |"


def main() -> None:
    arguments = argument_parser(__doc__, "runs/llava-next-tiny").parse_args()
    train_llava_next_tiny(arguments.output_dir, arguments.seed, arguments.scale)
    print(f"The model is in {arguments.output_dir / 'model'}.")
    table = score(arguments.output_dir)
    write_text(arguments.output_dir / "scores.md", table)
    print(table)


if __name__ == "__main__":
    main()
