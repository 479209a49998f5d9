import itertools

import numpy as np
import pytest
import torch
from train_ta_llava_tiny import (
    PATCH_SIZE,
    ChatDataset,
    PatchDataset,
    build_config,
    build_processor,
    caption_items,
    compute_features,
    question_items,
    run_stage,
    text_items,
    trainable,
)

from ta_llava import TaLlavaForConditionalGeneration, VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration
from ta_llava.data.easy_vqa import Scene, load_easy_vqa


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return load_easy_vqa("train")[:12]


@pytest.fixture(scope="module")
def small_processor(scenes):
    return build_processor(scenes, num_prefix_tokens=4, max_length=512)


def test_text_comes_back_from_the_tokenizer(small_processor):
    tokenizer = small_processor.tokenizer
    messages = [
        {"role": "user", "content": "What color is  the shape?"},
        {"role": "assistant", "content": "a blue rectangle"},
    ]
    text = small_processor.apply_chat_template(messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert (
        tokenizer.decode(ids, skip_special_tokens=True) == "user\nwhat color is the shape?\nmodel\na blue rectangle\n"
    )


def test_patch_labels_follow_the_shape(scenes, small_processor):
    """Mirrored and shifted, a shape keeps its patches: where it lies there is its label, elsewhere background."""
    dataset = PatchDataset(scenes, small_processor.image_processor)
    for _, index in itertools.product(range(5), range(len(scenes))):
        pixels, mask, color, shape = dataset[index]
        batch = dataset.collate([(pixels, mask, color, shape)])
        covered = mask.reshape(8, PATCH_SIZE, 8, PATCH_SIZE).mean(axis=(1, 3)).flatten()
        for name, label in (("colors", color), ("shapes", shape)):
            labels = batch[name][0].numpy()
            assert (labels[covered == 0] == 0).all()
            assert (labels[covered >= 0.1] == label).all()
            assert (labels[(covered > 0) & (covered < 0.1)] == -100).all()
        background = np.median(pixels[~mask], axis=0)
        assert np.array_equal(mask, (np.abs(pixels.astype(int) - background) > 24).any(axis=-1))


def test_labels_are_the_answer_alone(scenes, small_processor):
    dataset = ChatDataset([("is there a circle?", "no", 0), ("is there a circle?", "no", None)], small_processor)
    with_image, without = dataset[0], dataset[1]
    tokens = small_processor.tokenizer.convert_ids_to_tokens(with_image["input_ids"])
    expected = "user \n is ▁there ▁a ▁circle ? <end_of_turn> \n <start_of_turn> model \n no <end_of_turn> \n"
    assert tokens == ["<image>"] * 4 + ["<bos>", "<start_of_turn>", *expected.split(" ")]
    said = [token for token, label in zip(tokens, with_image["labels"]) if label != -100]
    assert said == ["no", "<end_of_turn>", "\n"]
    assert without["input_ids"] == with_image["input_ids"][4:] and without["labels"] == with_image["labels"][4:]


def interrupt_once(monkeypatch, dataset: ChatDataset) -> None:
    """When its fourth batch is asked for."""
    num_batches, collate = 0, dataset.collate

    def interrupted(items):
        nonlocal num_batches
        num_batches += 1
        if num_batches == 4:
            raise KeyboardInterrupt
        return collate(items)

    monkeypatch.setattr(dataset, "collate", interrupted)


def test_an_interrupted_stage_goes_on_and_a_finished_one_is_kept(scenes, small_processor, tmp_path, monkeypatch):
    """Frozen parts stay to the bit, trained ones move; the same stage again loads what it learned."""
    torch.manual_seed(0)
    model = TaLlavaForConditionalGeneration(build_config(small_processor.tokenizer))
    features = compute_features(model, scenes, small_processor.image_processor)
    assert features.shape == (len(scenes), 64, 128)
    items = question_items(scenes) + caption_items(scenes)
    dataset = ChatDataset(items, small_processor, features)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run(model: TaLlavaForConditionalGeneration, name: str = "stage") -> dict[str, torch.Tensor]:
        base = model.model
        reading = [base.multi_modal_projector, base.prefix_embedding, base.text_adapter, base.vision_adapter]
        run_stage(name, model, dataset, tmp_path, 0, 4, 8, trainable(model, [(reading, 1e-3)]))
        return {name: value.clone() for name, value in model.state_dict().items()}

    learned = run(model)
    for name, value in learned.items():
        trained = any(part in name for part in ("projector", "prefix_embedding", "adapter"))
        assert torch.equal(value, before[name]) != trained, name

    again = run(TaLlavaForConditionalGeneration(model.config))
    assert all(torch.equal(value, learned[name]) for name, value in again.items())

    with pytest.raises(ValueError, match="'steps': 4.*'steps': 5.*--output-dir"):
        run_stage("stage", model, dataset, tmp_path, 0, 5, 8, [])

    assert not list((tmp_path / "stage").glob("checkpoint-*"))

    # Cut off when the last of 4 batches is asked for: it goes on from the last checkpoint, to the same weights.
    model.load_state_dict(before)
    interrupt_once(monkeypatch, dataset)
    with pytest.raises(KeyboardInterrupt):
        run(model, "cut-off")
    assert list((tmp_path / "cut-off").glob("checkpoint-*"))
    resumed = run(TaLlavaForConditionalGeneration(model.config), "cut-off")
    assert all(torch.equal(value, learned[name]) for name, value in resumed.items())


def test_the_language_model_is_told_scenes_only_where_they_are_known(scenes):
    unknown = Scene("", [("is there a circle?", "no")])
    assert text_items([unknown]) == [("is there a circle?", "no", None)]
    assert caption_items([unknown]) == []
    told = [prompt for prompt, _, _ in text_items(scenes[:1])]
    assert "the image shows a blue rectangle. what is the blue shape?" in told


@pytest.mark.parametrize("use_cmai", [False, True])
def test_a_llava_that_was_interrupted_goes_on_with_its_weights(small_processor, tmp_path, monkeypatch, use_cmai):
    """Its checkpoints have other names for the weights than it has itself, when the library writes them."""
    config = build_config(small_processor.tokenizer)
    llava_config = VmtcCmaiLlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        use_cmai=use_cmai,
    )
    dataset = ChatDataset([("is it red?", "yes", None), ("is it blue?", "no", None)] * 16, small_processor)

    def run(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = VmtcCmaiLlavaForConditionalGeneration(llava_config)
        groups = trainable(model, [([model.model.language_model], 1e-2)])
        run_stage(name, model, dataset, tmp_path, 0, 4, 8, groups, bf16=True)
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        assert logits.dtype == torch.float32
        assert model.lm_head(torch.ones(1, 128)).dtype == torch.float32
        assert not hasattr(model, "_original_forward")
        return {name: value.clone() for name, value in model.state_dict().items()}

    learned = run("uninterrupted")
    interrupt_once(monkeypatch, dataset)
    with pytest.raises(KeyboardInterrupt):
        run("cut-off")
    resumed = run("cut-off")
    assert all(torch.equal(value, learned[name]) for name, value in resumed.items())
