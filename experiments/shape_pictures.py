"""
Pictures of several easy-VQA images beside each other, in grids of different aspect ratios, so that LLaVA-NeXT cuts them into
two to four tiles. Some cells hold the background of an image without its shape. The questions are in easy-VQA's own words,
about one of the shapes. The images come from the official splits, so a model has not seen those of the test.

    picture = build_pictures("test", 500)[0]
    image, questions = picture.draw(), ask(picture, random.Random(0))
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scene_pixels import load_pixels, shape_mask
from tqdm.auto import tqdm

from ta_llava.data.easy_vqa import Scene, load_easy_vqa


# Rows and columns. On canvases of up to 2 x 2 tiles, three cells in a row are scaled down, with padding.
LAYOUTS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
QUESTION_TYPES = ("which colour", "which shape", "yes/no")


@dataclass
class Picture:
    """
    Args:
        rows, columns (`int`): Cells of 64 x 64 pixels.
        cells (`list[Scene]`): Row by row. Colour and shape of each are known.
        shown (`list[bool]`): Which of them show their shape; the others are empty.
    """

    rows: int
    columns: int
    cells: list[Scene]
    shown: list[bool]

    def draw(self) -> Image.Image:
        """The RGB image."""
        cells = []
        for cell, shown in zip(self.cells, self.shown):
            pixels = load_pixels(cell).copy()
            if not shown:
                is_shape = shape_mask(pixels)
                pixels[is_shape] = pixels[~is_shape][0]
            cells.append(pixels)
        rows = [np.concatenate(cells[row * self.columns :][: self.columns], axis=1) for row in range(self.rows)]
        return Image.fromarray(np.concatenate(rows))

    @property
    def shapes(self) -> list[tuple[str, str]]:
        """Colour and shape of what is shown."""
        return [(str(cell.color), str(cell.shape)) for cell, shown in zip(self.cells, self.shown) if shown]


def build_pictures(split: str, count: int, seed: int = 0) -> list[Picture]:
    """
    Draws `count` pictures from the scenes of a split of easy-VQA, `"train"` or `"test"`. A larger `count` does not change
    the first pictures. In each, at least one shape differs in colour from all others, and one in its kind.
    """
    scenes = [scene for scene in load_easy_vqa(split) if scene.color and scene.shape]
    generator = random.Random(f"{split} {seed}")
    pictures: list[Picture] = []
    while len(pictures) < count:
        rows, columns = LAYOUTS[len(pictures) % len(LAYOUTS)]
        cells = [generator.choice(scenes) for _ in range(rows * columns)]
        shown = [True] * len(cells)
        if len(cells) == 4:
            for index in generator.sample(range(4), generator.randrange(3)):
                shown[index] = False
        picture = Picture(rows, columns, cells, shown)
        if _unique(picture.shapes, 0) and _unique(picture.shapes, 1):
            pictures.append(picture)
    return pictures


def _unique(shapes: list[tuple[str, str]], part: int) -> list[tuple[str, str]]:
    """The shapes whose colour (`part` 0) or kind (`part` 1) no other has."""
    values = [shape[part] for shape in shapes]
    return [shape for shape in shapes if values.count(shape[part]) == 1]


# --- questions -----------------------------------------------------------------------------------------------------


def ask(picture: Picture, generator: random.Random) -> list[tuple[str, str, str]]:
    """One question of each of `QUESTION_TYPES`: type, question and answer."""
    chosen = [
        generator.choice(_unique(picture.shapes, 1)),
        generator.choice(_unique(picture.shapes, 0)),
        generator.choice(picture.shapes),
    ]
    return [
        (kind, *_question(picture, shape, kind, generator)) for kind, shape in zip(QUESTION_TYPES, chosen, strict=True)
    ]


def converse(picture: Picture, generator: random.Random) -> list[tuple[str, str, str]]:
    """A question about each shape, as `ask` gives them. No answer follows from those before it."""
    turns = []
    for shape in generator.sample(picture.shapes, len(picture.shapes)):
        kinds = ["yes/no"]
        kinds += ["which colour"] if shape in _unique(picture.shapes, 1) else []
        kinds += ["which shape"] if shape in _unique(picture.shapes, 0) else []
        kind = generator.choice(kinds)
        turns.append((kind, *_question(picture, shape, kind, generator)))
    return turns


def _question(picture: Picture, shape: tuple[str, str], kind: str, generator: random.Random) -> tuple[str, str]:
    color, name = shape
    if kind == "which colour":
        return f"what color is the {name}?", color
    if kind == "which shape":
        return f"what is the {color} shape?", name
    # If the answer is no, colour and shape are both there, but not together.
    absent = sorted({(color, other) for _, other in picture.shapes} - set(picture.shapes))
    if absent and generator.random() < 0.5:
        return f"is there a {color} {generator.choice(absent)[1]} in the image?", "no"
    return f"is there a {color} {name} in the image?", "yes"


def guess_rate(picture: Picture, kind: str) -> float:
    """How often somebody guesses right who knows which colours and shapes are there, but not which belong together."""
    part = {"which colour": 0, "which shape": 1}.get(kind)
    return 0.5 if part is None else 1 / len({shape[part] for shape in picture.shapes})


def write_llava_format(folder: Path, split: str, pictures: list[Picture], seed: int) -> None:
    """
    Writes pictures to `folder/split`, and samples in LLaVA's format to `folder/split.json`: a conversation about each picture
    of `"train"`, and questions with their type about those of `"test"`.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    samples = []
    for index, picture in enumerate(tqdm(pictures, desc=f"{split} pictures")):
        image, generator = f"{split}/{index}.png", random.Random(f"{split} {seed} {index}")
        picture.draw().save(folder / image)
        if split == "train":
            samples.append(_llava_sample(str(index), image, converse(picture, generator)))
            continue
        for question in ask(picture, generator):
            samples.append({**_llava_sample(f"{index} {question[0]}", image, [question]), "type": question[0]})
    (folder / f"{split}.json").write_text(json.dumps(samples), encoding="utf-8")


def _llava_sample(name: str, image: str, questions: list[tuple[str, str, str]]) -> dict[str, Any]:
    turns = []
    for number, (_, question, answer) in enumerate(questions):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": turns}
