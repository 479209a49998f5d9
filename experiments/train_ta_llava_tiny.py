"""
Trains the small model of `checkpoints/ta-llava-tiny` from nothing on easy-VQA's official training split.

No public vision tower or language model of this size exists, so both are pretrained first. Then the stages of the paper
follow, with a frozen vision tower: they train adapters, projector and prefix on captions, then on questions, then together
with the language model. Every stage is a run of `transformers.Trainer`. Rerun the same command to resume: a finished stage
is not run again.

    python experiments/train_ta_llava_tiny.py --output-dir runs/ta-llava-tiny
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from scene_pixels import load_pixels, shape_mask
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Gemma2Config,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ta_llava.building.chat_templates import GEMMA_CHAT_TEMPLATE
from ta_llava.common.files import atomic_file, write_text
from ta_llava.configuration_ta_llava import TaLlavaConfig
from ta_llava.data.easy_vqa import CAPTION_PROMPT, COLORS, SHAPES, Scene, load_easy_vqa
from ta_llava.modeling_ta_llava import TaLlavaForConditionalGeneration
from ta_llava.processing_ta_llava import TaLlavaProcessor
from ta_llava.training.run import last_complete_checkpoint


IMAGE_SIZE, PATCH_SIZE = 64, 8
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<image>"]


def build_processor(scenes: list[Scene], num_prefix_tokens: int, max_length: int) -> TaLlavaProcessor:
    """A processor whose tokenizer knows the lower-cased words of the training questions."""
    words = {"user", "model", "system", "the", "image", "shows", *COLORS, *SHAPES, *re.findall(r"\w+", CAPTION_PROMPT)}
    for scene in scenes:
        for question, answer in scene.questions:
            words |= {*re.findall(r"\w+", question), answer}
    # A word has two tokens, for the start of a line and after a space, so that decoding restores the text.
    tokens = [*SPECIAL_TOKENS, "\n", ".", ",", "?", *sorted(words), *("▁" + word for word in sorted(words))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(" $"), "")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Punctuation(),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>", "<image>"],
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, crop_size=None
    )
    return TaLlavaProcessor(
        image_processor, tokenizer, num_prefix_tokens=num_prefix_tokens, chat_template=GEMMA_CHAT_TEMPLATE
    )


def build_config(tokenizer: PreTrainedTokenizerFast, num_prefix_tokens: int = 4) -> TaLlavaConfig:
    """The config: a CLIP tower of 5 layers and a Gemma-2 language model of 8, both of width 128."""
    token_id = tokenizer.convert_tokens_to_ids
    vision_config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text_config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=tokenizer.model_max_length,
        sliding_window=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=token_id("<end_of_turn>"),
    )
    return TaLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        num_prefix_tokens=num_prefix_tokens,
        vision_feature_layer=-1,  # the tower is pretrained on the states of its last layer
        image_token_id=token_id("<image>"),
        response_marker_ids=[token_id("<start_of_turn>"), token_id("model")],
    )


# --- pretraining of the vision tower -------------------------------------------------------------------------------


class PatchClassifier(nn.Module):
    """A vision tower that predicts the colour and the shape on every patch (0: background)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.vision_tower = AutoModel.from_config(config)
        self.color_head = nn.Linear(config.hidden_size, len(COLORS) + 1)
        self.shape_head = nn.Linear(config.hidden_size, len(SHAPES) + 1)

    def forward(
        self, pixel_values: torch.Tensor, colors: torch.Tensor, shapes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`colors` and `shapes` are class indices `(B, M)`, -100 where unknown."""
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        loss = torch.zeros((), device=states.device)
        for head, labels in ((self.color_head, colors), (self.shape_head, shapes)):
            # Most patches are background, which must not outweigh the shape.
            weight = torch.full((head.out_features,), 1.0, device=states.device)
            weight[0] = 0.1
            loss = loss + nn.functional.cross_entropy(head(states).flatten(0, 1), labels.flatten(), weight=weight)
        return {"loss": loss}


class PatchDataset(torch.utils.data.Dataset):
    """Images with their per-patch labels, mirrored and shifted at random."""

    def __init__(self, scenes: list[Scene], image_processor):
        self.image_processor = image_processor
        self.items = []
        for scene in scenes:
            pixels = load_pixels(scene)
            color = COLORS.index(scene.color) + 1 if scene.color else -100
            shape = SHAPES.index(scene.shape) + 1 if scene.shape else -100
            self.items.append((pixels, shape_mask(pixels), color, shape))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        pixels, mask, color, shape = self.items[index]
        if random.random() < 0.5:
            pixels, mask = pixels[:, ::-1], mask[:, ::-1]
        # Shift the shape over the background, without losing more of it at the edges.
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        background = pixels[0, 0] if not mask[0, 0] else pixels[~mask][0]
        down = random.randint(-int(rows[0]), IMAGE_SIZE - 1 - int(rows[-1]))
        right = random.randint(-int(columns[0]), IMAGE_SIZE - 1 - int(columns[-1]))
        shifted, shifted_mask = np.empty_like(pixels), np.zeros_like(mask)
        shifted[:] = background
        source = np.s_[max(-down, 0) : IMAGE_SIZE - max(down, 0), max(-right, 0) : IMAGE_SIZE - max(right, 0)]
        target = np.s_[max(down, 0) : IMAGE_SIZE + min(down, 0), max(right, 0) : IMAGE_SIZE + min(right, 0)]
        shifted[target], shifted_mask[target] = pixels[source], mask[source]
        return shifted, shifted_mask, color, shape

    def collate(self, items: list) -> dict[str, torch.Tensor]:
        pixel_values = self.image_processor([pixels for pixels, *_ in items], return_tensors="pt")["pixel_values"]
        masks = torch.from_numpy(np.stack([mask for _, mask, *_ in items])).float()
        covered = nn.functional.avg_pool2d(masks[:, None], PATCH_SIZE).flatten(1)
        batch = {"pixel_values": pixel_values}
        for name, classes in (("colors", [item[2] for item in items]), ("shapes", [item[3] for item in items])):
            labels = torch.tensor(classes)[:, None].expand_as(covered)
            # Patches that a shape barely touches do not count.
            labels = torch.where(covered == 0, 0, torch.where(covered < 0.1, -100, labels))
            batch[name] = labels
        return batch


# --- text and questions --------------------------------------------------------------------------------------------


class ChatDataset(torch.utils.data.Dataset):
    """
    Prompts and answers as token ids, with labels on the answer and the token that ends the turn, and the index of the image.
    `items` are `(prompt, answer, image index or None)`. Without an image there are no placeholders.
    """

    def __init__(self, items: Sequence[tuple[str, str, int | None]], processor: TaLlavaProcessor, features=None):
        self.items, self.processor, self.features = items, processor, features
        self.encoded: dict[tuple[str, str], list[int]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        prompt, answer, image_index = self.items[index]
        prompt_ids = self._encode(prompt, "")
        answer_ids = self._encode(prompt, answer)[len(prompt_ids) :]
        placeholders = (
            [] if image_index is None else [self.processor.image_token_id] * self.processor.num_prefix_tokens
        )
        return {
            "input_ids": placeholders + prompt_ids + answer_ids,
            "labels": [-100] * (len(placeholders) + len(prompt_ids)) + answer_ids,
            "image_index": image_index,
        }

    def _encode(self, prompt: str, answer: str) -> list[int]:
        if (prompt, answer) not in self.encoded:
            messages = [{"role": "user", "content": prompt}]
            if answer:
                messages.append({"role": "assistant", "content": answer})
            text = self.processor.apply_chat_template(messages, add_generation_prompt=not answer)
            self.encoded[prompt, answer] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.encoded[prompt, answer]

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(item["input_ids"]) for item in items)
        pad_token_id = self.processor.tokenizer.pad_token_id

        def pad(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (length - len(values))

        batch = {
            "input_ids": torch.tensor([pad(item["input_ids"], pad_token_id) for item in items]),
            "attention_mask": torch.tensor([pad([1] * len(item["input_ids"]), 0) for item in items]),
            "labels": torch.tensor([pad(item["labels"], -100) for item in items]),
        }
        if self.features is not None:
            indices = torch.tensor([item["image_index"] for item in items])
            batch["vision_features"] = self.features[indices][:, None].float()
        return batch


def text_items(scenes: list[Scene]) -> list[tuple[str, str, None]]:
    """Text to pretrain the language model on: each question, alone and after a description of the scene."""
    items = []
    for scene in scenes:
        description = f"the image shows {scene.caption}." if scene.color and scene.shape else None
        for question, answer in scene.questions:
            items.append((question, answer, None))
            if description:
                items.extend([(f"{description} {question}", answer, None)] * 3)
        if description:
            items.extend([(f"{description} {CAPTION_PROMPT}", scene.caption, None)] * 3)
    return items


def caption_items(scenes: list[Scene]) -> list[tuple[str, str, int]]:
    """The caption of every image with a known scene."""
    return [
        (CAPTION_PROMPT, scene.caption, index) for index, scene in enumerate(scenes) if scene.color and scene.shape
    ]


def question_items(scenes: list[Scene]) -> list[tuple[str, str, int]]:
    """All questions of all images."""
    return [(question, answer, index) for index, scene in enumerate(scenes) for question, answer in scene.questions]


# --- stages --------------------------------------------------------------------------------------------------------


class StageTrainer(Trainer):
    """A Trainer whose checkpoints hold any module, with the names that its weights have in memory."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model(self.model, Path(resume_from_checkpoint) / "model.safetensors", strict=True)


def run_stage(
    name: str,
    model: nn.Module,
    dataset,
    output_dir: Path,
    seed: int,
    steps: int,
    batch_size: int,
    parameter_groups: list,
    bf16: bool = False,
) -> None:
    """
    Trains `model` in place on `dataset`, with Adam without weight decay, linear warm-up, cosine decay, and gradients clipped
    at 1. `output_dir/name` keeps the weights: a finished stage is loaded, an unfinished one is resumed. With `bf16`,
    matrices are multiplied in bfloat16.

    Raises:
        `ValueError`: The stage was finished with another seed, batch size or number of steps.
    """
    folder = output_dir / name
    finished = folder / "finished.safetensors"
    settings = {"seed": seed, "steps": steps, "batch_size": batch_size}
    if finished.exists():
        load_finished_stage(model, finished, settings)
        print(f"{name}: finished before, loaded from {finished}")
        return
    set_seed(seed)
    learning_rate = max(group["lr"] for group in parameter_groups)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(60, steps // 8),
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=max(min(steps // 4, 500), 1),
        save_total_limit=2,  # an interruption while one is written leaves the one before
        remove_unused_columns=False,
        bf16=bf16,
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = torch.optim.Adam(parameter_groups, lr=learning_rate)
    trainer = StageTrainer(
        model, arguments, data_collator=dataset.collate, train_dataset=dataset, optimizers=(optimizer, None)
    )
    print(f"{name}: {steps} steps, batch {batch_size}")
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # otherwise `bf16` would stay on after training
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    with atomic_file(finished) as unfinished:
        save_model(model, str(unfinished), metadata={"settings": json.dumps(settings)})
    for folder_of_state in folder.glob("checkpoint-*"):  # they hold the optimizer, and are three times as large
        shutil.rmtree(folder_of_state)


def load_finished_stage(model: nn.Module, path: Path, settings: dict[str, int]) -> None:
    """
    Loads the weights of a finished stage.

    Raises:
        `ValueError`: It was trained with other settings.
    """
    with safe_open(path, framework="pt") as file:
        trained_with = json.loads(file.metadata()["settings"])
    if trained_with != settings:
        raise ValueError(
            f"{path.parent} was trained with {trained_with}, not {settings}. Choose another --output-dir."
        )
    load_model(model, path)


def trainable(model: nn.Module, groups: list[tuple[list[nn.Module], float]]) -> list[dict]:
    """Freezes `model` except for the given modules, and returns these as parameter groups with their learning rates."""
    model.requires_grad_(False)
    for modules, _ in groups:
        for module in modules:
            module.requires_grad_(True)
    return [
        {"params": [parameter for module in modules for parameter in module.parameters()], "lr": learning_rate}
        for modules, learning_rate in groups
    ]


@torch.no_grad()
def compute_features(model: TaLlavaForConditionalGeneration, scenes: list[Scene], image_processor) -> torch.Tensor:
    """Features of all images from the frozen tower, `(images, M, vision width)`."""
    model.eval()
    features = []
    for start in tqdm(range(0, len(scenes), 100), desc="vision features"):
        images = [load_pixels(scene) for scene in scenes[start : start + 100]]
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
        features.append(model.model.get_vision_features(pixel_values))
    return torch.cat(features)


def claim_folder(folder: Path, seed: int, scale: float) -> None:
    """
    Remembers the arguments of a run, since its parts are used again.

    Raises:
        `ValueError`: The folder was begun with others.
    """
    path, now = folder / "arguments.json", {"seed": seed, "scale": scale}
    then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    if then != now:
        raise ValueError(f"{folder} was begun with {then}, not {now}. Choose another --output-dir.")
    write_text(path, json.dumps(now))


def train_tiny(output_dir: Path, seed: int = 0, scale: float = 1.0) -> None:
    """
    Runs all stages, and writes the trained model with its processor to `output_dir/model`.

    Args:
        output_dir (`Path`): Folder for the model and for the stages to resume from.
        seed (`int`): Seed of every stage.
        scale (`float`): Factor for the number of steps. Small values make a quick trial.
    """

    def steps(number: int) -> int:
        return max(int(number * scale), 1)

    claim_folder(output_dir, seed, scale)
    set_seed(seed)
    scenes = load_easy_vqa("train")
    processor = build_processor(scenes, num_prefix_tokens=4, max_length=512)
    config = build_config(processor.tokenizer)
    model = TaLlavaForConditionalGeneration(config)
    base, language_model = model.model, model.model.language_model

    classifier = PatchClassifier(config.vision_config)
    patches = PatchDataset(scenes, processor.image_processor)
    groups = [{"params": list(classifier.parameters()), "lr": 1e-3}]
    run_stage("0-vision-tower", classifier, patches, output_dir, seed, steps(3000), 64, groups)
    base.vision_tower.load_state_dict(classifier.vision_tower.state_dict())

    text = ChatDataset(text_items(scenes), processor)
    groups = trainable(model, [([language_model], 1e-3)])
    run_stage("0-language-model", model, text, output_dir, seed, steps(1000), 64, groups)

    features = compute_features(model, scenes, processor.image_processor)
    captions = ChatDataset(caption_items(scenes), processor, features)
    questions = ChatDataset(question_items(scenes) + 2 * caption_items(scenes), processor, features)
    reading = [base.multi_modal_projector, base.prefix_embedding, base.text_adapter, base.vision_adapter]
    groups = trainable(model, [(reading, 1e-3)])
    run_stage("1-captions", model, captions, output_dir, seed, steps(500), 64, groups)
    groups = trainable(model, [(reading, 1e-3)])
    run_stage("2-questions", model, questions, output_dir, seed, steps(1500), 64, groups)
    groups = trainable(model, [(reading, 1e-3), ([language_model], 5e-4)])
    run_stage("3-language-model-too", model, questions, output_dir, seed, steps(2500), 64, groups)

    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        eos_token_id=config.text_config.eos_token_id,
    )
    model.config.__dict__.pop("use_cache", None)  # the Trainer has set it
    model.requires_grad_(True).to(torch.float16).save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")


def argument_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """A parser with the options of all commands that train a model of this project."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of steps, for quick trials")
    return parser


def main() -> None:
    arguments = argument_parser(__doc__, "runs/ta-llava-tiny").parse_args()
    train_tiny(arguments.output_dir, arguments.seed, arguments.scale)
    print(f"The model is in {arguments.output_dir / 'model'}.")


if __name__ == "__main__":
    main()
