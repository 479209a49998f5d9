"""
Grids of four easy-VQA images, two by two, with questions about one of them or all. They need more of an image than easy-VQA
itself, where one shape stands alone. A grid can also be one image, with the questions that make sense for it. The images
come from the official splits, so a model has not seen those of the test.

    grids = build_grids("test", 500, seed=0)
    image, questions = grids[0].draw(), ask(grids[0], random.Random(0))
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ta_llava.data.easy_vqa import SHAPES, Scene, load_easy_vqa


CELL = 64  # pixels
# One word each: small language models learn to find one token in a text long before they learn to find two in a row.
POSITIONS = ("northwest", "northeast", "southwest", "southeast")
QUESTION_TYPES = ("which colour", "which shape", "where", "how many")
CAPTION_PROMPT = "Describe this image in detail."


@dataclass
class Grid:
    """
    Args:
        cells (`list[Scene]`): Four in the order of `POSITIONS`, or one. Colour and shape of each are known.
    """

    cells: list[Scene]

    def draw(self) -> Image.Image:
        """The RGB image: 128 x 128 pixels, or 64 x 64 for one cell."""
        side = math.isqrt(len(self.cells))
        image = Image.new("RGB", (side * CELL, side * CELL))
        for index, cell in enumerate(self.cells):
            with Image.open(cell.path) as part:
                image.paste(part.convert("RGB"), (index % side * CELL, index // side * CELL))
        return image

    @property
    def caption(self) -> str:
        return " ".join(f"The {name} is a {cell.caption[2:]}." for name, cell in zip(self.names, self.cells))

    @property
    def names(self) -> list[str]:
        """Names of the shapes."""
        return ["shape"] if len(self.cells) == 1 else [f"{place} shape" for place in POSITIONS]


@dataclass
class GridQuestion:
    """
    Args:
        text (`str`): The question.
        answer (`str`): One word.
        type (`str`): One of `QUESTION_TYPES`.
        sentence (`str`): The answer as a sentence, without the full stop.
    """

    text: str
    answer: str
    type: str
    sentence: str


def build_grids(split: str, count: int, seed: int = 0, num_shapes: int = 4) -> list[Grid]:
    """
    Draws `count` grids, with replacement, from the scenes of a split of easy-VQA, `"train"` or `"test"`. A larger `count`
    does not change the first grids.

    Raises:
        `ValueError`: `num_shapes` is neither 1 nor 4.
    """
    if num_shapes not in (1, 4):
        raise ValueError(f"A grid has 1 or 4 shapes, not {num_shapes}.")
    scenes = [scene for scene in load_easy_vqa(split) if scene.color and scene.shape]
    generator = random.Random(f"{split} {seed}")
    return [Grid([generator.choice(scenes) for _ in range(num_shapes)]) for _ in range(count)]


def ask(grid: Grid, generator: random.Random) -> list[GridQuestion]:
    """One question of each type, in the order of `QUESTION_TYPES`. A grid of one shape gets the first two types only."""
    questions = [_which_color(grid, generator), _which_shape(grid, generator)]
    if len(grid.cells) > 1:
        questions += [_where(grid, generator), _how_many(grid, generator)]
    return questions


def _draw_cell(grid: Grid, generator: random.Random) -> tuple[str, Scene]:
    index = generator.randrange(len(grid.cells))
    return grid.names[index], grid.cells[index]


def _which_color(grid: Grid, generator: random.Random) -> GridQuestion:
    name, cell = _draw_cell(grid, generator)
    sentence = f"The {name} is {cell.color}"
    return GridQuestion(f"What color is the {name}?", str(cell.color), "which colour", sentence)


def _which_shape(grid: Grid, generator: random.Random) -> GridQuestion:
    name, cell = _draw_cell(grid, generator)
    sentence = f"The {name} is a {cell.shape}"
    return GridQuestion(f"What is the {name}?", str(cell.shape), "which shape", sentence)


def _where(grid: Grid, generator: random.Random) -> GridQuestion:
    captions = [cell.caption for cell in grid.cells]
    unique = [index for index, caption in enumerate(captions) if captions.count(caption) == 1]
    index = generator.choice(unique) if unique else 0  # if no shape is unique, the first place is the answer
    place = POSITIONS[index]
    shape = captions[index][2:]
    return GridQuestion(f"Where is the {shape}?", place, "where", f"The {shape} is {place}")


def _how_many(grid: Grid, generator: random.Random) -> GridQuestion:
    shape = generator.choice(SHAPES)
    count = str(sum(cell.shape == shape for cell in grid.cells))
    return GridQuestion(f"How many {shape}s are there?", count, "how many", f"The number of {shape}s is {count}")


# --- answers that follow an instruction ----------------------------------------------------------------------------


def follow(task: str, arguments: dict[str, Any], question: GridQuestion) -> str:
    """
    A right answer to a question that follows the instruction `task` of [`instruction_following`].

    Raises:
        `ValueError`: There is no such task.
    """
    if task not in _FOLLOW:
        raise ValueError(f"There is no task {task!r}; the tasks are {', '.join(_FOLLOW)}.")
    return _FOLLOW[task](f"{question.sentence}.", question.answer, arguments)


def _repeat(sentence: str, arguments: dict[str, Any], asked: str, per_sentence: int) -> str:
    if arguments["relation"] == "less than":
        return sentence
    return " ".join([sentence] * -(-arguments[asked] // per_sentence))


def _highlight(sentence: str, count: int) -> str:
    words = sentence.split(" ")
    return " ".join([*(f"*{word}*" for word in words[:count]), *words[count:]])


# Each takes the sentence, the one word and the arguments of the task.
_FOLLOW: dict[str, Callable[[str, str, dict[str, Any]], str]] = {
    "no_commas": lambda sentence, answer, arguments: sentence,
    "lowercase": lambda sentence, answer, arguments: sentence.lower(),
    "uppercase": lambda sentence, answer, arguments: sentence.upper(),
    "placeholders": lambda sentence, answer, arguments: sentence + " [name]" * arguments["num_placeholders"],
    "postscript": lambda sentence, answer, arguments: f"{sentence}\n{arguments['postscript_marker']} That is all.",
    "title": lambda sentence, answer, arguments: f"<<the answer>>\n{sentence}",
    "keywords": lambda sentence, answer, arguments: f"{sentence} I saw the {' and the '.join(arguments['keywords'])}.",
    "highlights": lambda sentence, answer, arguments: _highlight(sentence, arguments["num_highlights"]),
    "json": lambda sentence, answer, arguments: f'{{"answer": "{answer}"}}',
    "sections": lambda sentence, answer, arguments: "\n".join(
        f"{arguments['section_spliter']} {number}\n{sentence}" for number in range(1, arguments["num_sections"] + 1)
    ),
    "bullet_points": lambda sentence, answer, arguments: "\n".join([f"* {sentence}"] * arguments["num_bullets"]),
    "sentence_count": lambda sentence, answer, arguments: _repeat(sentence, arguments, "num_sentences", 1),
    "word_count": lambda sentence, answer, arguments: _repeat(sentence, arguments, "num_words", len(sentence.split())),
    "two_responses": lambda sentence, answer, arguments: f"{sentence}\n******\n{answer.capitalize()}.",
    "end_phrase": lambda sentence, answer, arguments: f"{sentence} {arguments['end_phrase']}",
    "start_phrase": lambda sentence, answer, arguments: f"{arguments['starter']} {answer}.",
}
