"""
Lets the models of `photographs.py` answer the questions of the test, with the visual tokens of each method: as they are, and
after a short training with these tokens.

The vision tower is frozen, so what it gives for pictures is computed once for all seeds: its output, which the rivals select
from, and the tokens of the methods that work inside it (VMTC and ToMe). Every finished piece is a file.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from grocery_questions import LOOK, Picture, score
from photograph_models import (
    Data,
    cache_training_features,
    data_of,
    open_cache,
    ta_llava_name,
    trained_model,
    write_training_data,
)
from PIL import Image
from rival_towers import read_tower, run_tome
from rivals import RIVALS, TowerOutput
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

from ta_llava import VmtcCmaiLlavaForConditionalGeneration
from ta_llava.common.files import atomic_file, write_text
from ta_llava.data.samples import open_image
from ta_llava.inference import GREEDY
from ta_llava.library_versions import CACHE
from ta_llava.training.dataset import Collator, prepare_dataset
from ta_llava.training.parts import train_only
from ta_llava.vmtc import TRAINING_FREE_VMTC


ALL_TOKENS, TOME = "all tokens", "ToMe"
PRESET, CMAI = "VMTC, training-free preset", "CMAI, all tokens"
PRESET_AND_CMAI = f"{PRESET}, and CMAI"
BATCH_SIZE = 100  # pictures that are asked about at once
IMAGES_AT_ONCE = 20
MAX_NEW_TOKENS = 20


# --- methods -------------------------------------------------------------------------------------------------------


def vmtc_variants(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of VMTC by name: those of the config, and the package's own for models that were not trained with VMTC."""
    return config["vmtc"] | config["ablations"] | {PRESET: TRAINING_FREE_VMTC}


def methods(config: dict[str, Any], tuned: bool = False) -> list[str]:
    """All ways to give the LLaVA fewer tokens, or those of the short training."""
    names = [*vmtc_variants(config), PRESET_AND_CMAI, *RIVALS, TOME]
    return [name for name in names if not tuned or name not in (*config["ablations"], PRESET_AND_CMAI)]


def file_name(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name.lower())


# --- the vision tower ----------------------------------------------------------------------------------------------


def pictures_of(folder: Path, config: dict[str, Any], split: str) -> list[Picture]:
    """The pictures of the `"test"`, or those of the short training (`"tuning"`)."""
    data = data_of(folder, config)
    return {"test": data.test, "tuning": data.tuning}[split]


def pixels_of(folder: Path, config: dict[str, Any], split: str, title: str) -> Iterator[torch.Tensor]:
    """The pictures of a split in batches `(B, 3, H, W)`."""
    processor = AutoProcessor.from_pretrained(folder / "features-llava-init")
    pictures = pictures_of(folder, config, split)
    for start in tqdm(range(0, len(pictures), IMAGES_AT_ONCE), desc=title):
        images = [open_image(str(picture.path)) for picture in pictures[start : start + IMAGES_AT_ONCE]]
        yield processor.image_processor(images, return_tensors="pt")["pixel_values"]


def compute_tower_outputs(folder: Path, config: dict[str, Any], split: str) -> None:
    """Writes what the rivals need of all pictures of a split."""
    path = folder / split / "tower.safetensors"
    if path.is_file():
        return
    model = AutoModelForImageTextToText.from_pretrained(folder / "features-llava-init").eval()
    outputs = [read_tower(model, pixels) for pixels in pixels_of(folder, config, split, "tower")]
    tensors = {
        "tokens": torch.cat([output.tokens for output in outputs]).half(),
        "attention": torch.cat([output.attention for output in outputs]),
        "keys": torch.cat([output.keys for output in outputs]).half(),
    }
    write_tensors(path, tensors, {"grid": json.dumps(outputs[0].grid)})


def compute_compressed(folder: Path, config: dict[str, Any], split: str, method: str, budget: int) -> None:
    """Writes the tokens of a method that works inside the tower, for all pictures of a split."""
    path = folder / split / f"{file_name(method)}-{budget}.safetensors"
    if path.is_file():
        return
    run = tower_method(folder / "features-llava-init", config, method, budget)
    batches = [run(pixels) for pixels in pixels_of(folder, config, split, f"{method}, {budget}")]
    write_tensors(path, {"tokens": torch.cat(batches).half()})


def tower_method(
    source: Path, config: dict[str, Any], method: str, budget: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from pixels `(B, 3, H, W)` to the tokens `(B, budget, d)` of VMTC or ToMe."""
    if method == TOME:
        model: Any = AutoModelForImageTextToText.from_pretrained(source).eval()
        return lambda pixels: run_tome(model, pixels, budget)
    fields = {"use_vmtc": True, "vmtc_num_visual_tokens": budget, **vmtc_variants(config)[method]}
    compressed: Any = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(source, **fields).eval()
    return torch.no_grad()(compressed.get_vision_features)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)


@cache
def load_tower_outputs(path: Path) -> TowerOutput:
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        grid = json.loads(file.metadata()["grid"])
    return TowerOutput(tensors["tokens"], tensors["attention"], tensors["keys"], tuple(grid))


@torch.no_grad()
def features_of(
    folder: Path, config: dict[str, Any], split: str, model: Any, method: str, budget: int | None
) -> torch.Tensor:
    """The tokens `(pictures, budget, d)` that `method` leaves of all pictures of a split."""
    method = {CMAI: ALL_TOKENS, PRESET_AND_CMAI: PRESET}.get(method, method)  # CMAI works in the language model
    if method not in (ALL_TOKENS, *RIVALS):
        return load_file(folder / split / f"{file_name(method)}-{budget}.safetensors")["tokens"].float()
    output = load_tower_outputs(folder / split / "tower.safetensors")
    if method == ALL_TOKENS:
        return output.tokens
    batches = []
    for start in range(0, len(output.tokens), IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        tokens = output.tokens[part]
        projected = model.model.multi_modal_projector(tokens) if method == "DivPrune" else None
        batch = TowerOutput(tokens, output.attention[part], output.keys[part], output.grid, projected)
        batches.append(RIVALS[method](batch, int(budget or 0)))
    return torch.cat(batches)


# --- answers -------------------------------------------------------------------------------------------------------


class Prompts:
    """
    Token ids of questions about one picture, as the processor of a model makes them.

    Args:
        processor: Processor of a LLaVA or a TA-LLaVA.
        num_placeholders (`int`, *optional*): Placeholders of the picture, in place of those that the processor writes.
        blind (`bool`): Whether the turn `LOOK` comes first, so that the prefix of a TA-LLaVA does not read the question.
    """

    def __init__(self, processor: Any, num_placeholders: int | None = None, blind: bool = False):
        self.processor, self.num_placeholders, self.blind = processor, num_placeholders, blind
        self.image_token_id = processor.image_token_id
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            first, *rest = [*LOOK, text] if self.blind else [text]
            content = [{"type": "image", "image": Image.new("RGB", (32, 32))}, {"type": "text", "text": first}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            messages += [
                {"role": role, "content": [{"type": "text", "text": turn}]}
                for role, turn in zip(("assistant", "user"), rest)
            ]
            inputs = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids = inputs["input_ids"][0].tolist()
            if self.num_placeholders is not None:
                first = ids.index(self.image_token_id)
                rest = [token for token in ids[first:] if token != self.image_token_id]
                ids = [*ids[:first], *[self.image_token_id] * self.num_placeholders, *rest]
            self.known[text] = ids
        return self.known[text]


Asked = Sequence[tuple[str, int]]  # questions, each with the index of its picture


@torch.no_grad()
def answer(model: Any, prompts: Prompts, features: torch.Tensor, asked: Asked) -> list[str]:
    """
    Answers questions by greedy decoding, with the `vision_features` of all pictures: `(pictures, M, d)` for a LLaVA,
    `(pictures, 1, M, d)` for a TA-LLaVA. A LLaVA reads a picture once for all questions about it. The prefix of a TA-LLaVA
    reads the question first, so it reads the picture again for each.
    """
    answers = [""] * len(asked)
    ids = [prompts(text) for text, _ in asked]
    shared = 0 if features.dim() == 4 else _last_index(ids[0], prompts.image_token_id) + 1
    pictures = sorted({picture for _, picture in asked})
    for start in range(0, len(pictures), BATCH_SIZE):
        chosen = pictures[start : start + BATCH_SIZE]
        cache = _read_pictures(model, ids[0][:shared], features[chosen]) if shared else None
        by_length: dict[int, list[int]] = {}
        for index, (_, picture) in enumerate(asked):
            if picture in chosen:
                by_length.setdefault(len(ids[index]), []).append(index)
        for length, indices in by_length.items():  # of one length, so that nothing is padded
            images = [asked[index][1] for index in indices]
            if cache is None:
                seen = {"vision_features": features[images]}
            else:
                seen = {CACHE: copy.deepcopy(cache)}
                seen[CACHE].batch_select_indices(torch.tensor([chosen.index(image) for image in images]))
            rows = torch.tensor([ids[index] for index in indices])
            output = model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=MAX_NEW_TOKENS,
                **seen,
                **GREEDY,
            )
            texts = prompts.processor.batch_decode(output[:, length:], skip_special_tokens=True)
            for index, text in zip(indices, texts):
                answers[index] = text.strip()
    return answers


def _last_index(ids: Sequence[int], token: int) -> int:
    return len(ids) - 1 - list(reversed(ids)).index(token)


def _read_pictures(model: Any, ids: list[int], features: torch.Tensor) -> Any:
    """The KV cache of the columns `ids`, the end of which is an image, for pictures with `features` `(B, M, d)`."""
    rows = torch.tensor([ids] * len(features))
    return model(input_ids=rows, vision_features=features, use_cache=True, logits_to_keep=1)[CACHE]


def write_answers(path: Path, data: Data, model: Any, prompts: Prompts, features: torch.Tensor) -> None:
    """Writes the answers to all questions of the test, and their scores. `features` are those of all its pictures."""
    places = {picture.path: index for index, picture in enumerate(data.test)}
    answers = answer(
        model, prompts, features, [(asked.text, places[picture.path]) for picture, asked in data.questions]
    )
    scores = [score(asked, given) for (_, asked), given in zip(data.questions, answers)]
    write_text(path, json.dumps({"scores": scores, "answers": answers}))


load_once = cache(trained_model)


def answer_with_llava(folder: Path, config: dict[str, Any], seed: int, method: str, budget: int | None) -> None:
    """Writes the answers of the LLaVA of a seed with the tokens that a method leaves."""
    path = folder / "scores" / f"llava-{seed}" / f"{file_name(method)}-{budget or 'all'}.json"
    if not path.is_file():
        model, processor = load_once(folder, f"llava-{seed}")
        _ask_about_test(folder, config, model, processor, method, budget, path)


def _ask_about_test(
    folder: Path, config: dict[str, Any], model: Any, processor: Any, method: str, budget: int | None, path: Path
) -> None:
    features = features_of(folder, config, "test", model, method, budget)
    model.config.use_cmai = method in (CMAI, PRESET_AND_CMAI)
    write_answers(path, data_of(folder, config), model, Prompts(processor, features.shape[1]), features)


def tune_llava(folder: Path, config: dict[str, Any], seed: int, method: str, budget: int | None) -> None:
    """
    Trains the LLaVA of a seed for a short while with the tokens that a method leaves, and writes its answers with them.
    """
    path = folder / "scores" / f"llava-tuned-{seed}" / f"{file_name(method)}-{budget or 'all'}.json"
    if path.is_file():
        return
    model, processor = trained_model(folder, f"llava-{seed}")
    features = features_of(folder, config, "tuning", model, method, budget)
    pictures = pictures_of(folder, config, "tuning")
    model.config.use_cmai = method in (CMAI, PRESET_AND_CMAI)
    held = {str(picture.path.resolve()): tokens for picture, tokens in zip(pictures, features)}
    if budget is not None:
        processor.set_visual_budget(features.shape[1])
    tune(model, processor, write_training_data(folder, config, "tuning", seed), held, config["stages"]["tuning"], seed)
    _ask_about_test(folder, config, model, processor, method, budget, path)


def tune(model: Any, processor: Any, data: Path, features: Any, sizes: dict[str, Any], seed: int) -> None:
    """
    Trains the projector and the language model.

    Args:
        data (`Path`): Records in LLaVA's format.
        features: The `vision_features` of each image by path.
        sizes (`dict`): Steps, batch size and learning rate.
    """
    set_seed(seed)
    rows, _ = prepare_dataset(data, processor, max_length=1024)
    train_only(model, ["projector", "language_model"])
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            unused,
            max_steps=sizes["steps"],
            per_device_train_batch_size=sizes["batch_size"],
            learning_rate=sizes["learning_rate"],
            lr_scheduler_type="cosine",
            use_cpu=not torch.accelerator.is_available(),
            seed=seed,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        )
        Trainer(model, arguments, Collator(processor, features), rows).train()
    model.eval().config.use_cache = True  # the Trainer turns it off


def answer_with_ta_llava(folder: Path, config: dict[str, Any], seed: int, length: int, blind: bool) -> None:
    """Writes the answers of the TA-LLaVA of a seed with `length` prefix tokens."""
    name = ta_llava_name(length, blind)
    path = folder / "scores" / f"{name}-{seed}" / "all.json"
    if path.is_file():
        return
    cache_training_features(folder, config, "ta_llava")  # nothing to compute if the model was trained here
    model, processor = load_once(folder, f"{name}-{seed}")
    features = open_cache(folder, "ta_llava", model, processor)
    data = data_of(folder, config)
    held = torch.stack([features.get(str(picture.path.resolve()))[None].float() for picture in data.test])
    write_answers(path, data, model, Prompts(processor, blind=blind), held)
