"""What the library and editors expect of a model: outputs that the Trainer can join, annotations, docstrings."""

import inspect
import typing

import pytest
import torch
from conftest import (
    batch_of,
    build_llava,
    build_model,
    llava_inputs,
    llava_prompt,
    prompt_ids,
    random_images,
)
from transformers import GenerationMixin, Trainer, TrainingArguments
from transformers.utils import TransformersKwargs

from ta_llava import (
    TaLlavaForConditionalGeneration,
    TaLlavaModel,
    VmtcCmaiLlavaForConditionalGeneration,
    VmtcCmaiLlavaModel,
)


HEADS = [TaLlavaForConditionalGeneration, VmtcCmaiLlavaForConditionalGeneration]


def batches(kind: str) -> tuple[dict, dict]:
    """A batch of one row with an image, and one without, with labels."""
    if kind == "TA-LLaVA":
        with_image = {**batch_of([prompt_ids(response=2)]), "pixel_values": random_images(1)}
        without = batch_of([prompt_ids(length=3, image=False, response=2)])
    else:
        count = 36 if kind == "LLaVA" else 9
        with_image = llava_inputs([llava_prompt(num_visual_tokens=count)], num_visual_tokens=count)
        without = llava_inputs([llava_prompt(images=0)])
    return tuple({**batch, "labels": batch["input_ids"].clone()} for batch in (with_image, without))


@pytest.mark.parametrize("kind", ["TA-LLaVA", "LLaVA", "LLaVA with VMTC and CMAI"])
@pytest.mark.parametrize("image_first", [True, False])
def test_the_trainer_joins_batches_with_and_without_an_image(kind, image_first, tmp_path):
    flags = {"use_vmtc": False, "use_cmai": False} if kind == "LLaVA" else {}
    model = build_model() if kind == "TA-LLaVA" else build_llava(**flags)
    rows = batches(kind)[:: 1 if image_first else -1]
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tmp_path, per_device_eval_batch_size=1, use_cpu=True, report_to=[], remove_unused_columns=False
        ),
        data_collator=lambda items: items[0],
        eval_dataset=list(rows),
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_rows"] == 2
    logits = seen[0].predictions
    longest = max(row["input_ids"].shape[1] for row in rows)
    assert logits.shape == (2, longest, model.config.text_config.vocab_size)
    with torch.no_grad():
        for index, row in enumerate(rows):
            expected = model(**row).logits[0]
            torch.testing.assert_close(torch.tensor(logits[index, : len(expected)]), expected)


@pytest.mark.parametrize("model_class", [*HEADS, TaLlavaModel, VmtcCmaiLlavaModel])
def test_further_arguments_are_annotated_as_the_librarys(model_class):
    for method in (model_class.forward, model_class.get_image_features):
        parameter = list(inspect.signature(method).parameters.values())[-1]
        if method is not VmtcCmaiLlavaForConditionalGeneration.get_image_features:  # hands its arguments on
            assert typing.get_args(parameter.annotation) == (TransformersKwargs,)


@pytest.mark.parametrize("model_class", HEADS)
def test_docstrings_are_where_editors_look(model_class):
    """Of every argument of ours, on hovering over what takes it."""
    vocabulary = {
        model_class: ["Args:", "config", "from_pretrained", "Example:", "generate"],
        model_class.from_pretrained: [
            "pretrained_model_name_or_path",
            "use_vmtc",
            "vmtc_num_visual_tokens",
            "use_cmai",
        ],
        model_class.generate: ["vision_features", "Returns:"],
        model_class.forward: ["Raises:", "Example:"],
    }
    if model_class is TaLlavaForConditionalGeneration:
        vocabulary[model_class.generate] += ["encoded_images"]
        vocabulary[model_class.encode_image] = ["pixel_values", "image_mask", "Returns:", "Example:"]
    else:
        vocabulary[model_class.generate] += ["num_visual_tokens", "cmai_max_ratio"]
    for documented, words in vocabulary.items():
        docstring = documented.__doc__
        assert all(word in docstring for word in words), documented
    names = list(inspect.signature(model_class.forward).parameters)[1:-1]
    lines = [line.strip() for line in model_class.forward.__doc__.splitlines()]
    described = {
        name for line in lines if "(`" in line or "([`" in line or "(*" in line for name in names if name in line
    }
    assert described == set(names)


@pytest.mark.parametrize("model_class", HEADS)
def test_generate_is_the_librarys(model_class, monkeypatch):
    """Whatever it is given, by place or by name, reaches the library as it is."""
    given = []
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, *args, **kwargs: given.append((args, kwargs)))
    model = build_model() if model_class is TaLlavaForConditionalGeneration else build_llava()
    model.generate("inputs", "config", "processors", streamer="streamer")
    model.generate(input_ids="ids", max_new_tokens=3)
    assert given == [
        (("inputs", "config", "processors"), {"streamer": "streamer"}),
        ((None, None), {"input_ids": "ids", "max_new_tokens": 3}),
    ]


def test_settings_that_were_loaded_with_do_not_hide_arguments_of_generate(tmp_path):
    """The library hands the arguments of `from_pretrained` to the generation config too."""
    flags = {"use_cmai": True, "cmai_max_ratio": 0.6, "use_vmtc": True, "vmtc_num_visual_tokens": 9}
    build_llava().save_pretrained(tmp_path)
    model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(tmp_path, **flags)
    assert not vars(model.generation_config).keys() & flags.keys()
    assert VmtcCmaiLlavaModel.from_pretrained(tmp_path, **flags).config.use_cmai  # a model that does not generate
    inputs = llava_inputs([llava_prompt(num_visual_tokens=9)], num_visual_tokens=9)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        model.generate(**inputs, cmai_max_ratio=1.5, max_new_tokens=2)


def test_a_setting_that_is_made_on_an_attention_module_is_made_on_the_config():
    model = build_llava()
    attention = model.model.language_model.layers[0].self_attn
    attention.config.attention_dropout = 0.5
    assert model.config.text_config.attention_dropout == 0.5
