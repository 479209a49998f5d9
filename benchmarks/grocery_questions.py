"""
Questions about photographs of groceries, in LLaVA's format, from the folder of the public GroceryStoreDataset (Klasson,
Zhang, Kjellström: *A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels*, WACV 2019;
github.com/marcusklasson/GroceryStoreDataset, MIT licence). The official test split is held out.

A picture is one photograph, or a grid of 2 x 2. Each has questions of several types (`TYPES`). All draws are seeded: the
same folder and seed give the same pictures and questions.

The folder is a clone of the data set, or its folder `dataset`, with `classes.csv`, `train.txt`, `val.txt` and `test.txt`. A
folder with one file `labels.csv` (columns image, split, fine, coarse, group) works too.
"""

import csv
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ta_llava.common.files import atomic_file, write_text


SPLITS = ("train", "val", "test")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
NUM_POPULAR = 8  # kinds that "popular" asks about in vain
LOOK = ("Look at the picture.", "ok")  # the turn before the question, for a prefix that must not read the question
GRID_SIDE = 224  # pixels
DESCRIPTION_WORDS = 150  # of the longest descriptions, about
TYPES = ("product", "kind", "group", "random", "popular", "place", "grid", "count", "list")


@dataclass(frozen=True)
class Photo:
    """
    A photograph.

    Args:
        path (`Path`): Image file.
        split (`str`): Official split, of `SPLITS`.
        product, kind, group (`str`): Names on the three levels of the data set: 81 products, 43 kinds, 3 groups.
    """

    path: Path
    split: str
    product: str
    kind: str
    group: str


@dataclass(frozen=True)
class Picture:
    """What questions are about: one photograph, or four in the order of `PLACES`."""

    path: Path
    photos: tuple[Photo, ...]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(photo.kind for photo in self.photos))


@dataclass(frozen=True)
class Question:
    """A question of a type of `TYPES`, and its answer."""

    type: str
    text: str
    answer: str


# --- the data set --------------------------------------------------------------------------------------------------


def read_photos(folder: Path) -> list[Photo]:
    """
    The photographs of all splits.

    Raises:
        `ValueError`: The folder has none of the two layouts, or lacks an image file.
    """
    if (folder / "labels.csv").is_file():
        photos = _read_labels(folder)
    else:
        inner = folder / "dataset" if (folder / "dataset").is_dir() else folder
        missing = [
            name for name in ("classes.csv", *(f"{split}.txt" for split in SPLITS)) if not (inner / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder} is not the folder of the GroceryStoreDataset: it has no {', '.join(missing)}. Clone "
                "github.com/marcusklasson/GroceryStoreDataset and name that folder."
            )
        photos = _read_public_layout(inner)
    absent = [photo.path for photo in photos if not photo.path.is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} of {len(photos)} image files, e.g. {absent[0]}.")
    return photos


def _read_labels(folder: Path) -> list[Photo]:
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        return [
            Photo(folder / row["image"], row["split"], *(_words(row[level]) for level in ("fine", "coarse", "group")))
            for row in csv.DictReader(file)
        ]


def _read_public_layout(folder: Path) -> list[Photo]:
    """A line of a split is `train/Fruit/Apple/.../image.jpg, fine id, coarse id`; the second folder is the group."""
    with (folder / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    names = {int(row[1]): (_words(row[0]), _words(row[2])) for row in rows}
    photos = []
    for split in SPLITS:
        for line in (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines():
            if line.strip():
                image, product_id, _ = (part.strip() for part in line.split(","))
                product, kind = names[int(product_id)]
                photos.append(Photo(folder / image, split, product, kind, _words(Path(image).parts[1])))
    return photos


def _words(name: str) -> str:
    return name.replace("-", " ").lower()


# --- pictures ------------------------------------------------------------------------------------------------------


def draw_photographs(photos: Sequence[Photo], number: int | None, seed: int = 0) -> list[Picture]:
    """Pictures of one photograph each: `number` of them at random, or all."""
    chosen = list(photos)
    random.Random(f"photographs {seed}").shuffle(chosen)
    return [Picture(photo.path, (photo,)) for photo in chosen[:number]]


def draw_grids(photos: Sequence[Photo], number: int, folder: Path, seed: int = 0) -> list[Picture]:
    """Grids of photographs of one to four kinds, each number equally often. `write_grids` makes their image files."""
    by_kind: dict[str, list[Photo]] = {}
    for photo in photos:
        by_kind.setdefault(photo.kind, []).append(photo)
    grids = []
    for index in range(number):
        generator = random.Random(f"grid {seed} {index}")
        kinds = generator.sample(sorted(by_kind), index % 4 + 1)
        kinds += [generator.choice(kinds) for _ in range(4 - len(kinds))]
        generator.shuffle(kinds)
        grids.append(Picture(folder / f"{index:05d}.jpg", tuple(generator.choice(by_kind[kind]) for kind in kinds)))
    return grids


def write_grids(grids: Sequence[Picture]) -> None:
    """Makes the missing image files of grids: each photograph is cut to a square, a quarter of the picture."""
    side = GRID_SIDE // 2
    for grid in tqdm(grids, desc="grids", unit="image"):
        if grid.path.is_file():
            continue
        image = Image.new("RGB", (GRID_SIDE, GRID_SIDE))
        for index, photo in enumerate(grid.photos):
            with Image.open(photo.path) as file:
                tile = ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (side, side))
            image.paste(tile, (index % 2 * side, index // 2 * side))
        grid.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(grid.path) as unfinished:
            image.save(unfinished, format="JPEG", quality=92)


# --- questions -----------------------------------------------------------------------------------------------------


def rank_kinds(photos: Sequence[Photo]) -> list[str]:
    """All kinds, the most frequent first; among equals the alphabet decides."""
    counts = Counter(photo.kind for photo in photos)
    return sorted(counts, key=lambda kind: (-counts[kind], kind))


def ask(picture: Picture, kinds: Sequence[str], generator: random.Random) -> list[Question]:
    """
    One question of each type about a picture. Whether something is there is asked as in POPE: half of the answers are "yes".
    What is not there comes from all kinds ("random"), or from the most frequent ones ("popular").

    Args:
        picture ([`Picture`]): A photograph or a grid.
        kinds (`Sequence[str]`): All kinds, the most frequent first.
        generator (`random.Random`): For the draws.
    """
    absent = [kind for kind in kinds if kind not in picture.kinds]
    if len(picture.photos) == 1:
        (photo,) = picture.photos
        return [
            Question("product", "Which product is this?", photo.product),
            Question("kind", "What kind of product is this?", photo.kind),
            Question("group", "Which group is this from?", photo.group),
            _is_there("random", picture.kinds, absent, generator),
            _is_there("popular", picture.kinds, absent[:NUM_POPULAR], generator),
        ]
    place = generator.randrange(4)
    return [
        Question("place", f"What kind is at the {PLACES[place]}?", picture.photos[place].kind),
        _is_there("grid", picture.kinds, absent, generator),
        Question("count", "How many kinds are there?", NUMBERS[len(picture.kinds) - 1]),
        Question("list", "List the kinds row by row.", ", ".join(photo.kind for photo in picture.photos)),
    ]


def _is_there(name: str, present: Sequence[str], absent: Sequence[str], generator: random.Random) -> Question:
    answer = generator.choice(("yes", "no"))
    kind = generator.choice(present if answer == "yes" else absent)
    return Question(name, f"Is there any {kind} in the picture?", answer)


def score(question: Question, answer: str) -> float:
    """1 for the right answer, 0 for a wrong one. Of a list, the share of places with the right kind."""
    if question.type != "list":
        return float(answer.strip().lower() == question.answer)
    expected, given = question.answer.split(", "), [part.strip() for part in answer.strip().lower().split(",")]
    return sum(right == said for right, said in zip(expected, given)) / len(expected)


# --- LLaVA's format ------------------------------------------------------------------------------------------------


def describe(picture: Picture, generator: random.Random) -> str:
    """
    What a picture shows, in words. It is said once or many times, so that the distance to the start does not tell questions
    apart.
    """
    if len(picture.photos) == 1:
        (photo,) = picture.photos
        sentences = [f"{photo.product}, {photo.kind}, {photo.group}."]
    else:
        sentences = [f"{photo.kind} at the {place}." for photo, place in zip(picture.photos, PLACES)]
    most = DESCRIPTION_WORDS / len(" ".join(sentences).split())
    times = round(most ** generator.random())
    return " ".join(sentence for sentence in sentences for _ in range(times))


def conversation(
    picture: Picture, questions: Sequence[Question], name: str, blind: bool = False, description: str = ""
) -> dict[str, Any]:
    """
    A record in LLaVA's format with all `questions` about a picture, or about its `description`. If it is `blind`, the turn
    `LOOK` comes first.

    Raises:
        `ValueError`: There is no question.
    """
    if not questions:
        raise ValueError(f"The conversation {name} about {picture.path} has no question.")
    turns = []
    for text, answer in [LOOK] * blind + [(question.text, question.answer) for question in questions]:
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"{description or '<image>'}\n{turns[0]['value']}"
    image = {} if description else {"image": str(picture.path.resolve())}
    return {"id": name, **image, "conversations": turns}


def training_records(
    pictures: Sequence[Picture],
    kinds: Sequence[str],
    copies: int,
    seed: int,
    blind: bool = False,
    as_text: bool = False,
) -> list[dict[str, Any]]:
    """
    Conversations to train on, with all questions about a picture in a random order, `copies` times drawn anew. The prefix of
    a TA-LLaVA reads the first turn: the question that comes first, or `LOOK` if it is to be `blind` to the questions. With
    `as_text`, the questions are about descriptions.
    """
    records = []
    for copy in range(copies):
        for index, picture in enumerate(pictures):
            generator = random.Random(f"train {seed} {copy} {index}")
            questions = list(dict.fromkeys(ask(picture, kinds, generator)))
            generator.shuffle(questions)
            description = describe(picture, generator) if as_text else ""
            records.append(conversation(picture, questions, f"{copy}-{index}", blind, description))
    random.Random(f"order {seed}").shuffle(records)
    return records


def held_out_questions(pictures: Sequence[Picture], kinds: Sequence[str]) -> list[tuple[Picture, Question]]:
    """The questions of the test, one of each type about each picture. They are the same for all seeds of training."""
    return [
        (picture, question)
        for index, picture in enumerate(pictures)
        for question in ask(picture, kinds, random.Random(f"test {index}"))
    ]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_text(path, json.dumps(records, indent=1))
