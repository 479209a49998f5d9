"""Questions about photographs: both layouts of the data set, what is drawn, and that it is drawn the same way again."""

import csv
import json
import random
from collections import Counter

import pytest
from grocery_questions import (
    DESCRIPTION_WORDS,
    LOOK,
    NUM_POPULAR,
    PLACES,
    TYPES,
    Question,
    ask,
    conversation,
    describe,
    draw_grids,
    draw_photographs,
    held_out_questions,
    rank_kinds,
    read_photos,
    score,
    training_records,
    write_grids,
)
from PIL import Image

from ta_llava.data.samples import read_sample


# Product, kind and group; the number of photographs in each split is the place in the list plus one.
PRODUCTS = (
    [("Granny-Smith", "Apple", "Fruit"), ("Pink-Lady", "Apple", "Fruit"), ("Oatly-Oat-Milk", "Oat-Milk", "Packages")]
    + [(name, name, "Vegetables") for name in ("Leek", "Garlic", "Ginger", "Cabbage", "Carrots", "Cucumber")]
    + [(name, name, "Fruit") for name in ("Kiwi", "Lemon", "Lime", "Mango", "Orange")]
)  # fmt: skip
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same photographs in the public layout, and in one with `labels.csv`."""
    public, simple = tmp_path_factory.mktemp("public"), tmp_path_factory.mktemp("simple")
    (public / "dataset").mkdir()
    kinds = list(dict.fromkeys(kind for _, kind, _ in PRODUCTS))
    with (public / "dataset" / "classes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Class Name (str)", "Class ID (int)", "Coarse Class Name (str)", "Coarse Class ID (int)"])
        rows.writerows([name, index, kind, kinds.index(kind)] for index, (name, kind, _) in enumerate(PRODUCTS))
    labels = []
    for split in SPLITS:
        lines = []
        for index, (name, kind, group) in enumerate(PRODUCTS):
            for number in range(index + 1):
                inner = f"{group}/{kind}/{name}" if name != kind else f"{group}/{name}"
                color = (40 * SPLITS.index(split) + 60, 15 * index, 10 * number)
                for path in (
                    public / "dataset" / split / inner / f"{number}.jpg",
                    simple / split / f"{name}_{number}.jpg",
                ):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (30, 40), color).save(path)
                lines.append(f"{split}/{inner}/{number}.jpg, {index}, {kinds.index(kind)}")
                labels.append([f"{split}/{name}_{number}.jpg", split, name, kind, group])
        (public / "dataset" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    with (simple / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "split", "fine", "coarse", "group"], *labels])
    return public, simple


@pytest.fixture(scope="module")
def photos(folders):
    return read_photos(folders[1])


def without_path(photos):
    return [(photo.split, photo.product, photo.kind, photo.group) for photo in photos]


def test_both_layouts_are_read_alike(folders):
    public, simple = (read_photos(folder) for folder in folders)
    assert without_path(public) == without_path(simple) == without_path(read_photos(folders[0] / "dataset"))
    assert len(public) == 3 * sum(range(1, len(PRODUCTS) + 1))
    assert without_path(public)[:2] == [
        ("train", "granny smith", "apple", "fruit"),
        ("train", "pink lady", "apple", "fruit"),
    ]
    for one, other in zip(public, simple):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_a_wrong_folder_and_a_missing_image(folders, tmp_path):
    with pytest.raises(ValueError, match="classes.csv, train.txt, val.txt, test.txt"):
        read_photos(tmp_path)
    (tmp_path / "labels.csv").write_text("image,split,fine,coarse,group\ntest/a.jpg,test,Kiwi,Kiwi,Fruit\n")
    with pytest.raises(ValueError, match="lacks 1 of 1 image files.*a.jpg"):
        read_photos(tmp_path)


def test_the_most_frequent_kind_is_first(photos):
    kinds = rank_kinds(photos)
    assert kinds[:2] == ["orange", "mango"] and len(kinds) == len({kind for _, kind, _ in PRODUCTS})
    # 1 + 2 apples and 3 oat milks: the alphabet decides.
    assert kinds[-2:] == ["apple", "oat milk"]


def test_questions_about_a_photograph(photos):
    kinds = rank_kinds(photos)
    picture = next(p for p in draw_photographs(photos, None) if p.photos[0].product == "pink lady")
    asked = [ask(picture, kinds, random.Random(index)) for index in range(400)]
    assert [question.type for question in asked[0]] == list(TYPES[:5])
    assert {question.answer for questions in asked for question in questions} == {
        "pink lady",
        "apple",
        "fruit",
        "yes",
        "no",
    }
    for name, expected in (("random", set(kinds)), ("popular", set(kinds[:NUM_POPULAR]))):
        said = Counter(q.answer for questions in asked for q in questions if q.type == name)
        assert 150 < said["yes"] < 250  # 200 of 400 expected
        named = {q.text for questions in asked for q in questions if q.type == name and q.answer == "no"}
        assert named == {f"Is there any {kind} in the picture?" for kind in expected - {"apple"}}
        assert {q.text for questions in asked for q in questions if q.type == name and q.answer == "yes"} == {
            "Is there any apple in the picture?"
        }


def test_questions_about_a_grid(photos, tmp_path):
    kinds = rank_kinds(photos)
    grids = draw_grids(photos, 40, tmp_path)
    assert Counter(len(grid.kinds) for grid in grids) == {1: 10, 2: 10, 3: 10, 4: 10}
    for index, grid in enumerate(grids):
        place, there, count, listed = ask(grid, kinds, random.Random(index))
        names = dict(zip(PLACES, (photo.kind for photo in grid.photos)))
        assert place.answer == next(
            kind for name, kind in names.items() if place.text == f"What kind is at the {name}?"
        )
        assert (there.answer == "yes") == any(
            there.text == f"Is there any {kind} in the picture?" for kind in names.values()
        )
        assert count.answer == ["one", "two", "three", "four"][len(set(names.values())) - 1]
        assert listed.answer == ", ".join(names.values())
    assert len({ask(grid, kinds, random.Random(i))[0].text for i, grid in enumerate(grids)}) == 4


def test_a_grid_shows_its_photographs_at_their_places(photos, tmp_path):
    (grid,) = draw_grids(photos, 4, tmp_path)[3:]
    write_grids([grid])
    image = Image.open(grid.path)
    assert image.size == (224, 224)
    for photo, place in zip(grid.photos, ((56, 56), (168, 56), (56, 168), (168, 168))):
        shown, expected = image.getpixel(place), Image.open(photo.path).getpixel((15, 20))
        assert max(abs(a - b) for a, b in zip(shown, expected)) < 12  # JPEG
    before = grid.path.stat().st_mtime_ns
    write_grids([grid])
    assert grid.path.stat().st_mtime_ns == before


def test_draws_are_the_same_again_and_differ_between_seeds(photos, tmp_path):
    kinds = rank_kinds(photos)
    pictures = draw_photographs(photos, 10) + draw_grids(photos, 10, tmp_path)
    assert pictures == draw_photographs(photos, 10) + draw_grids(photos, 10, tmp_path)
    assert draw_photographs(photos, 10, seed=1) != draw_photographs(photos, 10)
    assert held_out_questions(pictures, kinds) == held_out_questions(pictures, kinds)
    first, second, again = (training_records(pictures, kinds, 2, seed) for seed in (0, 1, 0))
    assert first == again != second


@pytest.mark.parametrize("blind", [False, True])
def test_records_are_samples_in_the_format_of_llava(photos, tmp_path, blind):
    kinds, pictures = rank_kinds(photos), draw_photographs(photos, 3) + draw_grids(photos, 3, tmp_path)
    records = training_records(pictures, kinds, 2, 0, blind=blind)
    samples = [read_sample(json.loads(json.dumps(record))) for record in records]
    assert len({sample.id for sample in samples}) == len(samples) == 12
    assert all(len(sample.images) == 1 for sample in samples)
    assert {len(sample.messages) for sample in samples} == {8 + 2 * blind, 10 + 2 * blind}
    first = {record["conversations"][0]["value"] for record in records}
    assert first == {f"<image>\n{LOOK[0]}"} if blind else len(first) >= 6  # orders differ


def test_descriptions_answer_the_questions_and_are_of_all_lengths(photos, tmp_path):
    (grid,) = draw_grids(photos, 4, tmp_path)[3:]
    (photograph,) = draw_photographs(photos, 1)
    for picture in (grid, photograph):
        texts = [describe(picture, random.Random(index)) for index in range(200)]
        lengths = sorted(len(text.split()) for text in texts)
        assert lengths[0] < 0.2 * DESCRIPTION_WORDS and lengths[100] < 0.5 * DESCRIPTION_WORDS
        assert 0.8 * DESCRIPTION_WORDS < lengths[-1] <= 1.1 * DESCRIPTION_WORDS
        sentences = list(dict.fromkeys(texts[0].rstrip(".").split(". ")))
        if picture is grid:
            assert sentences == [f"{photo.kind} at the {place}" for photo, place in zip(grid.photos, PLACES)]
        else:
            assert sentences == [f"{picture.photos[0].product}, {picture.photos[0].kind}, {picture.photos[0].group}"]


def test_text_is_asked_the_same_questions_without_an_image(photos, tmp_path):
    kinds, pictures = rank_kinds(photos), draw_photographs(photos, 3) + draw_grids(photos, 3, tmp_path)
    pictured, told = (training_records(pictures, kinds, 1, 0, as_text=as_text) for as_text in (False, True))
    assert all("image" not in record and read_sample(record).images == [] for record in told)
    for record in told:
        (other,) = (each for each in pictured if each["id"] == record["id"])
        description, question = record["conversations"][0]["value"].split("\n")
        assert other["conversations"][0]["value"] == f"<image>\n{question}" and description.endswith(".")
        assert other["conversations"][1:] == record["conversations"][1:]


def test_a_conversation_needs_a_question(photos):
    (picture,) = draw_photographs(photos, 1)
    with pytest.raises(ValueError, match="conversation x about .* has no question"):
        conversation(picture, [], "x")


def test_scores():
    product, listed = Question("product", "?", "pink lady"), Question("list", "?", "kiwi, leek, kiwi, oat milk")
    assert [score(product, text) for text in ("Pink Lady", "pink", "", "pink lady apple")] == [1, 0, 0, 0]
    answers = ("kiwi, leek, kiwi, oat milk", "leek, leek, kiwi, oat milk", "kiwi", "", "oat milk, kiwi, leek, kiwi")
    assert [score(listed, text) for text in answers] == [1, 0.75, 0.25, 0, 0]
