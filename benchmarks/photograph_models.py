"""
Trains the small models of `photographs.py` by what `ta-llava init-llava`, `init` and `train` run.

The vision tower is DINOv2-small at 224 pixels, frozen. The language model is a small Llama without any training. With each
seed a LLaVA is made of the two and trained: what it knows of language it learns from the questions about pictures. For the
TA-LLaVAs of the seed the same language model first learns from text, the questions about descriptions of the pictures, since
in their paper it has learned already. A TA-LLaVA is blind to the question if the question comes in the second turn: its
prefix reads only the first.
Finished work is kept in files and not repeated.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from grocery_questions import (
    SPLITS,
    Picture,
    Question,
    draw_grids,
    draw_photographs,
    held_out_questions,
    rank_kinds,
    read_photos,
    training_records,
    write_grids,
    write_records,
)
from real_parts import write_dinov2
from small_models import train_tokenizer
from train_llava_tiny import CHAT_TEMPLATE
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from ta_llava.building.assemble import assemble_llava, assemble_ta_llava
from ta_llava.common.files import atomic_folder
from ta_llava.training.recipe import load_recipe
from ta_llava.training.run import train
from ta_llava.training.vision_feature_cache import VisionFeatureCache


RECIPES = Path(__file__).parent.parent / "recipes"


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """
    Pictures to train on and of the test, those of the former that a short training uses, the questions of the test, and all
    kinds, the most frequent first.
    """

    train: list[Picture]
    test: list[Picture]
    tuning: list[Picture]
    questions: list[tuple[Picture, Question]]
    kinds: list[str]


@cache
def load_data(
    folder: Path, source: str, train_grids: int, test_photographs: int, test_grids: int, tuning_pictures: int
) -> Data:
    """
    Draws the pictures. The image files of grids are written by `prepare`.

    Args:
        folder (`Path`): Folder of the run.
        source (`str`): Folder of the GroceryStoreDataset.
    """
    photos = read_photos(Path(source))
    known, held_out = ([photo for photo in photos if photo.split in splits] for splits in (SPLITS[:2], SPLITS[2:]))
    train = draw_photographs(known, None) + draw_grids(known, train_grids, folder / "grids" / "train")
    test = draw_photographs(held_out, test_photographs) + draw_grids(
        held_out, test_grids, folder / "grids" / "test", seed=1
    )
    kinds = rank_kinds(known)
    tuning = random.Random("tuning").sample(train, min(tuning_pictures, len(train)))
    return Data(train, test, tuning, held_out_questions(test, kinds), kinds)


def data_of(folder: Path, config: dict[str, Any]) -> Data:
    return load_data(
        folder,
        config["data"],
        *(config[name] for name in ("train_grids", "test_photographs", "test_grids", "tuning_pictures")),
    )


def write_training_data(folder: Path, config: dict[str, Any], stage: str, seed: int) -> Path:
    """Writes the records of a stage of the training, and returns their file."""
    path = folder / "data" / f"{stage}-{seed}.json"
    if not path.is_file():
        data, copies = data_of(folder, config), config["stages"][stage.removesuffix("_blind")]["copies"]
        pictures = data.tuning if stage == "tuning" else data.train
        blind, as_text = stage.endswith("_blind"), stage == "text"
        write_records(path, training_records(pictures, data.kinds, copies, seed, blind=blind, as_text=as_text))
    return path


# --- parts ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path, config: dict[str, Any]) -> None:
    """Writes the image files of grids, the vision tower, and the new language model of each seed."""
    data = data_of(folder, config)
    write_grids([picture for picture in (*data.train, *data.test) if len(picture.photos) == 4])
    if not (folder / "tower").is_dir():
        with atomic_folder(folder / "tower") as unfinished:
            write_dinov2(unfinished, config["image_size"])
    for seed in config["seeds"]:
        if not (folder / f"language-model-{seed}").is_dir():
            with atomic_folder(folder / f"language-model-{seed}") as unfinished:
                write_language_model(unfinished, config, data, seed)


def write_language_model(folder: Path, config: dict[str, Any], data: Data, seed: int) -> None:
    """Writes a tokenizer with a token for each word of the questions, and a new Llama of the sizes in the config."""
    records = training_records(data.train, data.kinds, 1, 0)
    tokenizer = train_tokenizer([turn["value"] for record in records for turn in record["conversations"]])
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = config["language_model"]
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=sizes["hidden_size"] ** -0.5,  # the default is for widths of thousands
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids("<end_of_turn>"),
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- training ------------------------------------------------------------------------------------------------------


def train_stage(
    folder: Path, config: dict[str, Any], stage: str, seed: int, start: Path, recipe: str, parts: Sequence[str]
) -> Path:
    """Runs a recipe as `ta-llava train` does, from the model in `start`, and returns the folder of the trained model."""
    sizes = config["stages"][stage.removesuffix("_blind")]
    settings = {
        "model": start,
        "output_dir": start.parent / "trained",
        "train": list(parts),
        "data.path": write_training_data(folder, config, stage, seed),
        "data.image_folder": folder,
        "data.max_length": 1024,
        "global_batch_size": sizes["batch_size"],
        "training_arguments.per_device_train_batch_size": sizes["batch_size"],
        "training_arguments.max_steps": sizes["steps"],
        "training_arguments.learning_rate": sizes["learning_rate"],
        "training_arguments.seed": seed,
        "training_arguments.bf16": "false",  # models trained in bfloat16 were less accurate
        "training_arguments.gradient_checkpointing": "false",
        "training_arguments.dataloader_num_workers": 0,
        "training_arguments.save_steps": 100,
        # Random, so that each batch has photographs and grids; by length for texts, so that little is padded.
        "training_arguments.train_sampling_strategy": "group_by_length" if stage == "text" else "random",
    }
    if stage != "text":
        settings["cache_vision_features"] = folder / "features" / stage.removesuffix("_blind")
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return train(load_recipe(RECIPES / f"{recipe}.yaml", overrides))


def cache_training_features(folder: Path, config: dict[str, Any], stage: str) -> None:
    """Fills the cache that the models of a stage share, before they train."""
    start = folder / f"features-{stage}-init"
    if not start.is_dir():
        assemble = {"llava": assemble_llava, "ta_llava": assemble_ta_llava}[stage]
        settings = {} if stage == "llava" else {"adapter_interval": config["adapter_interval"]}
        assemble(start, folder / "tower", folder / f"language-model-{config['seeds'][0]}", **settings)
    model, processor = AutoModelForImageTextToText.from_pretrained(start), AutoProcessor.from_pretrained(start)
    cached = open_cache(folder, stage, model, processor)
    pictures = data_of(folder, config).train
    if stage == "ta_llava":  # it answers the test from this cache too
        pictures = [*pictures, *data_of(folder, config).test]
    cached.fill([str(picture.path.resolve()) for picture in pictures])


def open_cache(folder: Path, stage: str, model: Any, processor: Any) -> VisionFeatureCache:
    """The cache of features that all models of a stage train with, in the dtype of the training."""
    return VisionFeatureCache(folder / "features" / stage, model, processor, torch.float32)


def train_llava(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Makes and trains the LLaVA of a seed."""
    start = folder / f"llava-{seed}" / "init"
    if not start.is_dir():
        assemble_llava(start, folder / "tower", folder / f"language-model-{seed}", seed=seed)
    train_stage(folder, config, "llava", seed, start, "llava/finetune", ["projector", "language_model"])


def train_language_model(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Trains the language model of a seed on text, as a part of a LLaVA that gets no image, and writes it on its own."""
    run, new = folder / f"text-{seed}", folder / f"language-model-{seed}"
    if (run / "language-model").is_dir():
        return
    if not (run / "init").is_dir():
        assemble_llava(run / "init", folder / "tower", new, seed=seed)
    train_stage(folder, config, "text", seed, run / "init", "llava/finetune", ["language_model"])
    llava, _ = trained_model(folder, run.name)
    language_model = LlamaForCausalLM.from_pretrained(new, dtype=torch.float32)
    language_model.model.load_state_dict(llava.model.language_model.state_dict())
    with atomic_folder(run / "language-model") as unfinished:
        language_model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(new).save_pretrained(unfinished)


def ta_llava_name(length: int, blind: bool) -> str:
    return f"ta-llava-{length}{'-blind' if blind else ''}"


def train_ta_llava(folder: Path, config: dict[str, Any], seed: int, length: int, blind: bool) -> None:
    """Makes and trains the TA-LLaVA of a seed with `length` prefix tokens, all but the tower at once."""
    start = folder / f"{ta_llava_name(length, blind)}-{seed}" / "init"
    if not start.is_dir():
        assemble_ta_llava(
            start,
            folder / "tower",
            folder / f"text-{seed}" / "language-model",
            num_prefix_tokens=length,
            adapter_interval=config["adapter_interval"],
            seed=seed,
        )
    parts = ["projector", "prefix", "adapters", "language_model"]
    stage = "ta_llava_blind" if blind else "ta_llava"
    train_stage(folder, config, stage, seed, start, "ta_llava/phase3", parts)


def trained_model(folder: Path, name: str) -> tuple[Any, Any]:
    """A trained model in float32, and its processor."""
    trained = folder / name / "trained"
    model = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(trained)
