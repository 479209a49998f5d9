"""Model cards tell what is known of a model, and nothing else."""

import json
from dataclasses import asdict

import pytest
from conftest import SHIPPED_LLAVA, SHIPPED_MODEL, build_config, build_llava_config
from hub_server import HubServer
from huggingface_hub import ModelCard
from model_cards import count_nothing, save_config, section

from ta_llava.building.compress import compress_llava
from ta_llava.publishing.model_card import write_model_card
from ta_llava.training.recipe import DataSettings, Recipe


@pytest.fixture
def counted(monkeypatch):
    count_nothing(monkeypatch)


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
    assert "tu_ta_llava" in card and "yang2024" in card and "by the first." in card
    assert not section(card, "Results") and "No evaluation of this model" in section(card, "Limits")


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
    assert "tu_ta_llava" in card and "yang2024" in card and "by the second." in card


# Of a model with VMTC and CMAI that has no `training_summary.json`; it may have been trained with them all the same.
UNRECORDED = (
    "No training with VMTC or CMAI is recorded. If there was none, the weights are those of a model that was trained with "
    "neither."
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
