"""The commands with checkpoints of every family of LLaVAs: compress, ask, evaluate, cost, visualize, export."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import run
from families import FAMILIES, VIEWS, build_processor, build_stock, ours
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from ta_llava.analysis.cost import count_cost, read_config
from ta_llava.analysis.visualize import visualize, visualize_inhibition
from ta_llava.building.compress import compress_llava, with_vmtc_and_cmai
from ta_llava.common.families import FAMILIES as KNOWN
from ta_llava.common.families import family_of
from ta_llava.inference import answer, load
from ta_llava.publishing.export import export_model
from ta_llava.publishing.model_card import write_model_card


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder as the library saves it, for each family."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        build_stock(family).save_pretrained(folder)
        build_processor(family).save_pretrained(folder)
        settings = json.loads((folder / "processor_config.json").read_text())
        names = (
            "auto_map",
            "use_vmtc",
            "vmtc_num_visual_tokens",
            "vmtc_keep_ratio",
            "vmtc_total_visual_tokens",
            "spd_factor",
        )
        settings = {name: value for name, value in settings.items() if name not in names}
        settings["processor_class"] = family_of(family).stock_processor.__name__
        if family == "llava_onevision":
            settings["video_processor"] = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(settings))
        for code in folder.glob("*.py"):
            code.unlink()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 70, 3), dtype=np.uint8)).save(
            folder / "photo.png"
        )
    return folders


def test_an_unknown_family_is_told_which_are_known(stock, tmp_path):
    assert [family.stock_type for family in KNOWN] == FAMILIES
    with pytest.raises(
        ValueError, match="'bert' model; VMTC and CMAI work on 'llava', 'llava_next' and 'llava_onevision'"
    ):
        family_of("bert")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for arguments in (
        ("compress", tmp_path, tmp_path / "out"),
        ("ask", "--cmai", "0.6", "--model", tmp_path, stock["llava"] / "photo.png", "a"),
    ):
        code, _, error = run(*arguments)
        assert code == 1 and "work on 'llava', 'llava_next' and 'llava_onevision' checkpoints" in error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_checkpoint_answers_and_can_be_exported(family, stock, tmp_path):
    code, output, error = run("compress", stock[family], tmp_path / "out", "--visual-tokens", "9", "--cmai", "0.6")
    of_each_view = " of each view" if family in VIEWS else ""
    assert code == 0 and f"VMTC with 9 visual tokens{of_each_view}, CMAI up to 0.6" in output, error
    assert {path.name for path in (tmp_path / "out").glob("*.py")} >= {"vmtc_cmai_mixins.py"}
    weights = [load_file(folder / "model.safetensors") for folder in (stock[family], tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys()
    model, processor = load(tmp_path / "out")
    assert type(model) is ours(family, "ForConditionalGeneration") and type(processor) is ours(family, "Processor")
    assert (model.config.vmtc_merge_weights, model.config.use_cmai) == ("normalized", True)
    photo = stock[family] / "photo.png"
    questions = [([photo], "what is it"), ([photo, photo], "a b"), ([], "c")]
    answers = list(answer(model, processor, questions, batch_size=3, max_new_tokens=4))
    assert answers == [each for one in questions for each in answer(model, processor, [one], max_new_tokens=4)]
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    content = [{"type": "image", "path": str(photo)}, {"type": "text", "text": "what is it"}]
    [piped] = pipe(
        text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False, do_sample=False
    )
    assert piped["generated_text"].strip() == answers[0]
    code, output, error = run(
        "ask",
        "--model",
        stock[family],
        "--visual-tokens",
        "9",
        "--cmai",
        "0.6",
        "--max-new-tokens",
        "4",
        photo,
        "what is it",
    )
    assert code == 0 and output.strip().endswith(answers[0]), error
    export_model(tmp_path / "out", tmp_path / "export")
    exported, _ = load(tmp_path / "export")
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in model.state_dict().items())
    card = (tmp_path / "export" / "README.md").read_text()
    if family in VIEWS:  # the whole picture and 2 x 2 tiles, with a newline after each row of them
        assert "the 180 visual tokens of an image of 48 x 48 pixels become **47**" in card
    else:
        assert "the 36 visual tokens of an image become **9**" in card
    compress_llava(stock[family], tmp_path / "cmai", cmai_max_ratio=0.6)
    assert "averaged over squares" not in write_model_card(tmp_path / "cmai", "name")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_scored_as_it_is_and_with_fewer_tokens(family, stock, tmp_path):
    photo = str(stock[family] / "photo.png")
    turns = [[{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": "a"}] for text in ("what", "b c")]
    samples = [{"id": str(id), "image": photo, "conversations": turn} for id, turn in enumerate(turns)]
    (tmp_path / "test.json").write_text(json.dumps(samples))
    asked = ("--task", "json", "--data", tmp_path / "test.json", "--max-new-tokens", "3")
    for number, (options, title) in enumerate(
        (
            ((), "# {model}: test, 2 questions\n"),
            (("--visual-tokens", "9"), "test, 2 questions, 9 visual tokens{of_each_view}\n"),
            (("--visual-tokens", "9", "--cmai", "0.6"), "9 visual tokens{of_each_view}, CMAI 0.6\n"),
        )
    ):
        code, output, error = run("evaluate", stock[family], *asked, *options, "-o", tmp_path / str(number))
        of_each_view = " of each view" if family in VIEWS else ""
        assert code == 0 and title.format(model=stock[family], of_each_view=of_each_view) in output, error
        settings = json.loads((tmp_path / str(number) / "results.json").read_text())["settings"]
        assert settings["num_questions"] == 2
        model, processor = load(stock[family], *[9, 0.6][:number], *[None] * (2 - number))
        expected = list(answer(model, processor, [([photo], "what"), ([photo], "b c")], max_new_tokens=3))
        lines = (tmp_path / str(number) / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["answer"] for line in lines] == expected


@pytest.mark.parametrize("family", VIEWS)
def test_a_total_budget_is_written(family, stock, tmp_path):
    code, output, error = run("compress", stock[family], tmp_path / "total", "--total-visual-tokens", "20")
    assert code == 0 and "VMTC with 20 visual tokens of a whole picture." in output, error
    model, processor = load(tmp_path / "total")
    assert (model.config.vmtc_total_visual_tokens, model.config.vmtc_num_visual_tokens) == (20, None)
    assert (
        next(answer(model, processor, [([stock[family] / "photo.png"], "what is it")], max_new_tokens=2)) is not None
    )
    config = compress_llava(tmp_path / "total", tmp_path / "views", 9)  # replaces it
    assert (config.vmtc_total_visual_tokens, config.vmtc_num_visual_tokens) == (None, 9)
    for source, arguments, message in (
        (stock[family], (9,), "of each view \\(9\\) or of a whole picture \\(20\\), not both"),
        (stock["llava"], (), "a 'llava' model does not cut pictures into views"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_llava(source, tmp_path / "other", *arguments, total_visual_tokens=20)
    for total, message in ((4, "is 4 visual tokens, but it has up to 5 views"), (181, "its 5 views have 180 patches")):
        with pytest.raises(ValueError, match=message):
            compress_llava(stock[family], tmp_path / "other", total_visual_tokens=total)
    with pytest.raises(ValueError, match="shares 20 visual tokens among the views"):
        visualize(stock[family] / "photo.png", tmp_path / "total")
    with pytest.raises(ValueError, match="`vmtc_total_visual_tokens` is 20, but a compiled vision tower"):
        load(tmp_path / "total", compiled=True)
    with pytest.raises(ValueError, match="`vmtc_total_visual_tokens` must be at least 1, got 0"):
        compress_llava(stock[family], tmp_path / "other", total_visual_tokens=0)


@pytest.mark.parametrize("family", VIEWS)
def test_a_checkpoint_that_would_never_answer_is_refused(family, stock, tmp_path):
    """Its views are too large for the tower, or its features hold a class token."""
    strategy = "full" if family == "llava_next" else "default"
    for name, change, message in (
        (
            "processor_config.json",
            {"size": {"height": 48, "width": 48}, "crop_size": {"height": 48, "width": 48}},
            "48 x 48",
        ),
        ("config.json", {"vision_feature_select_strategy": strategy}, f'is "{strategy}"'),
    ):
        source = tmp_path / name
        shutil.copytree(stock[family], source)
        settings = json.loads((source / name).read_text())
        settings.get("image_processor", settings).update(change)
        (source / name).write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            compress_llava(source, tmp_path / "out", 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_answers_as_it_is(family, stock):
    model, processor = load(stock[family])
    assert not hasattr(model.config, "use_vmtc")
    ours_, _ = load(stock[family], cmai_max_ratio=0)
    photo = stock[family] / "photo.png"
    one, two = (next(answer(each, processor, [([photo], "what is it")], max_new_tokens=5)) for each in (model, ours_))
    assert one == two


@pytest.mark.parametrize("family", VIEWS)
def test_what_would_cut_pictures_into_other_views_is_refused(family, stock, tmp_path):
    settings = json.loads((stock[family] / "processor_config.json").read_text())
    for path in stock[family].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings["image_processor"]["image_grid_pinpoints"] = [[24, 48]]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="other `image_grid_pinpoints` than its config.json"):
        compress_llava(tmp_path, tmp_path / "out")
    settings["processor_class"] = "LlavaProcessor"
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"has a LlavaProcessor, but its model is a '{family}'"):
        compress_llava(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="The budget is 37 visual tokens, but an image has 36 patches"):
        compress_llava(stock[family], tmp_path / "out", 37)


@pytest.mark.parametrize("family", VIEWS)
def test_the_cost_is_that_of_the_picture_with_most_tiles(family, stock):
    config, size = read_config(stock[family])
    whole = count_cost(config, 10, 1, size)
    assert whole.num_tokens == 36 + 12 * 13 + 10  # 2 x 2 tiles; each row of the grid ends in a newline
    few = count_cost(with_vmtc_and_cmai(config, 9, 0.6), 10, 2, size)
    assert few.num_tokens == 2 * (5 * 9 + 2) + 10
    total = with_vmtc_and_cmai(config, 9)
    total.vmtc_num_visual_tokens = None
    for budget, of_view in ((20, 4), (180, 36), (1000, 36)):
        total.vmtc_total_visual_tokens = budget
        assert count_cost(total, 10, 1, size).num_tokens == 5 * of_view + 2 + 10


def test_the_cost_of_llava_next_at_its_published_size():
    code, output, error = run("cost", "llava-next-7b", "--visual-tokens", "64", "--json")
    costs = json.loads(output)
    assert code == 0 and costs["llava-next-7b"]["num_tokens"] == 2880 + 48 + 40, (
        error
    )  # a newline for each row of the grid
    assert costs["llava-next-7b, 64 visual tokens of each view"]["num_tokens"] == 320 + 2 + 40


@pytest.mark.parametrize("family", VIEWS)
def test_the_whole_picture_is_drawn(family, stock):
    photo = Image.open(stock[family] / "photo.png")
    picture, views = visualize(photo, stock[family], 9)
    assert [view.num_before for view in views] == [36, 27, 18] and picture.width > 24
    assert views[-1].num_kept + views[-1].num_merged == 9
    for budget in (9, None):
        _, view = visualize_inhibition(photo, "what is it", stock[family], budget, 0.6, max_new_tokens=3)
        assert view.inhibited.shape[1:] == (6, 6) and len(view.stages) == (3 if budget else 0)
        if view.words:
            assert 0 < view.inhibited.nan_to_num().max() <= 1
