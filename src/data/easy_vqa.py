"""
easy-VQA (PyPI `easy-vqa`): 5,000 images of one coloured shape, 64x64 pixels, and 48,248 questions, in its official split.

The questions of an image also tell its colour and shape, and so a caption.

    python -m ta_llava.data.easy_vqa data/easy-vqa

writes the data in LLaVA's format, for `ta-llava train`: `captions.json`, `questions.json` and `test.json`, and the images.
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm


COLORS = ("black", "gray", "red", "blue", "green", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")
QUESTION_TYPES = ("yes/no, colour", "yes/no, shape", "which colour", "which shape")
CAPTION_PROMPT = "describe the image."


@dataclass
class Scene:
    """One image with its questions. `color` or `shape` is `None` if the questions do not tell it."""

    path: str
    questions: list[tuple[str, str]] = field(default_factory=list)
    color: str | None = None
    shape: str | None = None

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape}"


def load_easy_vqa(split: str) -> list[Scene]:
    """The scenes of the official `"train"` (4,000 images) or `"test"` (1,000 images) split, in the order of their ids."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA is not installed: `pip install easy-vqa`.") from error
    paths = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()
    questions = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]()
    scenes = {image_id: Scene(path) for image_id, path in sorted(paths.items())}
    for question, answer, image_id in zip(*questions):
        scenes[image_id].questions.append((question, answer))
    for scene in scenes.values():
        scene.color = _deduce(scene.questions, COLORS)
        scene.shape = _deduce(scene.questions, SHAPES)
    return list(scenes.values())


def _deduce(questions: list[tuple[str, str]], values: tuple[str, ...]) -> str | None:
    """The colour or shape that the answers leave, if only one is possible."""
    possible = set(values)
    for question, answer in questions:
        if answer in values:
            possible &= {answer}
            continue
        mentioned = set(values) & set(question.rstrip("?").split())
        if not mentioned:
            continue
        if answer in ("yes", "no"):
            negated = " not " in question or " no " in question
            present = (answer == "yes") != negated
        else:
            present = True  # "what is the blue shape?": it is blue
        possible = possible & mentioned if present else possible - mentioned
    return possible.pop() if len(possible) == 1 else None


def question_type(question: str, answer: str) -> str:
    """One of `QUESTION_TYPES`."""
    if answer in COLORS:
        return "which colour"
    if answer in SHAPES:
        return "which shape"
    return "yes/no, colour" if set(COLORS) & set(question.rstrip("?").split()) else "yes/no, shape"


def wording_prior(train: list[Scene], test: list[Scene]) -> dict[str, float]:
    """
    Accuracy per question type (and `"all"`) without looking at the image: each test question gets the most frequent
    training answer to the same wording.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in train:
        for question, answer in scene.questions:
            answers[question][answer] += 1
    correct: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for scene in test:
        for question, answer in scene.questions:
            guess = answers[question].most_common(1)[0][0] if question in answers else None
            for name in (question_type(question, answer), "all"):
                correct[name] += guess == answer
                total[name] += 1
    return {name: correct[name] / total[name] for name in total}


def write_llava_format(folder: Path) -> None:
    """
    Writes both splits in LLaVA's JSON format. `folder` gets the samples (`captions.json` and `questions.json` of the
    training split, `test.json`), and `folder/images` the images.
    """
    captions: list[dict] = []
    questions: dict[str, list[dict]] = {"train": [], "test": []}
    for split in questions:
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for scene in tqdm(load_easy_vqa(split), desc=f"{split} images"):
            image = f"{split}/{Path(scene.path).name}"
            shutil.copyfile(scene.path, folder / "images" / image)
            if split == "train" and scene.color and scene.shape:
                captions.append(_llava_sample(image, 0, CAPTION_PROMPT, scene.caption))
            for index, (question, answer) in enumerate(scene.questions):
                questions[split].append(_llava_sample(image, index, question, answer))
    for name, samples in (("captions", captions), ("questions", questions["train"]), ("test", questions["test"])):
        (folder / f"{name}.json").write_text(json.dumps(samples), encoding="utf-8")
        print(f"{folder / name}.json: {len(samples)} samples")


def _llava_sample(image: str, index: int, question: str, answer: str) -> dict:
    turns = [("human", f"<image>\n{question}"), ("gpt", answer)]
    conversations = [{"from": role, "value": value} for role, value in turns]
    return {"id": f"{Path(image).with_suffix('')}-{index}", "image": image, "conversations": conversations}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes easy-VQA in LLaVA's format.")
    parser.add_argument("folder", type=Path)
    try:
        write_llava_format(parser.parse_args().folder)
    except ImportError as error:
        raise SystemExit(f"error: {error}") from error
