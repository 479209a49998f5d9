import json
from dataclasses import asdict

import pytest
import yaml
from conftest import EXAMPLE_IMAGE, SHIPPED_LLAVA, SHIPPED_MODEL, build_config, build_llava_config
from hub_server import HubServer
from huggingface_hub import EvalResultEntry, ModelCard, close_session, parse_eval_result_entries

from ta_llava.analysis.cost import Cost
from ta_llava.building.compress import compress_llava
from ta_llava.evaluation.evaluate import evaluate
from ta_llava.publishing import licences, model_card
from ta_llava.publishing.model_card import (
    find_card,
    is_unedited,
    pin_revision,
    pinned_revision,
    write_eval_results,
    write_model_card,
)
from ta_llava.training.recipe import DataSettings, Recipe


@pytest.fixture
def counted(monkeypatch):
    """For tests that are about other things: counting takes seconds."""
    parts = {"vision tower": 1_000, "projector": 200, "language model": 30_000}
    monkeypatch.setattr(model_card, "count_cost", lambda *_, **__: Cost(parts, {"vision tower": 5_000_000}, 49, 2_000))


def save_config(folder, config) -> None:
    """As a model that nothing else is known of."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()


def save_training(folder, start, **settings) -> None:
    """The summary that training leaves in a folder."""
    recipe = Recipe(
        model=str(start),
        output_dir=str(folder),
        train=["projector", "language_model"],
        global_batch_size=64,
        training_arguments={"learning_rate": 1e-3},
        **settings,
    )
    log = [{"loss": 0.5, "step": 1499}, {"train_loss": 0.123456, "step": 1500}]
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"recipe": asdict(recipe), "data": {"kept": 38575}, "log": log}
    (folder / "training_summary.json").write_text(json.dumps(summary))


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_card_of_the_shipped_model():
    card = write_model_card(SHIPPED_MODEL, "my-model")
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["ta-llava", "llava"],
    }
    assert "\n# my-model\n" in card and "**4 learned prefix tokens**" in card and "the 64 visual tokens" in card
    architecture = section(card, "Architecture")
    assert "| vision tower | CLIP, 5 layers of width 128, patches of 8 pixels | 0.86 M |" in architecture
    assert "| language model | Gemma-2, 8 layers of width 128, 75 tokens | 1.59 M |" in architecture
    assert "44 tokens in the language model" in architecture
    assert "easy-VQA" in section(card, "Training") and "eight colours" in section(card, "Limits")
    assert "tu_ta_llava" in card and "yang2024" in card and "this model is by the first." in card
    assert not section(card, "Results") and "No evaluation of it is recorded here." in card


def test_the_card_of_a_compressed_llava(tmp_path):
    compress_llava(SHIPPED_LLAVA, tmp_path / "model", 16, 0.6)
    card = write_model_card(tmp_path / "model", "my-model")
    data = ModelCard(card).data
    assert data.tags == ["vmtc", "cmai", "llava"] and data.license == "apache-2.0"
    assert "the 64 visual tokens of an image become **16**" in card and "up to **60 %**" in card
    assert "| language model | Llama, 6 layers of width 128, 75 tokens | 1.19 M |" in section(card, "Architecture")
    assert "56 tokens in the language model" in section(card, "Architecture")
    assert "load the model with `AutoModelForImageTextToText`" in section(card, "Use it")
    assert UNRECORDED in section(card, "Training")
    assert "tu_ta_llava" in card and "yang2024" in card and "this model is by the second." in card


# Of a model with VMTC and CMAI that has no `training_summary.json`; it may have been trained with them all the same.
UNRECORDED = (
    "No training of it with VMTC or CMAI is recorded: unless there was some, its weights are those of a model that was "
    "trained with neither."
)


@pytest.mark.parametrize(
    ("config", "training"),
    [
        (build_config(), ""),
        (build_llava_config(use_vmtc=False, use_cmai=False), ""),
        (build_llava_config(), UNRECORDED),
    ],
)
def test_nothing_is_invented_of_a_model_that_records_nothing(config, training, counted, tmp_path):
    save_config(tmp_path / "model", config)
    card = write_model_card(tmp_path / "model", "my-model")
    assert set(ModelCard(card).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert section(card, "Training").strip() == training and not section(card, "Results")
    assert "easy-VQA" not in card and "Apache-2.0. For the weights" in section(card, "Licence")
    assert ("**VMTC** is on" in card) == ("**CMAI** is on" in card) == bool(training)
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, tmp_path / "home")
        ModelCard(card).validate()
        assert [request.path for request in hub.requests] == ["/api/validate-yaml"]


@pytest.mark.parametrize(
    ("vision", "text", "base", "models", "licence"),
    [
        ("openai/clip-vit", "google/gemma-2-2b-it", None, ["openai/clip-vit", "google/gemma-2-2b-it"], "gemma"),
        ("", "lmsys/vicuna-7b-v1.5", "llava-hf/llava-1.5-7b-hf", ["llava-hf/llava-1.5-7b-hf"], "llama2"),
        ("", "google/gemma-7b", None, ["google/gemma-7b"], "gemma"),
        ("", "google/gemma-3-270m-it", None, ["google/gemma-3-270m-it"], "gemma"),
        (
            "",
            "google/gemma-4-E2B-it",
            None,
            ["google/gemma-4-E2B-it"],
            None,
        ),  # Apache-2.0, so this pattern is not for it
        ("", "meta-llama/Meta-Llama-3-8B", None, ["meta-llama/Meta-Llama-3-8B"], "llama3"),
        ("", "meta-llama/Llama-3.1-8B", None, ["meta-llama/Llama-3.1-8B"], "llama3.1"),
        ("", "lmsys/vicuna-7b-v1.1", None, ["lmsys/vicuna-7b-v1.1"], None),
        ("here/tower", "/home/me/gemma", "./google/gemma-2-2b-it", None, None),  # folders of this machine
        ("here/gone", "google/gemma/2", None, None, None),
    ],
)
def test_base_models_and_licences(vision, text, base, models, licence, counted, tmp_path, monkeypatch):
    config = build_config()
    config.vision_config._name_or_path, config.text_config._name_or_path = vision, text
    if base is not None:
        config.base_model_name_or_path = base
    (tmp_path / "here" / "tower").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    save_config(tmp_path / "model", config)
    card = write_model_card(tmp_path / "model", "my-model")
    data = ModelCard(card).data
    assert (data.base_model, data.license) == (models, licence)
    for name in models or ():
        assert f"[{name}](https://huggingface.co/{name})" in section(card, "Training")
    # Who passes the weights on must say so, and where the terms are.
    terms = {
        "gemma": (
            "https://ai.google.dev/gemma/terms",
            "provided under and subject to the Gemma Terms of Use found at",
        ),
        "llama2": ("https://ai.meta.com/llama/license/", "Llama 2 is licensed under the LLAMA 2 Community License"),
        "llama3": (
            "https://www.llama.com/llama3/license/",
            "Built with Meta Llama 3. Meta Llama 3 is licensed under the",
        ),
        "llama3.1": (
            "https://www.llama.com/llama3_1/license/",
            "Built with Llama. Llama 3.1 is licensed under the Llama 3.1",
        ),
    }
    link, notice = terms.get(licence, ("", ""))
    assert f"[`{licence}`]({link}) holds for them." in card if link else "holds for them" not in card
    assert notice in section(card, "Licence")


def test_all_phases_of_training(counted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "runs" / "phase1", tmp_path / "runs" / "phase2"
    save_config(second, build_config())
    save_training(first, "me/start", data=DataSettings(path="someone/captions"))
    save_training(second, first, data=DataSettings(path="data/set/questions.json"), lora={"r": 4})
    card = write_model_card(second, "my-model")
    data = ModelCard(card).data
    assert (data.datasets, data.base_model) == (["someone/captions"], ["me/start"])
    rows = [line for line in section(card, "Training").splitlines() if line.startswith("| phase")]
    link = "[someone/captions](https://huggingface.co/datasets/someone/captions)"
    assert rows[1:] == [
        f"| phase1 | projector, language model | {link} | 38,575 | 64 | 1,500 | 0.001 | 0.123 |",
        "| phase2 | projector, language model (LoRA) | questions.json | 38,575 | 64 | 1,500 | 0.001 | 0.123 |",
    ]
    # Where it was not written, what it calls a model or data may have been a folder.
    first.rename(tmp_path / "moved")
    save_config(tmp_path / "other", build_config())
    (tmp_path / "moved" / "training_summary.json").rename(tmp_path / "other" / "training_summary.json")
    card = write_model_card(tmp_path / "other", "my-model")
    data = ModelCard(card).data
    assert data.datasets is None and data.base_model is None and "| captions |" in card
    (tmp_path / "other" / "training_summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"training_summary\.json is not as `ta-llava train` writes it"):
        write_model_card(tmp_path / "other", "my-model")


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_training_that_leads_back_to_itself_ends(names, counted, tmp_path):
    for name, start in zip(names, [*names[1:], names[0]]):
        save_training(tmp_path / name, tmp_path / start, data=DataSettings(path="questions.json"))
    save_config(tmp_path / "a" / "config", build_config())
    (tmp_path / "a" / "config" / "config.json").rename(tmp_path / "a" / "config.json")
    training = section(write_model_card(tmp_path / "a", "my-model"), "Training")
    assert [line[2] for line in training.splitlines() if line[4:].startswith("| projector")] == names[::-1]


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


def test_each_licence_has_its_terms():
    assert set(licences._LICENCES.values()) == licences.LICENCE_TERMS.keys()


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


def test_a_card_knows_whether_it_was_edited(counted, tmp_path):
    save_config(tmp_path / "model", build_config())
    card = write_model_card(tmp_path / "model", "my-model")
    pinned = pin_revision(card, "me/my-model", "0" * 40)
    assert 'repo, revision = "me/my-model", "' + "0" * 40 + '"\n' in pinned
    assert is_unedited(card) and is_unedited(pinned) and is_unedited(str(ModelCard(pinned)))
    assert pinned_revision(pinned, "me/my-model") == "0" * 40
    assert pinned_revision(pinned, "me/another") is None and pinned_revision(card, "my-model") is None
    assert is_unedited(pinned.replace("\n", "\r\n"))
    for edited in (
        card.replace("## Limits", "## Limitations"),
        card.replace("transformers", "diffusers", 1),
        "",
        "mine",
    ):
        assert not is_unedited(edited)
    (tmp_path / "model" / "README.md").write_text(card)
    assert find_card(tmp_path / "model") == card and find_card(tmp_path) is None


def test_a_hub_that_does_not_answer_has_no_card(tmp_path, monkeypatch, caplog):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.add("alice/model", {"README.md": "mine"})
        hub.add("alice/other", {"README.md": "mine"})
        hub.add("alice/blank", {})
        assert find_card("alice/model") == "mine" and find_card("alice/blank") is None and not caplog.text
    close_session()  # whose connection is open still
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # before it tries again
    assert find_card("alice/model") == "mine"  # it was downloaded before
    assert find_card("alice/other") is None and "The README.md of alice/other cannot be downloaded now" in caplog.text
