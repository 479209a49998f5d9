"""Training of models whose pictures are cut into views: their sizes decide how many placeholders a sample has."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import IMAGE
from families import VIEWS, build, build_processor
from training_runs import losses

from ta_llava.data.samples import read_sample
from ta_llava.training.dataset import Collator, prepare_dataset
from ta_llava.training.encoding import SampleEncoder
from ta_llava.training.run import train


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} "
    "{% if message.role == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
BUDGETS = [
    {},
    {"use_vmtc": True, "vmtc_num_visual_tokens": 9},
    {"use_vmtc": True, "vmtc_total_visual_tokens": 20},
]


def record(folder, *images):
    question = "<image> " * len(images) + "what is it"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a b"}]
    return {"id": "x", "image": [str(folder / image) for image in images], "conversations": turns}


@pytest.mark.parametrize("budget", BUDGETS, ids=["off", "per view", "total"])
@pytest.mark.parametrize("family", VIEWS)
def test_samples_have_the_ids_that_the_processor_makes(family, budget, folder):
    processor = build_processor(family, chat_template=TEMPLATE, **budget)
    encoder, collator = SampleEncoder(processor), Collator(processor)
    model = build(family, **{"use_vmtc": False, "vmtc_num_visual_tokens": None, **budget})
    items = [
        encoder(read_sample(record(folder, *images)))
        for images in (["one.png"], ["two.png"], ["sub/three.png", "one.png"], [])
    ]
    batch = collator(items)
    text = [
        processor.apply_chat_template(
            [{"role": "user", "content": "<image> what is it"}, {"role": "assistant", "content": "a b"}]
        )
    ]
    expected = processor(images=[items[1]["images"][0]], text=text)["input_ids"][0]
    assert items[1]["input_ids"] == list(expected)
    counts = [item["input_ids"].count(IMAGE) for item in items]
    assert counts[0] != counts[1] or budget  # 40 x 30 pixels have more padding than 40 x 40
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)  # it checks the number of placeholders
    assert all((item["labels"].count(-100) == len(item["labels"]) - 3) for item in items)  # a b </s>
    assert "image_sizes" in batch and len(batch["image_sizes"]) == 4


@pytest.mark.parametrize("family", VIEWS)
def test_a_recipe_trains_it(family, recipe, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    build_processor(family, chat_template=TEMPLATE, use_vmtc=True, vmtc_num_visual_tokens=9).save_pretrained(
        tmp_path / "model"
    )
    recipe = replace(recipe, model=str(tmp_path / "model"), train=["projector", "language_model"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = train(replace(recipe, training_arguments={**recipe.training_arguments, "gradient_checkpointing": True}))
    trained = type(model).from_pretrained(folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert "model.image_newline" in changed and "lm_head.weight" in changed
    assert not any("vision_tower" in name for name in changed)
    assert losses(folder)[-1] < losses(folder)[0]
    counts = json.loads((folder / "training_summary.json").read_text())["parameters"]
    assert sum(part["trainable"] + part["frozen"] for part in counts.values()) == sum(
        p.numel() for p in model.parameters()
    )
    with pytest.raises(ValueError, match="`cache_vision_features` is not for a 'vmtc_cmai_llava"):
        train(replace(recipe, cache_vision_features=str(tmp_path / "features"), output_dir=str(tmp_path / "other")))


def test_a_changed_budget_prepares_the_data_anew(data):
    lengths = []
    for budget in BUDGETS:
        processor = build_processor("llava_next", chat_template=TEMPLATE, **budget)
        rows, _ = prepare_dataset(data.path, processor, image_folder=data.image_folder)
        lengths.append(rows[0]["length"] - rows[0]["input_ids"].count(IMAGE))
        lengths.append(rows[0]["input_ids"].count(IMAGE))
    assert len(set(lengths[::2])) == 1 and lengths[1::2] == [36 + 12 * 13, 5 * 9 + 2, 20 + 2]
