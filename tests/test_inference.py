import json
import shutil
import sys

import pytest
import torch
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT, SHIPPED_MODEL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from ta_llava.building.compress import compress_llava
from ta_llava.common.loading import config_of
from ta_llava.common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ta_llava.inference import answer, load
from ta_llava.publishing.merge import merge_adapter


@pytest.fixture(scope="module")
def shipped():
    return load()


RED_CIRCLE = ROOT / "examples" / "red_circle.png"
QUESTIONS = [
    ([EXAMPLE_IMAGE], "what color is the shape?"),
    ([RED_CIRCLE], "what color is the shape?"),
    ([EXAMPLE_IMAGE], "what shape is in the image?"),
    ([RED_CIRCLE], "describe the image."),
    ([RED_CIRCLE], "is there not a triangle in the image?"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_do_not_depend_on_the_batch(shipped, batch_size):
    answers = list(answer(*shipped, QUESTIONS, batch_size=batch_size))
    assert answers == ["teal", "red", "triangle", "a red circle", "yes"]


def test_answers_come_as_they_are_found(shipped):
    """What was answered before a bad image is not lost."""
    answers = answer(*shipped, [*QUESTIONS[:2], ([FIXTURES / "none.png"], "what?")], batch_size=1)
    assert next(answers) == "teal"
    assert next(answers) == "red"
    with pytest.raises(ValueError, match="none.png"):
        next(answers)


# What a generation_config.json may say that makes an answer another one than the greedy one, or more than one.
NOT_GREEDY = [
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 4, "length_penalty": 50.0},
    {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2},
    {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1},
    {"guidance_scale": -3.0},
    {"sequence_bias": [[[20], 1e9]], "exponential_decay_length_penalty": [0, 1e9]},
    {"watermarking_config": {"bias": 1e9}},
    {"prompt_lookup_num_tokens": 2},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"return_dict_in_generate": True, "output_scores": True},
    {"dola_layers": "low"},
    {"constraints": []},
    {"force_words_ids": [[20]]},
    {"assistant_early_exit": 1},
    {"encoder_repetition_penalty": 50.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"min_new_tokens": 5, "min_length": 80},
    {"max_time": 1e-9},
    {"stop_strings": ["a"]},
    {"token_healing": True},
    {"prefill_chunk_size": 4},
]


@pytest.mark.parametrize("model", [DEFAULT_MODEL, DEFAULT_LLAVA])
def test_answers_are_greedy_whatever_the_checkpoint_generates_by(model):
    loaded, processor = load(model)
    stock = loaded.generation_config
    expected = list(answer(loaded, processor, QUESTIONS))
    for settings in NOT_GREEDY:
        loaded.generation_config = GenerationConfig(**{**stock.to_dict(), **settings})
        assert list(answer(loaded, processor, QUESTIONS)) == expected, settings


def test_a_checkpoint_says_which_tokens_are_never_written(shipped):
    """And which end an answer: these belong to the model."""
    model, processor = shipped
    stock = model.generation_config
    token = processor.tokenizer("teal", add_special_tokens=False)["input_ids"][0]
    settings = {**stock.to_dict(), "suppress_tokens": [*(stock.suppress_tokens or []), token]}
    model.generation_config = GenerationConfig(**settings)
    try:
        assert list(answer(model, processor, QUESTIONS[:1])) != ["teal"]
    finally:
        model.generation_config = stock


def test_images_in_memory(shipped):
    with Image.open(RED_CIRCLE) as image:
        assert list(answer(*shipped, [([image], "what shape is present?")])) == ["circle"]


def test_an_empty_question_is_refused_before_any_work(shipped):
    with pytest.raises(ValueError, match="is empty"):
        next(answer(*shipped, [*QUESTIONS, ([RED_CIRCLE], " ")]))


@pytest.mark.parametrize(
    "flags", [{}, {"num_visual_tokens": 16}, {"cmai_max_ratio": 0.6}, {"num_visual_tokens": 16, "cmai_max_ratio": 0.6}]
)
def test_the_shipped_llava_with_and_without_vmtc_and_cmai(flags):
    model, processor = load(DEFAULT_LLAVA, **flags)
    assert type(model).__module__.startswith("ta_llava" if flags else "transformers")  # a stock checkpoint
    assert getattr(model.config, "use_vmtc", False) == ("num_visual_tokens" in flags)
    assert getattr(model.config, "use_cmai", False) == ("cmai_max_ratio" in flags)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert list(answer(model, processor, QUESTIONS[:1])) == ["teal"]
    text = len(processor.tokenizer(QUESTIONS[0][1])["input_ids"])
    assert seen[0] - flags.get("num_visual_tokens", 64) in range(text, text + 12)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (DEFAULT_MODEL, {"num_visual_tokens": 16}, "'ta_llava' model; VMTC and CMAI work on 'llava'"),
        (DEFAULT_LLAVA, {"num_visual_tokens": 65}, "65"),
        (DEFAULT_LLAVA, {"cmai_max_ratio": 1.5}, "from 0 to 1, got 1.5"),
        (FIXTURES, {"cmai_max_ratio": 0.5}, "no config.json"),
    ],
)
def test_flags_that_cannot_be(model, flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(model, **flags)
    assert str(caught.value).count(str(model)) <= 1


def test_flags_that_are_not_given_are_as_the_config_says(tmp_path):
    compress_llava(DEFAULT_LLAVA, tmp_path / "out", 32, 0.9)
    for flags, expected in (
        ({"num_visual_tokens": 16}, (True, 16, True, 0.9)),
        ({"cmai_max_ratio": 0.5}, (True, 32, True, 0.5)),
        ({"cmai_max_ratio": 0}, (True, 32, False, 0.9)),
    ):
        model, processor = load(tmp_path / "out", **flags)
        config = model.config
        assert (config.use_vmtc, config.vmtc_num_visual_tokens, config.use_cmai, config.cmai_max_ratio) == expected
        assert list(answer(model, processor, QUESTIONS[:1])) == ["teal"]


@pytest.fixture
def adapter(request, tmp_path):
    """A LoRA adapter that changes what the model it names says."""
    from peft import LoraConfig, get_peft_model

    base, _ = load(request.param)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    named = {**json.loads(settings.read_text()), "base_model_name_or_path": str(request.param)}
    settings.write_text(json.dumps(named))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("adapter", "flags"),
    [
        (DEFAULT_MODEL, {}),
        (DEFAULT_LLAVA, {}),
        (DEFAULT_LLAVA, {"num_visual_tokens": 16, "cmai_max_ratio": 0.6}),
    ],
    indirect=["adapter"],
)
def test_an_adapter_is_loaded_as_the_model_it_is_merged_into(adapter, flags, tmp_path):
    merge_adapter(adapter, tmp_path / "merged")
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model, processor = load(adapter, **flags)
    expected, without = (load(folder, **flags)[0] for folder in (tmp_path / "merged", base))
    assert type(model) is type(expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, expected.state_dict()[name], atol=2e-3, rtol=2e-3
        )  # half precision on the disk
        changes = "language_model" in name and ("q_proj" in name or "v_proj" in name)
        assert torch.equal(value, without.state_dict()[name]) != changes
    assert len(list(answer(model, processor, QUESTIONS[:2]))) == 2


@pytest.mark.parametrize("adapter", [DEFAULT_MODEL], indirect=True)
def test_an_adapter_that_cannot_be_loaded_says_what_to_do(adapter, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=f"{adapter} is an adapter, not a model. .*: `ta-llava merge {adapter} OUT`"):
        config_of(adapter)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=f"which needs peft: .*`ta-llava merge {adapter} OUT`"):
            load(adapter)
    settings = adapter / "adapter_config.json"
    moved = {**json.loads(settings.read_text()), "base_model_name_or_path": str(tmp_path / "moved")}
    settings.write_text(json.dumps(moved))
    with pytest.raises(
        ValueError, match=f"is an adapter of {tmp_path / 'moved'}: There is no folder .* --model MODEL"
    ):
        load(adapter)


def test_loading_from_nowhere():
    with pytest.raises(ValueError, match="No model could be loaded"):
        load(FIXTURES)


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


@pytest.mark.parametrize("file", [*FILES, "chat_template.jinja"])
def test_a_folder_with_a_missing_file(tmp_path, file):
    """The message names the folder; the command line shows it instead of a traceback."""
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=r"from '.*model'|in '.*model' has no"):
        load(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_folder_with_a_damaged_file(tmp_path, file):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="No model could be loaded"):
        load(folder)


def test_a_config_that_does_not_fit_the_weights(tmp_path):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("num_prefix_tokens", 5), ("adapter_interval", 1), ("adapter_interval", "x")):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match="No model could be loaded"):
            load(folder)


def copy_without(folder, source, *parts: str) -> int:
    """A copy of a checkpoint that lacks the weights of some parts; returns how many."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py"))
    weights = load_file(source / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not any(part in name for part in parts)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return len(weights) - len(kept)


@pytest.mark.parametrize(
    ("source", "parts", "flags"),
    [
        (DEFAULT_MODEL, ["multi_modal_projector", "vision_adapter"], {}),
        (DEFAULT_LLAVA, ["multi_modal_projector"], {}),
        (DEFAULT_LLAVA, ["multi_modal_projector"], {"num_visual_tokens": 16}),
    ],
)
def test_missing_weights_are_not_made_up(tmp_path, source, parts, flags):
    count = copy_without(tmp_path / "model", source, *parts)
    with pytest.raises(ValueError, match=rf"model lacks {count} weights, such as '.*{parts[0]}.*random ones"):
        load(tmp_path / "model", **flags)


def test_more_layers_than_there_are_weights_for(tmp_path):
    folder = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks \d+ weights, such as 'model.language_model.layers.8"):
        load(folder)


@pytest.mark.parametrize("model", [DEFAULT_MODEL, DEFAULT_LLAVA])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            {"size": {"height": 60000, "width": 64}},
            "`size` of `image_processor` has 60000, but no model has more than",
        ),
        ({"size": {"shortest_edge": 60000}}, "`size` of `image_processor` has 60000, but"),
        (
            {"do_center_crop": True, "crop_size": {"height": 64, "width": 60000}},
            "`crop_size` of `image_processor` has",
        ),
    ],
)
def test_images_of_a_size_that_no_model_has(tmp_path, model, size, message):
    folder = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"].update(size)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    for flags in ({}, {"num_visual_tokens": 16}) if model == DEFAULT_LLAVA else ({},):
        with pytest.raises(ValueError, match=message):
            load(folder, **flags)


@pytest.mark.parametrize(
    ("model", "field"), [(DEFAULT_MODEL, "num_prefix_tokens"), (DEFAULT_LLAVA, "num_additional_image_tokens")]
)
def test_placeholders_that_no_model_has(tmp_path, model, field):
    folder = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**settings, field: 10**9}))
    with pytest.raises(ValueError, match=f"`{field}` of `processor` is 1000000000, but no model has more than 10000"):
        load(folder, **({} if model == DEFAULT_MODEL else {"num_visual_tokens": 16}))
