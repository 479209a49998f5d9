"""Evaluations on model cards and leaderboards: those of the model, and as what they are."""

import json

import pytest
import yaml
from conftest import EXAMPLE_IMAGE, SHIPPED_MODEL, build_config, build_llava_config
from families import config_fields, ours
from hub_server import HubServer
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from model_cards import count_nothing, save_config, section

from ta_llava.evaluation.evaluate import evaluate
from ta_llava.publishing.evaluations import write_eval_results
from ta_llava.publishing.model_card import write_model_card


@pytest.fixture
def counted(monkeypatch):
    count_nothing(monkeypatch)


def test_results_of_evaluations(counted, tmp_path, caplog):
    samples = [
        {
            "id": str(index),
            "image": str(EXAMPLE_IMAGE),
            "type": "shape",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "teal"}],
        }
        for index, question in enumerate(["what color is the shape?", "is there a circle in the image?"])
    ]
    (tmp_path / "shapes.json").write_text(json.dumps(samples))
    evaluate(SHIPPED_MODEL, "json", tmp_path / "shapes", data=tmp_path / "shapes.json", progress=False)
    save_config(tmp_path / "model", build_config())
    pope = {"questions": 6, "accuracy": 0.5, "f1": 0.25}
    settings = {"data": "objects.json", "num_questions": 6, "strategy": "random"}
    inside = tmp_path / "model" / "pope" / "results.json"
    inside.parent.mkdir()
    inside.write_text(
        json.dumps({"task": "pope", "scores": {"random": pope}, "note": "As in POPE.", "settings": settings})
    )

    card = write_model_card(tmp_path / "model", "my-model", [tmp_path / "shapes", tmp_path / "model" / "pope"])
    results = section(card, "Results")
    assert "**POPE on objects, 6 questions, random objects**" in results
    assert "| | questions | accuracy | f1 |\n|---|---:|---:|---:|\n| random | 6 | 50.00% | 25.00% |\n" in results
    assert (
        "**shapes, 2 questions, of `ta-llava-tiny`**" in results
        and "| shape | 2 | 50.00% |\n| all | 2 | 50.00% |\n" in results
    )
    assert results.count("\n**") == 2  # the one inside is named too, but there once
    found = ModelCard(card).data.eval_results
    assert [(result.dataset_name, result.metric_type, result.metric_value) for result in found] == [
        ("POPE on objects", "accuracy", 0.5),
        ("POPE on objects", "f1", 0.25),
        ("shapes", "accuracy", 0.5),
    ]
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, tmp_path / "home")
        ModelCard(card).validate()

    with pytest.raises(ValueError, match=r"no results\.json in .*nowhere"):
        write_model_card(tmp_path / "model", "my-model", [tmp_path / "nowhere"])
    inside.write_text('{"task": "pope"}')  # by something else, perhaps
    with pytest.raises(ValueError, match=r"results\.json is not as `ta-llava evaluate` writes it"):
        write_model_card(tmp_path / "model", "my-model", [inside.parent])
    card = write_model_card(tmp_path / "model", "my-model", [tmp_path / "shapes"])
    assert section(card, "Results").count("\n**") == 1
    assert (
        f"{inside} is not as `ta-llava evaluate` writes it: 'scores'. It is left out of the model card." in caplog.text
    )


def test_scores_on_benchmarks_of_the_hub(tmp_path, caplog):
    model = tmp_path / "model"
    save_config(model, build_llava_config())
    (model / ".eval_results").mkdir()
    (model / ".eval_results" / "hle.yaml").write_text("- dataset: {id: cais/hle, task_id: hle}\n  value: 1\n")
    scores = {
        "pope": {"adversarial": {"questions": 6, "accuracy": 0.5, "f1": 0.25}},
        "json": {"shape": {"questions": 1, "accuracy": 1.0}, "all": {"questions": 2, "accuracy": 0.5}},
        "if16": {
            "no commas": {"questions": 2, "success_rate": 1.0},
            "average": {"questions": 32, "success_rate": 0.75},
        },
    }
    named = [("pope", 9, "me/pope:adversarial"), ("pope", None, "me/pope:adversarial"), ("json", None, "me/mine")]
    named += [("if16", None, "me/if16"), ("json", None, None)]
    for number, (task, visual_tokens, benchmark) in enumerate(named):
        folder = model / str(number)
        folder.mkdir()
        settings = {"data": "a.json", "num_questions": 2, "model": str(model), "visual_tokens": visual_tokens}
        content = {"task": task, "scores": scores[task], "note": "", "settings": settings, "benchmark": benchmark}
        (folder / "results.json").write_text(json.dumps(content))
    files = write_eval_results(model)
    found = {name: parse_eval_result_entries(yaml.safe_load(text)) for name, text in files.items()}
    pope, tokens = "POPE on a, 2 questions", "9 visual tokens"
    assert not caplog.text
    assert found == {
        ".eval_results/hle.yaml": [EvalResultEntry("cais/hle", "hle", 1)],
        ".eval_results/pope-adversarial-POPE-on-a-2-questions-9-visual-tokens.yaml": [
            EvalResultEntry("me/pope", "adversarial", 0.25, notes=f"{pope}, {tokens}")
        ],
        ".eval_results/pope-adversarial-POPE-on-a-2-questions.yaml": [
            EvalResultEntry("me/pope", "adversarial", 0.25, notes=pope)
        ],
        ".eval_results/mine-a-2-questions.yaml": [EvalResultEntry("me/mine", "default", 0.5, notes="a, 2 questions")],
        ".eval_results/if16-IF16-on-a-2-questions.yaml": [
            EvalResultEntry("me/if16", "default", 0.75, notes="IF16 on a, 2 questions")
        ],
    }


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ({}, {}, None),
        ({}, {"visual_tokens": 9, "cmai": 0.6}, None),
        ({"use_vmtc": False, "use_cmai": False}, {"visual_tokens": 36, "cmai": 0}, None),
        ({}, {"model": None}, "which model was evaluated is not recorded"),
        ({}, {"model": "other/stock"}, "other/stock was evaluated"),
        ({}, {"visual_tokens": 16}, "it was evaluated with 16 visual tokens, and has 9 visual tokens, CMAI 0.6"),
        ({}, {"cmai": 0.0}, "it was evaluated with CMAI 0.0, and has 9 visual tokens, CMAI 0.6"),
        (
            {"use_cmai": False},
            {"visual_tokens": 9, "cmai": 0.6},
            "it was evaluated with 9 visual tokens, CMAI 0.6, and has 9 visual tokens, CMAI 0",
        ),
    ],
)
def test_a_score_is_published_of_the_model_as_it_is_only(counted, tmp_path, caplog, config, settings, reason):
    model, results = tmp_path / "model", tmp_path / "results"
    save_config(model, build_llava_config(**config))
    results.mkdir()
    content = json.loads(evaluation(None, {"model": str(model), **settings}))
    (results / "results.json").write_text(json.dumps({**content, "benchmark": "me/mine"}))
    assert len(write_eval_results(model, [results])) == (reason is None)
    message = f"The score on me/mine is left out of .eval_results: {reason}. Evaluate {model} as it is."
    assert not caplog.text if reason is None else message in caplog.text
    assert "| all | 2 | 50.00% |" in write_model_card(model, "my-model", [results])  # which names what was evaluated


@pytest.mark.parametrize(
    ("budget", "has"),
    [
        ({"vmtc_num_visual_tokens": 9}, None),
        ({"vmtc_num_visual_tokens": 12}, "12 visual tokens of each view"),
        ({"vmtc_total_visual_tokens": 45}, "45 visual tokens of a whole picture"),
        ({"vmtc_total_visual_tokens": 45, "vmtc_keep_ratio": 0.25}, "45 visual tokens of a whole picture"),
    ],
)
def test_a_budget_of_each_view_is_no_budget_of_a_picture(counted, tmp_path, caplog, budget, has):
    model, results = tmp_path / "model", tmp_path / "results"
    save_config(model, ours("llava_next", "Config")(**config_fields("llava_next"), use_vmtc=True, **budget))
    results.mkdir()
    content = json.loads(evaluation(None, {"model": str(model), "visual_tokens": 9}))
    content |= {"benchmark": "me/mine", "model_type": "vmtc_cmai_llava_next"}
    (results / "results.json").write_text(json.dumps(content))
    assert len(write_eval_results(model, [results])) == (has is None)
    assert has is None or f"with 9 visual tokens of each view, and has {has}, CMAI 0" in caplog.text
    assert "questions, 9 visual tokens of each view**" in write_model_card(model, "my-model", [results])


@pytest.mark.parametrize(
    ("config", "model_type", "settings", "message"),
    [
        ("ta_llava", "llava", {}, "a 'llava' model was evaluated, and this one is a 'ta_llava'"),
        (
            "ta_llava",
            None,
            {"visual_tokens": 4, "cmai": 0.6},
            "4 visual tokens, CMAI 0.6, which a TA-LLaVA does not have",
        ),
        ("ta_llava", "ta_llava", {"cmai": 0.0}, "CMAI 0.0, which a TA-LLaVA does not have"),
        ("llava", "ta_llava", {}, "a 'ta_llava' model was evaluated, and this one is a 'vmtc_cmai_llava'"),
        ("llava", "llava", {"visual_tokens": 37}, "with 37 visual tokens, but an image has 36 patches here"),
    ],
)
def test_results_that_cannot_be_of_the_model_are_refused(
    counted, tmp_path, caplog, config, model_type, settings, message
):
    folder = tmp_path / "model"
    save_config(folder, build_config() if config == "ta_llava" else build_llava_config())
    (folder / "results.json").write_text(evaluation(model_type, settings))
    with pytest.raises(ValueError, match=f"cannot be of {folder}: .*{message}"):
        write_model_card(folder, "my-model", [folder])
    assert "## Results" not in write_model_card(folder, "my-model") and message in caplog.text


@pytest.mark.parametrize("model_type", [None, "llava", "vmtc_cmai_llava"])
def test_results_of_another_model_of_its_type_are_named(counted, tmp_path, model_type):
    folder, evaluated = tmp_path / "model", tmp_path / "results"
    save_config(folder, build_llava_config())
    evaluated.mkdir()
    for model, named in ((folder, ""), (tmp_path / "stock", ", of `stock`"), ("me/stock", ", of `me/stock`")):
        settings = {"visual_tokens": 36, "cmai": 0.6, "model": str(model)}
        (evaluated / "results.json").write_text(evaluation(model_type, settings))
        card = write_model_card(folder, "my-model", [evaluated])
        assert f"**easy-VQA, 2 questions, 36 visual tokens, CMAI 0.6{named}**" in section(card, "Results")
        assert [result.metric_name for result in ModelCard(card).data.eval_results] == [
            f"accuracy, 36 visual tokens, CMAI 0.6{named}"
        ]


def evaluation(model_type: str | None, settings: dict) -> str:
    """A `results.json`; those of earlier versions have no type of the model."""
    content = {
        "task": "easy-vqa",
        "scores": {"all": {"questions": 2, "accuracy": 0.5}},
        "note": "Exact match.",
        "settings": {"data": None, "num_questions": 2, **settings},
    }
    return json.dumps(content if model_type is None else {**content, "model_type": model_type})
