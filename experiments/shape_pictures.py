"""
Pictures of one to four shapes in grids of different aspect ratios, so that LLaVA-NeXT cuts them into two to four tiles. A
cell of a grid holds an image of easy-VQA, or only its background. The questions are in easy-VQA's words and of its four
types. The images come from the official splits, so a model has not seen those of the test.

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

from ta_llava.data.easy_vqa import COLORS, SHAPES, Scene, load_easy_vqa, question_type


# Rows and columns. On canvases of up to 2 x 2 tiles, three cells in a row are scaled down, with padding.
GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


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
    def scenes(self) -> list[Scene]:
        """The cells that show their shape."""
        return [cell for cell, shown in zip(self.cells, self.shown) if shown]


def build_pictures(split: str, count: int, seed: int = 0) -> list[Picture]:
    """
    Draws `count` pictures from the scenes of a split of easy-VQA, `"train"` or `"test"`. A larger `count` does not change
    the first pictures.
    """
    scenes = [scene for scene in load_easy_vqa(split) if scene.color and scene.shape]
    generator = random.Random(f"{split} {seed}")
    pictures = []
    for index in range(count):
        rows, columns = GRIDS[index % len(GRIDS)]
        places = range(rows * columns)
        chosen = generator.sample(places, generator.randint(1, len(places)))
        cells = [generator.choice(scenes) for _ in places]
        pictures.append(Picture(rows, columns, cells, [place in chosen for place in places]))
    return pictures


# --- questions -----------------------------------------------------------------------------------------------------


def ask(picture: Picture, generator: random.Random, count: int = 1) -> list[tuple[str, str]]:
    """
    Questions with their answers: whether a colour and whether a shape is there, `count` of each, and what colour and shape
    the only one has. About half of the answers to the former are yes.
    """
    colors = [str(scene.color) for scene in picture.scenes]
    shapes = [str(scene.shape) for scene in picture.scenes]
    questions = [
        *(
            (f"is there a {color} shape in the image?", answer)
            for color, answer in _draw(COLORS, colors, count, generator)
        ),
        *((f"is there a {shape} in the image?", answer) for shape, answer in _draw(SHAPES, shapes, count, generator)),
    ]
    if len(colors) == 1:
        questions += [("what color is the shape?", colors[0]), ("what shape is in the image?", shapes[0])]
    return questions


def _draw(names: tuple[str, ...], present: list[str], count: int, generator: random.Random) -> list[tuple[str, str]]:
    """Different colours or shapes, each with "yes" if it is there."""
    groups = {
        "yes": [name for name in names if name in present],
        "no": [name for name in names if name not in present],
    }
    drawn = []
    for _ in range(count):
        answer = generator.choice(["yes", "no"])
        if not groups[answer]:
            answer = "no" if answer == "yes" else "yes"
        drawn.append((groups[answer].pop(generator.randrange(len(groups[answer]))), answer))
    return drawn


def write_llava_format(folder: Path, split: str, pictures: list[Picture], seed: int = 0) -> None:
    """
    Writes pictures to `folder/split`, and samples in LLaVA's format to `folder/split.json`: for `"train"` one conversation
    about each picture, for `"test"` questions with their type.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    samples = []
    for index, picture in enumerate(tqdm(pictures, desc=f"{split} pictures")):
        image, generator = f"{split}/{index}.png", random.Random(f"{split} {seed} {index}")
        picture.draw().save(folder / image)
        if split == "train":
            questions = ask(picture, generator, count=2)
            generator.shuffle(questions)
            samples.append(_llava_sample(str(index), image, questions))
        else:
            for number, (question, answer) in enumerate(ask(picture, generator)):
                sample = _llava_sample(f"{index}-{number}", image, [(question, answer)])
                samples.append({**sample, "type": question_type(question, answer)})
    (folder / f"{split}.json").write_text(json.dumps(samples), encoding="utf-8")


def _llava_sample(name: str, image: str, questions: list[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(questions):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": turns}
