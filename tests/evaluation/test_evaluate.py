"""Models are asked questions with known answers: nothing is asked twice, nothing is lost, nothing is mixed up."""

import base64
import json
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import SHIPPED_MODEL
from filelock import FileLock
from PIL import Image
from samples import ANSWERS, EXAMPLES, SAMPLES, TURNS, sample
from transformers import LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ta_llava.cli import app
from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.data import easy_vqa as easy_vqa_data
from ta_llava.evaluation import evaluate as module
from ta_llava.evaluation import instruction_following
from ta_llava.evaluation.evaluate import evaluate
from ta_llava.evaluation.tasks import evenly_spaced


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of `datasets` for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(*item) for item in SAMPLES]))
    return path


@pytest.fixture
def calls(monkeypatch) -> list:
    """Questions that are asked, batch by batch; `fail_at` is the number of a batch that stops after its first answer."""

    class Calls(list):
        fail_at: int | None = None

    calls, answer = Calls(), module.answer

    def count(model, processor, questions, **kwargs):
        calls.append([text for _, text in questions])
        for text in answer(model, processor, questions, **kwargs):
            yield text
            if len(calls) == calls.fail_at:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "answer", count)
    return calls


@pytest.fixture
def parrot(monkeypatch):
    """No model but an answer that repeats what was asked; it counts questions, and stops at that of `stop_at`."""

    class Parrot:
        stop_at: int | None = None
        asked = 0

        def __call__(self, model, processor, questions, **kwargs):
            for images, text in questions:
                self.asked += 1
                if self.asked == self.stop_at:
                    raise KeyboardInterrupt
                yield f"{len(images)} images: {text[-30:]}"

    parrot = Parrot()
    monkeypatch.setattr(module, "answer", parrot)
    monkeypatch.setattr(module, "load", lambda *arguments: (None, None))
    return parrot


def forbid_loading(monkeypatch) -> None:
    def load(*arguments):
        raise AssertionError("The model was loaded.")

    monkeypatch.setattr(module, "load", load)


@pytest.fixture
def no_model(monkeypatch):
    forbid_loading(monkeypatch)


def run(out: Path, data: Path | None, task: str = "json", model: str | Path = SHIPPED_MODEL, **kwargs) -> dict:
    if task in ("json", "pope", "if16") and data is not None:
        kwargs = {"image_folder": EXAMPLES, **kwargs}
    return evaluate(model, task, out, data=data, progress=False, **kwargs)


def predictions(out: Path, name: str = "predictions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_samples_in_llavas_format(tmp_path, data, calls):
    out = tmp_path / "new" / "out"
    results = run(out, data, batch_size=2)
    assert results["scores"] == {
        "color": {"questions": 2, "accuracy": 1.0},
        "caption": {"questions": 1, "accuracy": 1.0},
        "yes/no": {"questions": 1, "accuracy": 0.0},
        "all": {"questions": 5, "accuracy": 0.8},  # also the sample without a type
    }
    assert [len(batch) for batch in calls] == [2, 2, 1]
    assert [line["answer"] for line in predictions(out)] == ANSWERS
    assert predictions(out)[0] == {
        "id": "teal_triangle: what color is the shape?",
        "type": "color",
        "image": str(EXAMPLES / "teal_triangle.png"),
        "question": "what color is the shape?",
        "expected": "teal",
        "answer": "teal",
    }
    assert json.loads((out / "results.json").read_text()) == results
    assert "| color | 2 | 100.00% |\n" in (out / "results.md").read_text()
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == {"predictions.jsonl", "results.json", "results.md", "settings.json"}


def test_paths_of_images_are_relative_to_the_file(tmp_path):
    shutil.copyfile(EXAMPLES / "red_circle.png", tmp_path / "red_circle.png")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(sample(*SAMPLES[1])) + "\n\n")
    assert run(tmp_path / "out", path, image_folder=None)["scores"]["all"]["accuracy"] == 1


def test_vmtc_and_cmai(tmp_path, data):
    results = run(tmp_path / "out", data, model=DEFAULT_LLAVA, num_visual_tokens=32, cmai_max_ratio=0.6)
    assert results["scores"]["color"]["accuracy"] == 1
    assert (results["settings"]["visual_tokens"], results["settings"]["cmai"]) == (32, 0.6)
    assert results["model_type"] == "llava"
    title = (tmp_path / "out" / "results.md").read_text().splitlines()[0]
    assert title == f"# {DEFAULT_LLAVA}: data, 5 questions, 32 visual tokens, CMAI 0.6"


def test_an_adapter(tmp_path, data):
    """With the model that it names; if either changes, what was answered before does not count."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = tmp_path / "base"
    shutil.copytree(SHIPPED_MODEL, base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    folder = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(folder)
    results = run(tmp_path / "out", data, model=folder)
    assert (results["model_type"], results["settings"]["model"]) == ("ta_llava", str(folder))
    assert results["scores"]["color"]["accuracy"] == 1
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "max_length": 99}))
    with pytest.raises(ValueError, match="files_of_model"):
        run(tmp_path / "out", data, model=folder)


@pytest.mark.parametrize("kind", ["structs", "bytes", "base64"])
def test_a_folder_whose_column_of_images_no_longer_says_so(tmp_path, kind):
    files = [(EXAMPLES / image).read_bytes() for image, *_ in SAMPLES[:2]]
    images = {
        "structs": [{"bytes": content, "path": None} for content in files],
        "bytes": files,
        "base64": [base64.b64encode(content).decode() for content in files],
    }[kind]
    conversations = [sample(*each)["conversations"] for each in SAMPLES[:2]]
    records = datasets.Dataset.from_dict({"image": images, "conversations": conversations})
    records.save_to_disk(str(tmp_path / "data"))
    assert run(tmp_path / "out", tmp_path / "data", "folder")["scores"]["all"] == {"questions": 2, "accuracy": 1.0}
    if kind == "base64":
        path = tmp_path / "data.json"
        path.write_text(json.dumps([{**sample(*SAMPLES[0]), "image": images[0]}]))
        with pytest.raises(ValueError, match="must name its images by paths"):
            run(tmp_path / "other", path)


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_of_datasets_with_and_without_images_in_it(tmp_path, held):
    """In TRL's format, with the image after the question."""
    images = [str(EXAMPLES / image) for image, *_ in SAMPLES[:2]]
    messages = [
        [
            {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": expected}]},
        ]
        for _, question, expected, _ in SAMPLES[:2]
    ]
    columns = {"images": [[image] for image in images], "messages": messages, "type": ["color", "shape"]}
    records = datasets.Dataset.from_dict(columns)
    if held:
        records = records.cast_column("images", datasets.Sequence(datasets.Image()))
        records = records.map(lambda record: record)  # embeds them
    datasets.DatasetDict({"test": records}).save_to_disk(str(tmp_path / "data"))
    results = run(tmp_path / "out", tmp_path / "data", "folder", batch_size=1)
    assert results["scores"]["all"] == {"questions": 2, "accuracy": 1.0}
    assert list(results["scores"]) == ["color", "shape", "all"]
    assert [line["question"] for line in predictions(tmp_path / "out")] == [SAMPLES[0][1], SAMPLES[1][1]]
    assert ("image" in predictions(tmp_path / "out")[0]) != held
    with pytest.raises(ValueError, match="has the splits test; train was asked for"):
        run(tmp_path / "other", tmp_path / "data", "folder", split="train")


@pytest.mark.parametrize(("model", "bar"), [(SHIPPED_MODEL, 0.99), (DEFAULT_LLAVA, 0.97)])
def test_the_shipped_models_answer_the_test_questions_of_easy_vqa(tmp_path, model, bar):
    """All 9,673 questions are `make evaluate-tiny`; the README says what they give."""
    scores = run(tmp_path / "out", None, "easy-vqa", model=model, num_questions=200, batch_size=100)["scores"]
    assert list(scores) == [*easy_vqa_data.QUESTION_TYPES, "all"]
    assert scores["all"]["accuracy"] >= bar
    assert scores["all"]["questions"] == sum(scores[name]["questions"] for name in easy_vqa_data.QUESTION_TYPES) == 200
    assert all(row["accuracy"] > row["prior"] for row in scores.values())


OBJECTS = [{"image": "red_circle.png", "objects": ["circle"]}, {"image": "teal_triangle.png", "objects": ["triangle"]}]


def test_pope(tmp_path):
    path = tmp_path / "objects.json"
    path.write_text("\n".join(map(json.dumps, OBJECTS)))  # JSON lines, whatever it is called, as POPE has it
    results = run(tmp_path / "out", path, "pope", strategy="popular", objects_per_image=1)
    assert results["scores"] == {
        "popular": {
            "questions": 4,
            "accuracy": 1.0,
            "precision": 1.0,
            "recall": 1.0,
            "f1": 1.0,
            "yes_ratio": 0.5,
        }
    }
    assert predictions(tmp_path / "out")[1]["question"] == "Is there a triangle in the image?"
    assert {"strategy": "popular", "objects_per_image": 1, "seed": 0}.items() <= results["settings"].items()


def test_instructions(tmp_path, data, monkeypatch):
    def score(prompts, answers):
        assert len(prompts) == len(answers) and {prompt.question for prompt in prompts} == {
            SAMPLES[0][1],
            SAMPLES[2][1],
        }
        return {
            "lowercase": {"asked": 2, "success_rate": 0.5},
            "average": {"asked": len(prompts), "success_rate": 0.25},
        }

    monkeypatch.setattr(instruction_following, "load_checkers", lambda: None)
    monkeypatch.setattr(instruction_following, "score", score)
    count = 2 * len(instruction_following.TASKS)
    results = run(tmp_path / "out", data, "if16", num_questions=2, max_new_tokens=2, batch_size=32)
    assert results["scores"] == {
        "lowercase": {"questions": 2, "success_rate": 0.5},
        "average": {"questions": count, "success_rate": 0.25},
    }
    lines = predictions(tmp_path / "out")
    assert len({line["id"] for line in lines}) == len(lines) == count
    assert lines[1]["type"] == "lowercase" and lines[1]["question"].startswith(SAMPLES[0][1] + "\n")
    assert "expected" not in lines[0]


def test_instructions_about_a_folder_with_images_in_it(tmp_path, parrot):
    """Several questions about an image, and one without any."""
    content = {"bytes": (EXAMPLES / "red_circle.png").read_bytes(), "path": None}
    texts = ["<image>\nwhat color is the shape?", "<image>\nwhat shape is in the image?", "what is red?"]
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "it"}] for text in texts]
    columns = {"images": [[content], [content], []], "conversations": turns}
    records = datasets.Dataset.from_dict(columns).cast_column("images", datasets.Sequence(datasets.Image()))
    records.save_to_disk(str(tmp_path / "data"))
    results = run(tmp_path / "out", tmp_path / "data", "if16")
    lines = predictions(tmp_path / "out")
    for index, text in enumerate(texts):
        for line in lines[16 * index : 16 * (index + 1)]:
            assert line["question"].startswith(text.removeprefix("<image>\n") + "\n")
            assert line["answer"].startswith(f"{text.count('<image>')} images")
    assert len(lines) == 48
    assert run(tmp_path / "out", tmp_path / "data", "if16") == results and parrot.asked == 48  # it is the same data


# --- the upper limit of if16 ---------------------------------------------------------------------------------------

UPPER_LIMIT = {"task": "if16", "describe_first": True}


@pytest.mark.parametrize("model", [SHIPPED_MODEL, DEFAULT_LLAVA])
def test_the_upper_limit_asks_about_descriptions(tmp_path, data, calls, model):
    """Of three questions about two images."""
    out = tmp_path / "out"
    results = run(out, data, model=model, num_questions=3, max_new_tokens=4, batch_size=48, **UPPER_LIMIT)
    descriptions = predictions(out, "descriptions.jsonl")
    assert [Path(line["image"]).name for line in descriptions] == ["teal_triangle.png", "red_circle.png"]
    assert {line["question"] for line in descriptions} == {"Describe this image in detail."}
    assert "triangle" in descriptions[0]["answer"] and "circle" in descriptions[1]["answer"]
    assert [len(batch) for batch in calls] == [2, 48]
    asked = [([image], question) for image, question, *_ in evenly_spaced(SAMPLES, 3)]
    prompts = instruction_following.build_prompts(asked)
    lines = predictions(out)
    for prompt, line in zip(prompts, lines, strict=True):
        description = descriptions[["teal_triangle.png", "red_circle.png"].index(prompt.images[0])]["answer"]
        described = instruction_following.prompt_from_description(prompt, description)
        assert (line["question"], line["type"]) == (described.prompt, prompt.task)
        assert "image" not in line and line["answer"]
    answers = [line["answer"] for line in lines]
    expected = instruction_following.score(prompts, answers)["average"]["success_rate"]
    assert results["scores"]["average"] == {"questions": 48, "success_rate": expected}
    assert results["settings"]["describe_first"] is True
    assert "the model's own descriptions" in (out / "results.md").read_text()


def test_the_upper_limit_of_a_folder_with_images_in_it(tmp_path):
    """On the command line."""
    content = (EXAMPLES / "red_circle.png").read_bytes()
    records = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}], "conversations": [TURNS]})
    records.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "data"))
    arguments = ["--task", "if16", "--describe-first", "--data", tmp_path / "data", "--max-new-tokens", 4]
    result = CliRunner().invoke(app, ["evaluate", *map(str, [SHIPPED_MODEL, *arguments, "-o", tmp_path / "out"])])
    assert result.exit_code == 0 and "| average | 16 |" in result.stdout
    assert [line["answer"] for line in predictions(tmp_path / "out", "descriptions.jsonl")] == ["a red circle"]
    assert len(predictions(tmp_path / "out")) == 16


@pytest.mark.parametrize("stop_at", [2, 3, 40])  # in the second description, in the first question, and later
def test_a_killed_upper_limit_goes_on(tmp_path, data, parrot, stop_at):
    run(tmp_path / "whole", data, batch_size=1, **UPPER_LIMIT)
    assert parrot.asked == 2 + 80
    out = tmp_path / "out"
    parrot.asked, parrot.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        run(out, data, batch_size=1, **UPPER_LIMIT)
    assert len(predictions(out, "descriptions.jsonl")) == min(stop_at - 1, 2) and not (out / "results.json").exists()
    with (out / "descriptions.jsonl").open("a") as file:
        file.write('{"id": "cut o')
    parrot.asked, parrot.stop_at = 0, None
    run(out, data, batch_size=1, **UPPER_LIMIT)
    assert parrot.asked == 82 - (stop_at - 1)
    for name in ("descriptions.jsonl", "predictions.jsonl", "results.json", "results.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("stop_at", [2, 40])
def test_an_upper_limit_does_not_go_on_as_something_else(tmp_path, data, parrot, stop_at):
    out = tmp_path / "out"
    parrot.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        run(out, data, batch_size=1, **UPPER_LIMIT)
    with pytest.raises(ValueError, match="begun with `describe_first` True, not None"):
        run(out, data, "if16")
    with pytest.raises(ValueError, match="begun with `max_new_tokens` 64, not 5"):
        run(out, data, max_new_tokens=5, **UPPER_LIMIT)
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match="has descriptions.jsonl, but no settings.json"):
        run(out, data, **UPPER_LIMIT)


def test_something_else_does_not_go_on_as_an_upper_limit(tmp_path, data, parrot):
    run(tmp_path / "out", data, "if16")
    with pytest.raises(ValueError, match="begun with `describe_first` None, not True"):
        run(tmp_path / "out", data, **UPPER_LIMIT)
    assert not (tmp_path / "out" / "descriptions.jsonl").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"answer"', '"respons"', "descriptions.jsonl, line 1 is not as it was written"),
        ("1 images: ", "2 images: ", "predictions.jsonl, line 1 is not .* not about the question that was asked"),
    ],
)
def test_descriptions_that_were_changed_are_not_taken(tmp_path, data, parrot, old, new, message):
    run(tmp_path / "out", data, **UPPER_LIMIT)
    path = tmp_path / "out" / "descriptions.jsonl"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", data, **UPPER_LIMIT)


# --- interrupted runs ----------------------------------------------------------------------------------------------


def interrupt(out: Path, data: Path, calls, at: int = 2) -> None:
    """A run of batches of two that stops in that batch."""
    calls.fail_at = at
    with pytest.raises(KeyboardInterrupt):
        run(out, data, batch_size=2)
    calls.clear()
    calls.fail_at = None


def test_a_killed_run_goes_on(tmp_path, data, calls):
    expected = run(tmp_path / "whole", data)
    calls.clear()
    out = tmp_path / "out"
    interrupt(out, data, calls)
    assert [line["answer"] for line in predictions(out)] == ANSWERS[:2]
    assert not (out / "results.json").exists() and not (out / "results.md").exists()
    results = run(out, data, batch_size=16)  # the size of batches may change
    assert calls == [[SAMPLES[2][1], SAMPLES[3][1], SAMPLES[4][1]]]
    assert results["scores"] == expected["scores"]
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [1, 30])  # only the line break, or more; 30 characters from the end, it is no JSON
def test_a_half_written_line_is_asked_again(tmp_path, data, calls, cut):
    out = tmp_path / "out"
    run(out, data)
    calls.clear()
    whole = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(whole[:-cut])
    assert run(out, data)["scores"]["all"]["accuracy"] == 0.8
    assert calls == [[SAMPLES[4][1]]]
    assert (out / "predictions.jsonl").read_bytes() == whole


def test_the_bar_goes_on_where_it_was(tmp_path, data, calls, monkeypatch):
    interrupt(tmp_path / "out", data, calls)
    bars = []
    tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda *args, **kwargs: bars.append(kwargs) or tqdm(*args, **kwargs))
    run(tmp_path / "out", data)
    assert (bars[-1]["total"], bars[-1]["initial"]) == (5, 2)


def test_a_finished_run_is_only_scored_again(tmp_path, data, calls, monkeypatch):
    results = run(tmp_path / "out", data)
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setattr(module, "load", None)
    assert run(tmp_path / "out", data) == results
    assert len(calls) == 1 and (tmp_path / "out" / "results.json").is_file()


def change_answer(data: Path) -> dict:
    data.write_text(data.read_text().replace("a red circle", "a red circle!"))
    return {}


def change_weights(model: Path) -> dict:
    status = (model / "model.safetensors").stat()
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    assert (model / "model.safetensors").stat().st_mtime_ns != status.st_mtime_ns
    return {}


OTHERS = {
    "model": (lambda data, model: {"model": DEFAULT_LLAVA}, "with `model` '.*/model', not '.*/llava-tiny'"),
    "visual_tokens": (lambda data, model: {"num_visual_tokens": 16}, "with `visual_tokens` None, not 16"),
    "cmai": (lambda data, model: {"cmai_max_ratio": 0.5}, "with `cmai` None, not 0.5"),
    "max_new_tokens": (lambda data, model: {"max_new_tokens": 3}, "with `max_new_tokens` 64, not 3"),
    "num_questions": (lambda data, model: {"num_questions": 4}, "with `num_questions` 5, not 4"),
    "data": (
        lambda data, model: {"data": shutil.copyfile(data, data.with_name("b.json"))},
        "with `data` '.*data.json', not '.*b.json'",
    ),
    "content of data": (lambda data, model: change_answer(data), "with `content_of_data` '"),
    "weights": (lambda data, model: change_weights(model), "with `files_of_model` '"),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_run_with_other_settings_is_refused(tmp_path, data, monkeypatch, parrot, change):
    make, message = OTHERS[change]
    model, out = Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model")), tmp_path / "out"
    run(out, data, model=model)
    forbid_loading(monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    kwargs = {"data": data, "model": model, **make(data, model)}
    with pytest.raises(ValueError, match=rf"{message}.*\. Choose another folder, or delete this one"):
        run(out, **kwargs)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_settings_may_change_as_long_as_nothing_is_answered(tmp_path, data, calls):
    interrupt(tmp_path / "out", data, calls, at=1)
    assert run(tmp_path / "out", data, max_new_tokens=3)["settings"]["max_new_tokens"] == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"answer": "teal"}', '"answer": "te', "line 1 is not as it was written"),
        ("describe the image.", "describe it.", "line 4 is not .* not about the question that was asked"),
        ('"answer": "yes"}', '"answer": "yes"}\n{}', "line 6 is not"),
    ],
)
def test_predictions_that_were_changed_are_not_taken(tmp_path, data, monkeypatch, old, new, message):
    run(tmp_path / "out", data)
    forbid_loading(monkeypatch)
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", data)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_predictions_of_nobody_knows_what_are_not_taken(tmp_path, data, no_model, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("{}\n")
    if content is not None:
        (tmp_path / "out" / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"has predictions.jsonl, but no settings.json"):
        run(tmp_path / "out", data)


def test_two_processes_do_not_write_to_one_folder(tmp_path, data, no_model):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="Another process is writing"):
        run(tmp_path / "out", data)


def test_results_are_complete_or_not_there(tmp_path, data, monkeypatch, parrot):
    """As on a full disk: what was there before stays, and what was not is not begun."""
    write_text = Path.write_text

    def fail(path, content, **kwargs):
        if "results" in path.name:
            write_text(path, content[:10], **kwargs)
            raise OSError("no space left")
        return write_text(path, content, **kwargs)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path / "out", data)
    assert not (tmp_path / "out" / "results.json").exists() and len(predictions(tmp_path / "out")) == 5


def test_missing_and_damaged_images_are_named(tmp_path, no_model):
    (tmp_path / "damaged.png").write_bytes((EXAMPLES / "red_circle.png").read_bytes()[:-40])
    shutil.copyfile(EXAMPLES / "red_circle.png", tmp_path / "good.png")
    path = tmp_path / "data.json"
    for bad, message in (("none.png", "There is no image file '.*none.png'"), ("damaged.png", "truncated")):
        path.write_text(json.dumps([sample(image, "what?", "it") for image in ("good.png", bad, "none.png")]))
        with pytest.raises(ValueError, match=rf"^Question {Path(bad).stem}: what\?: .*{message}.* \(1 more images"):
            run(tmp_path / "out", path, image_folder=tmp_path)
    assert not (tmp_path / "out").exists()


def test_damaged_images_in_a_folder_are_named(tmp_path, no_model):
    content = (EXAMPLES / "red_circle.png").read_bytes()
    image = [{"bytes": content, "path": None}, {"bytes": content[:-40], "path": None}]
    columns = {"id": ["a", "b"], "image": image, "conversations": [TURNS, TURNS]}
    records = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    records.save_to_disk(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="^Question b: .*truncated"):
        run(tmp_path / "out", tmp_path / "data", "folder")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "vqa"}, "no task 'vqa', only easy-vqa, json, folder, pope, if16"),
        ({"task": "easy-vqa"}, "easy-vqa brings its own data"),
        ({"data": None}, "The task json needs data: name its file"),
        ({"task": "folder", "data": None}, "The task folder needs data: name its folder"),
        ({"data": Path("none.json")}, "There is no file none.json"),
        ({"task": "folder", "data": Path("none")}, "There is no folder none"),
        ({"task": "folder", "data": EXAMPLES}, "examples is no dataset that `save_to_disk` has written"),
        ({"data": EXAMPLES}, "examples is a folder, not a file of records"),
        ({"task": "if16", "data": EXAMPLES}, "examples is no dataset that `save_to_disk` has written"),
        ({"describe_first": True}, "Only if16 describes the images first, the task json does not"),
        ({"image_folder": "none"}, "There is no folder none of images"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"num_questions": -1}, "`num_questions` must be at least 1, got -1"),
        ({"model": EXAMPLES}, "No model could be loaded from '.*examples'"),
        ({"task": "pope"}, "data.json: Record 0 .* has no list of `objects`"),
        ({"benchmark": "POPE"}, "called USER/DATASET or USER/DATASET:TASK, not 'POPE'"),
    ],
)
def test_a_bad_setting_is_found_before_the_model_is_loaded(tmp_path, data, no_model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **{"data": data, **kwargs})
    assert not (tmp_path / "out").exists()


def test_results_need_a_folder(data, no_model):
    with pytest.raises(ValueError, match="data.json is a file"):
        run(data, data)


def test_a_language_model_cannot_be_asked_about_images(tmp_path, data, no_model):
    PreTrainedTokenizerFast.from_pretrained(SHIPPED_MODEL).save_pretrained(tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    for name in ("processor_class", "auto_map"):
        kept.pop(name, None)
    settings.write_text(json.dumps(kept))
    LlamaConfig().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model has no image processor"):
        run(tmp_path / "out", data, model=tmp_path / "model")


def test_a_budget_that_cannot_be_leaves_nothing_behind(tmp_path, data):
    with pytest.raises(ValueError, match="The budget is 65 visual tokens"):
        run(tmp_path / "new" / "out", data, model=DEFAULT_LLAVA, num_visual_tokens=65)
    assert not (tmp_path / "new").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="The budget is 65 visual tokens"):
        run(tmp_path / "out", data, model=DEFAULT_LLAVA, num_visual_tokens=65)
    run(tmp_path / "out", data, model=DEFAULT_LLAVA, num_visual_tokens=16)


def test_images_of_a_folder_may_be_paths_in_a_column_of_images(tmp_path):
    """A record with several images, all before the question."""
    with Image.open(EXAMPLES / "red_circle.png") as image:
        image.save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\n<image>\nwhat color is the shape?"}, {"from": "gpt", "value": "red"}]
    records = datasets.Dataset.from_dict({"images": [["a.png", "a.png"]], "conversations": [turns]})
    records.save_to_disk(str(tmp_path / "data"))
    run(tmp_path / "out", tmp_path / "data", "folder", image_folder=tmp_path)
    line = predictions(tmp_path / "out")[0]
    assert (line["id"], line["question"], len(line["image"])) == ("0", "what color is the shape?", 2)
