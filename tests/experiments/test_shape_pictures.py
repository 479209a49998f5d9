import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scene_pixels import load_pixels, shape_mask
from shape_pictures import GRIDS, Picture, ask, build_pictures, write_llava_format

from ta_llava.data.easy_vqa import COLORS, QUESTION_TYPES, SHAPES, question_type


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return build_pictures("test", 200)


def test_the_first_pictures_do_not_depend_on_their_number(pictures):
    assert build_pictures("test", 3) == pictures[:3]
    assert build_pictures("test", 3, seed=1) != pictures[:3]
    assert all("/test/" in cell.path for picture in pictures for cell in picture.cells)
    assert all("/train/" in cell.path for picture in build_pictures("train", 5) for cell in picture.cells)


def test_pictures_have_all_grids_and_numbers_of_shapes(pictures):
    assert {(picture.rows, picture.columns) for picture in pictures} == set(GRIDS)
    shown = Counter(len(picture.scenes) for picture in pictures if len(picture.cells) == 4)
    assert shown.keys() == {1, 2, 3, 4}


def test_every_cell_is_drawn_in_its_place_and_empty_ones_have_no_shape(pictures):
    for picture in pictures[:20]:
        pixels = np.asarray(picture.draw())
        assert pixels.shape == (64 * picture.rows, 64 * picture.columns, 3)
        for index, (scene, shown) in enumerate(zip(picture.cells, picture.shown)):
            row, column = divmod(index, picture.columns)
            cell = pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            original = load_pixels(scene)
            background = ~shape_mask(original)
            assert np.array_equal(cell[background], original[background])
            assert np.array_equal(cell, original) if shown else not shape_mask(cell).any()


def test_answers_are_true(pictures):
    answers: dict[str, Counter] = {kind: Counter() for kind in QUESTION_TYPES}
    for index, picture in enumerate(pictures):
        questions = ask(picture, random.Random(index), count=2)
        assert len(set(questions)) == len(questions) == (6 if len(picture.scenes) == 1 else 4)
        for question, answer in questions:
            answers[question_type(question, answer)][answer] += 1
            words = question.rstrip("?").split()
            if answer not in ("yes", "no"):
                [scene] = picture.scenes
                assert answer == (scene.color if words[1] == "color" else scene.shape)
                continue
            [name] = {*COLORS, *SHAPES} & set(words)
            there = [scene.color if name in COLORS else scene.shape for scene in picture.scenes]
            assert (name in there) == (answer == "yes")
    for kind in ("yes/no, colour", "yes/no, shape"):
        assert 0.4 < answers[kind]["yes"] / answers[kind].total() < 0.6
    assert answers["which colour"].keys() == set(COLORS) and answers["which shape"].keys() == set(SHAPES)


def test_the_files_hold_conversations_to_train_on_and_single_questions_to_test(pictures, tmp_path):
    write_llava_format(tmp_path, "train", pictures[:10])
    write_llava_format(tmp_path, "test", pictures[:10])
    train, test = (json.loads((tmp_path / f"{split}.json").read_text()) for split in ("train", "test"))
    assert len(train) == 10 and all(len(sample["conversations"]) in (8, 12) for sample in train)
    assert all(len(sample["conversations"]) == 2 and sample["type"] in QUESTION_TYPES for sample in test)
    for sample in [*train, *test]:
        texts = [turn["value"] for turn in sample["conversations"]]
        assert texts[0].startswith("<image>\n") and "".join(texts).count("<image>") == 1
        index = int(sample["id"].split("-")[0])
        assert Image.open(tmp_path / sample["image"]).size == pictures[index].draw().size
