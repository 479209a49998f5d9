"""The benchmark on photographs: prompts, answers with given features, intervals, tables, and what a folder remembers."""

import json
from types import SimpleNamespace

import numpy as np
import photograph_answers
import photograph_models
import photograph_tables
import photographs
import pytest
import torch
from conftest import make_lively
from grocery_questions import LOOK, Question
from jobs import run_job
from photograph_answers import (
    ALL_TOKENS,
    CMAI,
    PRESET,
    PRESET_AND_CMAI,
    Prompts,
    answer,
    features_of,
    file_name,
    methods,
    write_tensors,
)
from photograph_models import ta_llava_name
from photograph_tables import (
    AVERAGE,
    Resamples,
    Results,
    accuracies,
    format_average,
    format_differences,
    format_ta_llava,
    interval,
)
from photographs import check_config, list_jobs, write_results
from PIL import Image
from rivals import RIVALS
from tiny_parts import save_language_model, save_tower
from transformers import AutoModelForImageTextToText, AutoProcessor

from ta_llava.building.assemble import assemble_llava, assemble_ta_llava
from ta_llava.inference import answer as answer_about_images


CONFIG = {
    "seeds": [0, 1],
    "budgets": [12, 6],
    "prefix_lengths": [2],
    "vmtc": {"VMTC": {}},
    "ablations": {"VMTC in one stage": {"vmtc_num_stages": 1}},
    "image_size": 56,
    "stages": {"tuning": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}},
    "train_grids": 3,
}
QUESTIONS = ["What is this?", "Compare the two.", "Is the model an assistant?"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_tower(folder / "tower", "dinov2")
    save_language_model(folder / "language-model", "gemma")
    return folder / "tower", folder / "language-model"


def talkative(folder):
    """A model that answers differently to each question, and at full length."""
    model = make_lively(AutoModelForImageTextToText.from_pretrained(folder)).eval()
    model.generation_config.eos_token_id = None
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def llava(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "model"
    assemble_llava(folder, *parts)
    return talkative(folder)


@pytest.fixture(scope="module")
def ta_llava(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ta-llava") / "model"
    assemble_ta_llava(folder, *parts, num_prefix_tokens=3, adapter_interval=2)
    return talkative(folder)


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in QUESTIONS]


@pytest.mark.parametrize("kind", ["llava", "ta_llava", "cmai"])
def test_answers_with_features_are_those_about_the_images(kind, request, monkeypatch):
    """So prompts, placeholders and features are what `ta-llava ask` makes of the same images. A LLaVA reads each once."""
    model, processor = request.getfixturevalue("ta_llava" if kind == "ta_llava" else "llava")
    monkeypatch.setattr(model.config, "use_cmai", kind == "cmai", raising=False)
    monkeypatch.setattr(photograph_answers, "BATCH_SIZE", 2)
    images = pictures()
    asked = [(question, index) for question in QUESTIONS for index in range(len(images))]
    expected = list(answer_about_images(model, processor, [([images[i]], q) for q, i in asked], max_new_tokens=20))
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_vision_features(pixels[:, None] if kind == "ta_llava" else pixels)
    if kind == "ta_llava":
        features = features.reshape(len(images), 1, -1, features.shape[-1])
    reads = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: reads.append(given.get("vision_features")), with_kwargs=True
    )
    assert answer(model, Prompts(processor), features, asked) == expected
    hook.remove()
    assert len(set(expected)) > 1 and all(expected)
    if kind != "ta_llava":
        assert sum(len(read) for read in reads if read is not None) == len(images)


def test_placeholders_for_fewer_tokens(llava):
    _, processor = llava
    full, fewer = Prompts(processor)(QUESTIONS[0]), Prompts(processor, 5)(QUESTIONS[0])
    token = processor.image_token_id
    assert fewer.count(token) == 5 < full.count(token)
    assert [i for i in fewer if i != token] == [i for i in full if i != token]
    assert fewer.index(token) == full.index(token)


def test_features_of_each_method(llava, tmp_path):
    model, _ = llava
    generator = torch.Generator().manual_seed(0)
    width = model.config.vision_config.hidden_size
    tensors = {
        "tokens": torch.randn(3, 16, width, generator=generator),
        "attention": torch.rand(3, 16, generator=generator),
        "keys": torch.randn(3, 2, 16, 4, generator=generator),
    }
    write_tensors(tmp_path / "test" / "tower.safetensors", tensors, {"grid": "[4, 4]"})
    write_tensors(tmp_path / "test" / "vmtc-6.safetensors", {"tokens": torch.full((3, 6, width), 2.0)})
    with torch.no_grad():
        assert torch.equal(features_of(tmp_path, CONFIG, "test", model, ALL_TOKENS, None), tensors["tokens"])
        assert (features_of(tmp_path, CONFIG, "test", model, "VMTC", 6) == 2).all()
        for name in RIVALS:
            assert features_of(tmp_path, CONFIG, "test", model, name, 4).shape == (3, 4, width)


def test_cmai_works_on_the_features_of_others(llava, tmp_path, monkeypatch):
    """And it is off again for the next method."""
    model, processor = llava
    rows = {ALL_TOKENS: torch.zeros(1, 16, 32), PRESET: torch.ones(1, 6, 32)}
    monkeypatch.setattr(
        photograph_answers, "load_tower_outputs", lambda path: SimpleNamespace(tokens=rows[ALL_TOKENS])
    )
    write_tensors(tmp_path / "test" / f"{file_name(PRESET)}-6.safetensors", {"tokens": rows[PRESET]})
    data = SimpleNamespace(test=[SimpleNamespace(path=0)], questions=[])
    monkeypatch.setattr(photograph_answers, "data_of", lambda *_: data)
    seen = []
    monkeypatch.setattr(photograph_answers, "answer", lambda model, *_: seen.append(model.config.use_cmai) or [])
    for method, budget, features in (
        (CMAI, None, ALL_TOKENS),
        (ALL_TOKENS, None, ALL_TOKENS),
        (PRESET_AND_CMAI, 6, PRESET),
        (PRESET, 6, PRESET),
    ):
        assert torch.equal(features_of(tmp_path, CONFIG, "test", model, method, budget), rows[features])
        photograph_answers._ask_about_test(
            tmp_path, CONFIG, model, processor, method, budget, tmp_path / "scores.json"
        )
    assert seen == [True, False, True, False]


# --- tables --------------------------------------------------------------------------------------------------------


def test_accuracies_by_hand():
    scores = np.array([[1, 0, 1, 1], [0, 0, 1, 0.5]])
    types, pictures = ["kind", "list", "kind", "list"], np.array([0, 0, 1, 1])
    once = Resamples(np.array([[1, 1], [2, 0]]), np.array([[1, 1], [0, 2]]))
    result = accuracies(scores, types, pictures, once)
    np.testing.assert_allclose(result["kind"], [75, 0])  # then: only picture 0, only the second seed
    np.testing.assert_allclose(result["list"], [37.5, 0])
    np.testing.assert_allclose(result[AVERAGE], [56.25, 0])


def test_the_interval_covers_questions_and_seeds():
    resamples = Resamples.draw(400, 1, draws=4000)
    assert (resamples.pictures[0] == 1).all() and (resamples.pictures.sum(axis=1) == 400).all()
    scores = (np.arange(400) % 2)[None].astype(float)
    draws = accuracies(scores, ["kind"] * 400, np.arange(400), resamples)["kind"]
    value, half = interval(draws)
    assert value == 50 and half == pytest.approx(100 * 1.96 * (0.25 / 400) ** 0.5, rel=0.1)
    alike = np.repeat(scores[:, :100], 4, axis=1)  # four questions about each picture, with the same score
    of_pictures = Resamples.draw(100, 1, draws=4000)
    _, wider = interval(accuracies(alike, ["kind"] * 400, np.repeat(np.arange(100), 4), of_pictures)["kind"])
    assert wider == pytest.approx(2 * half, rel=0.15)
    seeds = np.stack([np.zeros(400), np.ones(400)])
    _, over_seeds = interval(accuracies(seeds, ["kind"] * 400, np.arange(400), Resamples.draw(400, 2))["kind"])
    assert over_seeds == 50  # both seeds, or one of them twice


@pytest.fixture
def results(tmp_path):
    """Scores of two seeds on 20 pictures: the methods lose less the later they are in the list."""
    questions = [(SimpleNamespace(path=n // 2), Question(("kind", "random")[n % 2], "?", "yes")) for n in range(40)]
    data = SimpleNamespace(test=[SimpleNamespace(path=n) for n in range(20)], questions=questions)
    names = methods(CONFIG)
    for seed in (0, 1):
        folder = tmp_path / "scores" / f"llava-{seed}"
        folder.mkdir(parents=True)
        for name in (ALL_TOKENS, CMAI):
            (folder / f"{file_name(name)}-all.json").write_text(json.dumps({"scores": [1.0] * 40}))
        for budget in (12, 6):
            for index, name in enumerate(names):
                wrong = 2 * (len(names) - index)
                scores = [0.0] * wrong + [1.0] * (40 - wrong)
                (folder / f"{file_name(name)}-{budget}.json").write_text(json.dumps({"scores": scores}))
    return Results(tmp_path, CONFIG, data)


def test_tables(results):
    table = format_average(results)
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table.splitlines() if row.startswith("|")}
    assert set(rows) == {"visual tokens", "---", "VMTC", "VMTC in one stage", PRESET, PRESET_AND_CMAI, *RIVALS, "ToMe"}
    assert rows["ToMe"][0].strip().startswith("95.0 ±") and rows["VMTC"][0].strip().startswith("40.0 ±")
    (row, *_) = [
        line.split("|")[1:-1] for line in format_differences(results).splitlines() if line.startswith("| VMTC")
    ]
    cells = [cell.strip() for cell in row]
    assert cells[:3] == ["VMTC", "12", "ToMe"]
    assert [cell.split(" ")[0] for cell in cells[3:]] == ["-55.0", "-30.0", "-20.0", "-60.0"]


def test_the_table_of_ta_llavas_says_what_the_question_brings(results):
    for blind, wrong in ((False, 4), (True, 10)):
        for seed in (0, 1):
            path = results.folder / "scores" / f"{ta_llava_name(2, blind)}-{seed}" / "all.json"
            path.parent.mkdir()
            path.write_text(json.dumps({"scores": [0.0] * wrong + [1.0] * (40 - wrong)}))
    times = {"rows": [{"prefill_operations": 5_000_000_000}]}
    table = format_ta_llava(results, {(2, False): 1_000_000_000, (2, True): 1_200_000_000}, times)
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table.splitlines()[4:]}
    average = {name: (cells[-2].split("±")[0].strip(), cells[-1].strip()) for name, cells in rows.items()}
    assert average == {
        "TA-LLaVA, 2 prefix tokens": ("90.0", "1.00"),
        "TA-LLaVA, 2 prefix tokens, blind to the question": ("75.0", "1.20"),
        "what reading the question brings, 2": ("+15.0", ""),
        "LLaVA, all tokens": ("100.0", "5.00"),
    }


def test_equal_methods_differ_by_nothing(results):
    scores = results.all_methods(12)
    assert interval(scores["VMTC"][AVERAGE] - scores["VMTC"][AVERAGE]) == (0, 0)
    assert photograph_tables.cell(np.zeros(5), "+") == "+0.0 ± 0.0"


# --- the run -------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_its_sizes_and_may_get_more_seeds(tmp_path):
    check_config(tmp_path, {**CONFIG, "data": "here"})
    more = {**CONFIG, "seeds": [0, 1, 2], "data": "there", "vmtc": {"other": {"vmtc_num_stages": 2}}}
    check_config(tmp_path, more)
    check_config(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="`train_grids` 3, not 4"):
        check_config(tmp_path, {**CONFIG, "train_grids": 4})
    with pytest.raises(ValueError, match="`vmtc`.*'vmtc_num_stages': 2"):
        check_config(tmp_path, {**CONFIG, "vmtc": {"other": {"vmtc_num_stages": 4}}})


def test_a_blind_prefix_reads_no_question(ta_llava):
    _, processor = ta_llava
    ids = Prompts(processor, blind=True)(QUESTIONS[0])
    text = processor.tokenizer.decode(ids)
    marker = "<start_of_turn>model"
    assert LOOK[0] in text.split(marker)[0] and QUESTIONS[0] not in text.split(marker)[0]
    assert text.endswith(f"{marker}\n") and QUESTIONS[0] in text


TINY = {
    "seeds": [0],
    "train_grids": 4,
    "test_photographs": 4,
    "test_grids": 2,
    "tuning_pictures": 4,
    "image_size": 24,
    "language_model": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "stages": {
        name: {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "copies": 1}
        for name in ("text", "llava", "ta_llava", "tuning")
    },
    "prefix_lengths": [2],
    "adapter_interval": 2,
    "budgets": [12],
    "vmtc": {"VMTC as in the paper": {}},
    "ablations": {"VMTC in one stage": {"vmtc_num_stages": 1}},
}


def write_photographs(folder):
    """Three photographs of one colour of each of ten kinds, one for each split."""
    folder.mkdir()
    lines = ["image,split,fine,coarse,group"]
    for number, split in enumerate(("train", "val", "test")):
        for kind in range(10):
            Image.new("RGB", (30, 24), (20 * kind, 60 * number, 90)).save(folder / f"{split}{kind}.jpg")
            lines.append(f"{split}{kind}.jpg,{split},product {kind},kind {kind},group {kind % 3}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def test_a_whole_run(tmp_path, monkeypatch):
    """It writes the tables with every method, and once finished it computes nothing again."""
    monkeypatch.setattr(photograph_models, "write_dinov2", lambda folder, size: save_tower(folder, "dinov2"))
    monkeypatch.setattr(photographs, "ROUNDS", 1)
    config = {**TINY, "data": str(write_photographs(tmp_path / "photographs"))}
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    photograph_models.prepare(folder, config)
    for jobs in list_jobs(config):
        assert all(run_job(job, folder, config) for job in jobs), list((folder / "logs").iterdir())
    write_results(folder, config, tmp_path)
    table = (tmp_path / "photographs.md").read_text()
    names = (
        "VMTC as in the paper",
        "VisionZip",
        "ToMe",
        "random",
        "TA-LLaVA, 2 prefix tokens, blind",
        "what reading the question",
    )
    for name in names:
        assert name in table
    assert {"all tokens-all", "DivPrune-12-tuned", "ta-llava-2-blind"} <= json.loads(
        (tmp_path / "photographs.json").read_text()
    )["accuracy"].keys()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    for jobs in list_jobs(config):
        assert all(run_job(job, folder, config) for job in jobs)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written


def test_what_each_stage_learns_from(tmp_path):
    config = {**TINY, "data": str(write_photographs(tmp_path / "photographs"))}

    def read(stage):
        return json.loads(photograph_models.write_training_data(tmp_path, config, stage, 0).read_text())

    assert len(read("text")) == len(read("llava")) == 24  # 20 photographs and 4 grids
    assert not any("image" in record for record in read("text")) and all("image" in record for record in read("llava"))
    assert read("ta_llava") == read("llava")
    assert all(LOOK[0] in record["conversations"][0]["value"] for record in read("ta_llava_blind"))
    tuned = {record["image"] for record in read("tuning")}
    assert len(tuned) == 4 and tuned < {record["image"] for record in read("llava")}


def test_every_method_is_asked_with_every_budget_and_seed():
    jobs = [job for jobs in list_jobs(CONFIG) for job in jobs]
    names = [job.name for job in jobs if job.name.startswith(("answers", "tuned"))]
    num_untrained, num_tuned = 4 + len(RIVALS) + 1, 2 + len(RIVALS) + 1  # the latter without ablations and CMAI
    assert len(set(names)) == len(names) == 2 * (2 + 2 * num_untrained) + 2 * (2 + 2 * num_tuned) + 4
    assert {job.arguments for job in jobs if "DivPrune" in job.name and "tuned" in job.name} == {
        (seed, "DivPrune", budget) for seed in (0, 1) for budget in (12, 6)
    }
