"""Fixtures of the tests of training: small recipes with their data, and processors."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sample_records import BUILDERS, build_ta_llava, save_images
from training_runs import MODEL, READING
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2ForCausalLM,
)

from ta_llava import TaLlavaProcessor
from ta_llava.building.assemble import assemble_llava
from ta_llava.training.recipe import DataSettings, Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of `datasets` for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images one.png to three.png, of one colour and different sizes each, and two files that are no images."""
    return save_images(tmp_path / "images")


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def any_processor(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def ta_llava() -> TaLlavaProcessor:
    return build_ta_llava()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataSettings:
    """Eight images of one colour each, in LLaVA's format."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for index in range(8):
        pixels = np.full((64, 64, 3), index * 30, dtype=np.uint8)
        pixels[8 : 8 + 4 * index, 8:40] = (250 - 20 * index, 10, 30 * index)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        turns = [("human", "<image>\nwhat color is the shape?"), ("gpt", ("red", "green", "blue", "black")[index % 4])]
        if index % 3 == 0:
            turns += [("human", "is there a circle in the image?"), ("gpt", "no")]
        conversations = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": f"sample-{index}", "image": f"{index}.png", "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    return DataSettings(path=str(folder / "data.json"), image_folder=str(folder))


@pytest.fixture
def recipe(data, tmp_path) -> Recipe:
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Recipe(
        model=str(MODEL),
        output_dir=str(tmp_path / "out"),
        train=READING,
        data=data,
        global_batch_size=4,
        training_arguments=arguments,
    )


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A LLaVA with VMTC and CMAI from the parts of the shipped model."""
    folder = tmp_path_factory.mktemp("llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)
    model.model.vision_tower.save_pretrained(folder / "tower")
    processor.image_processor.save_pretrained(folder / "tower")
    language_model = Gemma2ForCausalLM(model.config.text_config)
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.save_pretrained(folder / "language-model")
    processor.tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "<start_of_turn>{{ message.role if message.role == 'user' else 'model' }}\n"
        "{{ message.content }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    processor.tokenizer.save_pretrained(folder / "language-model")
    flags = {"use_vmtc": True, "vmtc_num_visual_tokens": 16, "use_cmai": True}
    assemble_llava(folder / "llava", folder / "tower", folder / "language-model", **flags)
    return folder / "llava"
