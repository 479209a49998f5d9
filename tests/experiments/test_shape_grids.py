import random

import numpy as np
import pytest
from scene_pixels import load_pixels
from shape_grids import POSITIONS, QUESTION_TYPES, Grid, ask, build_grids, follow

from ta_llava.evaluation.instruction_following import TASKS, build_prompts, check


@pytest.fixture(scope="module")
def grids() -> list[Grid]:
    return build_grids("test", 100)


def test_the_first_grids_do_not_depend_on_their_number(grids):
    assert build_grids("test", 3) == grids[:3]
    assert build_grids("test", 3, seed=1) != grids[:3]


def test_grids_hold_images_of_their_split_only(grids):
    assert all("test" in cell.path and "train" not in cell.path for grid in grids for cell in grid.cells)
    assert all("train" in cell.path for grid in build_grids("train", 5) for cell in grid.cells)


def test_every_cell_is_drawn_in_its_place(grids):
    pixels = np.asarray(grids[0].draw())
    northwest, northeast, southwest, southeast = map(load_pixels, grids[0].cells)
    assert np.array_equal(pixels, np.block([[[northwest], [northeast]], [[southwest], [southeast]]]))


def test_answers_are_true(grids):
    for index, grid in enumerate(grids):
        by_place = dict(zip(POSITIONS, grid.cells))
        questions = ask(grid, random.Random(index))
        assert [question.type for question in questions] == list(QUESTION_TYPES)
        for question in questions:
            words = question.text.rstrip("?").split()
            if question.type == "which colour":
                assert question.answer == by_place[words[4]].color
            elif question.type == "which shape":
                assert question.answer == by_place[words[3]].shape
            elif question.type == "where":
                matching = [place for place, cell in by_place.items() if [cell.color, cell.shape] == words[-2:]]
                assert matching == [question.answer]
            else:
                assert int(question.answer) == sum(f"{cell.shape}s" == words[2] for cell in grid.cells)
            assert question.answer in question.sentence


def test_a_grid_of_one_shape_is_that_image():
    grid = build_grids("test", 1, num_shapes=1)[0]
    (scene,) = grid.cells
    assert np.array_equal(np.asarray(grid.draw()), load_pixels(scene))
    assert grid.caption == f"The shape is {scene.caption}."
    questions = ask(grid, random.Random(0))
    assert [(question.text, question.answer) for question in questions] == [
        ("What color is the shape?", scene.color),
        ("What is the shape?", scene.shape),
    ]


def test_a_grid_is_square():
    with pytest.raises(ValueError, match="A grid has 1 or 4 shapes, not 2"):
        build_grids("test", 1, num_shapes=2)


def test_where_is_asked_of_a_shape_that_comes_once(grids):
    a, b, *_ = {cell.caption: cell for cell in grids[0].cells}.values()
    for seed in range(10):
        question = ask(Grid([a, a, b, a]), random.Random(seed))[2]
        assert (question.text, question.answer) == (f"Where is the {b.caption[2:]}?", "southwest")
    for cells in ([a, a, a, a], [a, b, b, a]):
        question = ask(Grid(cells), random.Random(0))[2]
        assert (question.text, question.answer) == (f"Where is the {a.caption[2:]}?", "northwest")


def test_caption_names_all_four(grids):
    cells = grids[0].cells
    assert grids[0].caption.startswith(
        f"The northwest shape is {cells[0].caption}. The northeast shape is {cells[1].caption}."
    )
    assert grids[0].caption.count(".") == 4


def test_answers_follow_their_instructions(grids):
    followed = set()
    for index, grid in enumerate(grids[:20]):
        for question in ask(grid, random.Random(index)):
            for prompt in build_prompts([([], question.text)], seed=index):
                answer = follow(prompt.task, prompt.arguments, question)
                assert check(prompt, answer), (prompt, answer)
                assert question.answer in answer.lower()
                followed.add(prompt.task)
    assert followed == set(TASKS)


def test_an_unknown_instruction_is_named(grids):
    with pytest.raises(ValueError, match="no task 'rhyme'"):
        follow("rhyme", {}, ask(grids[0], random.Random(0))[0])
