"""VMTC and CMAI in LLaVA, LLaVA-NeXT and LLaVA-OneVision: what is the same in all families, and what views add."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import BOS, EOS, IMAGE, PAD, VOCAB, batch_of, random_tokens, run_without_the_package
from families import (
    FAMILIES,
    PINPOINTS,
    ROWS,
    STOCK,
    VIDEO,
    VIEWS,
    build,
    build_processor,
    build_stock,
    inputs_of,
    ours,
    pictures_of,
)
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, DynamicCache, StaticCache

from ta_llava.image_views import count_packed_tokens
from ta_llava.inference import compile_model


OFF = {"use_vmtc": False, "use_cmai": False}
# A budget for each view, and one for all views of a picture
BUDGETS = [(family, {}) for family in FAMILIES] + [(family, {"vmtc_total_visual_tokens": 20}) for family in VIEWS]
SIZES = [(24, 24), (30, 60), (60, 15), (15, 60), (7, 5), (10, 20000), (20000, 10), (48, 48), (100, 26)]


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def generate(model, inputs, **kwargs):
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    arguments["suppress_tokens"] = [IMAGE, VIDEO]
    return model.generate(**inputs, **{**arguments, **kwargs})


# --- loading and equality with the stock models --------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock model of each family, the folder it was saved to, and one with the other spelling of the keys."""
    found = {}
    for family in FAMILIES:
        model = build_stock(family)
        folder, other = (tmp_path_factory.mktemp(f"{family}{name}") for name in ("", "-other"))
        model.save_pretrained(folder)
        model.config.save_pretrained(other)
        save_file(
            {name: value.clone().contiguous() for name, value in model.state_dict().items()},
            other / "model.safetensors",
            {"format": "pt"},
        )
        assert load_file(folder / "model.safetensors").keys() != load_file(other / "model.safetensors").keys()
        found[family] = model, folder, other
    return found


@pytest.mark.parametrize("flags", [{}, {"use_vmtc": True, "vmtc_num_visual_tokens": 9, "use_cmai": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_loads_in_both_spellings_of_its_keys(family, flags, stock):
    model, *folders = stock[family]
    theirs = model.state_dict()
    for folder in folders:
        head = ours(family, "ForConditionalGeneration")
        loaded, info = head.from_pretrained(folder, output_loading_info=True, **flags)
        assert not any(info.values()), info
        assert loaded.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
        base, info = ours(family, "Model").from_pretrained(folder, output_loading_info=True, **flags)
        assert not info["missing_keys"]
        assert torch.equal(base.language_model.embed_tokens.weight, model.model.language_model.embed_tokens.weight)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_both_flags_off_it_is_the_stock_model(family, stock):
    theirs, folder, _ = stock[family]
    model = ours(family, "ForConditionalGeneration").from_pretrained(folder).eval()
    inputs = inputs_of(theirs)
    assert torch.equal(model(**inputs).logits, theirs(**inputs).logits)
    static = {"cache_implementation": "static", "disable_compile": True}
    for kwargs in ({"num_beams": 2}, {"use_cache": False}, {"do_sample": True}, static):
        assert torch.equal(generate(model, inputs, **kwargs), generate(theirs, inputs, **kwargs))
    for rows in ([[size] for size in SIZES], [ROWS[0]], [[]]):  # each shape, a single row, and no picture
        several = inputs_of(theirs, rows, side="right")
        assert torch.equal(model(**several).logits, theirs(**several).logits)
    with torch.enable_grad():
        gradients = []
        for one in (model, copy.deepcopy(theirs)):
            loss = one.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            loss.backward()
            gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None} | {"": loss})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_image_features_take_the_arguments_of_the_stock_model_by_place(family, stock):
    theirs, folder, _ = stock[family]
    model = ours(family, "ForConditionalGeneration").from_pretrained(folder)
    pictures = pictures_of(theirs, [[(30, 60)]])
    arguments = [pictures[name] for name in ("pixel_values", "image_sizes") if name in pictures]
    expected, found = (each.get_image_features(*arguments, return_dict=True).pooler_output for each in (theirs, model))
    assert torch.equal(torch.cat(list(found)), torch.cat(list(expected)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_again_and_carries_its_code(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = inputs_of(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ours(family, "Config")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)
    assert type(AutoModel.from_pretrained(tmp_path)) is ours(family, "Model")
    file = "vmtc_cmai_patch" if family == "llava" else f"vmtc_cmai_{family}"
    assert set(model.auto_map.values()) == {
        f"{file}.{ours(family, kind).__name__}"
        for kind in ("Config", "Model", "ForConditionalGeneration", "Processor")
    }
    assert {f"{file}.py", "vmtc_cmai_mixins.py", "vmtc.py", "cmai.py"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_class_loads_what_is_off_and_refuses_what_is_on(family, tmp_path):
    build(family, **OFF).save_pretrained(tmp_path / "off")
    build(family).save_pretrained(tmp_path / "on")
    stock_class = STOCK[family][1]
    _, info = stock_class.from_pretrained(tmp_path / "off", output_loading_info=True)
    assert not any(info.values())
    with pytest.raises(Exception, match="(?s)VMTC or CMAI is on. Load the model with AutoModelForImageTextToText"):
        stock_class.from_pretrained(tmp_path / "on")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_family_is_refused(family, stock):
    for other in set(FAMILIES) - {family}:
        with pytest.raises(ValueError, match=f"is a '{other}' model; VMTC and CMAI work on '{family}'"):
            ours(family, "ForConditionalGeneration").from_pretrained(stock[other][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_initialised_as_the_stock_one(family):
    model = ours(family, "ForConditionalGeneration")(build(family, **OFF).config)
    stock_config, stock_class, _ = STOCK[family]
    fields = {name: value for name, value in model.config.to_dict().items() if hasattr(stock_config, name)}
    theirs = stock_class(stock_config(**{name: value for name, value in fields.items() if name != "model_type"}))
    for (name, parameter), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.4, abs=2e-3), name


@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_views_that_keep_all_their_tokens_have_those_of_the_stock_model(family, stock):
    theirs, folder, _ = stock[family]
    model = ours(family, "ForConditionalGeneration").from_pretrained(folder, use_vmtc=True, vmtc_num_visual_tokens=36)
    pictures = pictures_of(model, [[(48, 48)]])
    expected, actual = (each.get_image_features(**pictures).pooler_output[0] for each in (theirs, model.eval()))
    assert torch.equal(actual[:36], expected[:36])  # the whole picture
    grid = expected[36:].view(12, 13, -1)  # each row ends in a newline
    tiles = grid[:, :12].unflatten(0, (2, 6)).unflatten(2, (2, 6)).transpose(1, 2).flatten(2, 3)
    newline = grid[:1, 12]
    parts = [actual[:36], *tiles[0], newline, *tiles[1], newline]
    assert torch.equal(actual, torch.cat(parts))


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kwargs", BUDGETS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_its_rows(family, side, kwargs):
    model = build(family, **kwargs)
    inputs = inputs_of(model, side=side)
    logits = model(**inputs).logits
    generated = generate(model, inputs) if side == "left" else None
    for row, sizes in enumerate(ROWS):
        real = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row][real][None], **pictures_of(model, [sizes])}
        assert_close(logits[row][real], model(**alone).logits[0], 2e-4)
        if generated is not None:
            tokens = generate(model, alone)[0, int(real.sum()) :].tolist()
            assert generated[row, inputs["input_ids"].shape[1] :][: len(tokens)].tolist() == tokens


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 10},
    "several returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", list(MODES))
def test_every_way_to_generate_is_the_same_with_any_cache(family, mode):
    model = build(family, "gemma2" if mode == "greedy" else "llama")
    inputs = inputs_of(model)
    expected = generate(model, inputs, use_cache=False, **MODES[mode])
    assert expected.shape[1] > inputs["input_ids"].shape[1] + 1
    assert torch.equal(generate(model, inputs, **MODES[mode]), expected)
    static = generate(model, inputs, cache_implementation="static", disable_compile=True, **MODES[mode])
    assert torch.equal(static, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_logits_are_those_of_one_pass(family):
    model = build(family)
    inputs = inputs_of(model)
    new = torch.randint(10, VOCAB, (len(ROWS), 4))
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    expected = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits
    length = inputs["input_ids"].shape[1]
    for cache in (DynamicCache(), StaticCache(model.config.text_config, max_cache_len=length + 4)):
        logits = [model(**inputs, past_key_values=cache).logits]
        for start, end in ((0, 1), (1, 3), (3, 4)):
            columns = {"input_ids": new[:, start:end], "attention_mask": mask[:, : length + end]}
            logits.append(model(**columns, past_key_values=cache).logits)
        assert_close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()], 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cmai_reaches_all_image_tokens_of_a_row_and_nothing_else(family):
    model = build(family)
    inputs = inputs_of(model)
    model.set_attn_implementation("eager")
    with_cmai = model(**inputs, output_attentions=True)
    inhibited = with_cmai.attentions[-1][:, :, -1].amax(dim=1) == 0
    is_image = inputs["input_ids"] == IMAGE
    assert not (inhibited & ~is_image & inputs["attention_mask"].bool()).any()
    for row in range(len(ROWS)):
        num_images = int(is_image[row].sum())
        lowest = math.ceil((num_images - 1) * 0.6 - 1e-3) if num_images else 0
        assert int((inhibited[row] & is_image[row]).sum()) == lowest
    model.config.use_cmai = False
    without = model(**inputs).logits
    assert (with_cmai.logits - without)[[0, 1, 3], -1].abs().amax(-1).min() > 1e-3
    text = inputs["attention_mask"][2].bool()
    assert_close(with_cmai.logits[2][text], without[2][text])


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_is_greedy_decoding(family):
    model = build(family)
    inputs = inputs_of(model, [[(30, 60)]])
    helper = copy.deepcopy(model)
    with torch.no_grad():
        helper.lm_head.weight.add_(0.3 * torch.randn(helper.lm_head.weight.shape))
    expected = generate(model, inputs, max_new_tokens=12)
    assert torch.equal(generate(model, inputs, max_new_tokens=12, assistant_model=helper), expected)
    assert torch.equal(generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_eager_and_sdpa_agree(family):
    model = build(family)
    inputs = inputs_of(model)
    default = model(**inputs).logits
    model.set_attn_implementation("eager")
    real = inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[real], default[real], 2e-4)


def test_compiled_answers_are_the_same():
    model, compiled = build("llava_next"), compile_model(build("llava_next"), backend="eager")
    for rows in ([[(48, 48)]], [[(30, 60)]]):  # without padding, and with it
        inputs = inputs_of(model, rows)
        expected = generate(model, inputs)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generate(compiled, inputs, **static), expected)
    total = build("llava_next", vmtc_total_visual_tokens=20)
    for refuse in (lambda: compile_model(total, backend="eager"), lambda: generate(compiled, inputs)):
        with pytest.raises(ValueError, match="`vmtc_total_visual_tokens` is 20, but a compiled vision tower"):
            refuse()
        compiled.config.vmtc_num_visual_tokens, compiled.config.vmtc_total_visual_tokens = None, 20


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kwargs", BUDGETS)
def test_gradients_are_the_same_with_checkpointing(family, kwargs):
    gradients = []
    for checkpointing in (False, True):
        model = build(family, **kwargs).train()
        inputs = inputs_of(model.eval(), side="right")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels = labels.masked_fill(labels == IMAGE, -100)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    unused = ["post_layernorm", "k_proj.bias"]  # the biases of keys have no effect
    if family != "llava_onevision":
        unused.append("vision_tower.encoder.layers.4")  # after the hidden state that is used
    for name, _ in model.named_parameters():
        if not any(part in name for part in unused):
            assert gradients[0][name].abs().sum() > 0, name
            assert_close(gradients[1][name], gradients[0][name])
    assert all(torch.isfinite(gradient).all() for gradient in gradients[0].values())


@pytest.mark.parametrize("flags", [{}, OFF], ids=["on", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_an_image_gives_what_reads_images_gradients_of_zero(family, flags):
    model = build(family, **flags)
    batch = batch_of([[BOS, *random_tokens(6, 1)], [BOS, *random_tokens(3, 2)]], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batch, labels=labels)
    model.train()
    outputs = model(**batch, labels=labels, use_cache=False)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
    outputs.loss.backward()
    readers = {
        name: p.grad for name, p in model.named_parameters() if "language_model" not in name and "lm_head" not in name
    }
    assert any("multi_modal_projector" in name for name in readers)
    assert (family in VIEWS) == any("image_newline" in name for name in readers)
    without = {name for name, gradient in readers.items() if gradient is None}
    assert all("encoder.layers.4" in name or "post_layernorm" in name for name in without), without
    assert not any(gradient.any() for gradient in readers.values() if gradient is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_language_model_trains_and_leaves_the_rest(family):
    peft = pytest.importorskip("peft")
    model = build(family)
    inputs = inputs_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    wrapped = peft.get_peft_model(model.train(), config)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B starts at zero, and A moves only after it
        optimizer.zero_grad()
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            assert parameter.abs().sum() > 0
        else:
            short = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[short]), name
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        torch.testing.assert_close(wrapped.merge_and_unload()(**inputs).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_half_precision(family):
    model = build(family).to(torch.bfloat16)
    inputs = inputs_of(build(family))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_a_budget_for_views_may_be_set_for_a_call_or_for_good(family):
    model = build(family, vmtc_total_visual_tokens=20)
    pictures = pictures_of(model, [[(30, 60)]])
    assert len(model.get_image_features(**pictures).pooler_output[0]) == 20 + 1
    fewer = model.get_image_features(**pictures, num_visual_tokens=4).pooler_output[0]
    assert len(fewer) == 3 * 4 + 1
    with pytest.raises(ValueError, match="are 21 visual tokens"):
        model(input_ids=torch.tensor([[BOS, IMAGE, 20]]), **pictures)
    model.set_visual_budget(4)
    assert torch.equal(model.get_image_features(**pictures).pooler_output[0], fewer)
    model.config.vmtc_num_visual_tokens = None
    for size, message in (((30, 60), "20 visual tokens|is 2, but a picture has 3 views"), ((7, 5), "is 2, but")):
        model.config.vmtc_total_visual_tokens = 2
        with pytest.raises(ValueError, match=message):
            model.get_image_features(**pictures_of(model, [[size]]))
    model.config.vmtc_total_visual_tokens = None
    with pytest.raises(ValueError, match="The budget is 37 visual tokens, but an image has 36 patches"):
        model.get_image_features(**pictures, num_visual_tokens=37)
    model.config.use_vmtc = False
    with pytest.raises(ValueError, match="`num_visual_tokens` is 4, but `use_vmtc` is off"):
        model.get_image_features(**pictures, num_visual_tokens=4)


@pytest.mark.parametrize("family", VIEWS)
def test_a_picture_has_one_budget(family, tmp_path):
    both = (
        "(?s)`vmtc_num_visual_tokens` is 9 for each view, but `vmtc_total_visual_tokens` is 20 .*the other to `None`"
    )
    with pytest.raises(StrictDataclassError, match=both):
        build(family, vmtc_num_visual_tokens=9, vmtc_total_visual_tokens=20)
    with pytest.raises(ValueError, match=both):
        build_processor(family, use_vmtc=True, vmtc_num_visual_tokens=9, vmtc_total_visual_tokens=20)
    model = build(family, vmtc_total_visual_tokens=20)
    processor = build_processor(family, use_vmtc=True, vmtc_total_visual_tokens=20)
    model.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=both):
        type(model).from_pretrained(tmp_path, vmtc_num_visual_tokens=9)
    each = type(model).from_pretrained(tmp_path, vmtc_num_visual_tokens=9, vmtc_total_visual_tokens=None)
    pictures = pictures_of(model, [[(30, 60)]])
    assert len(each.get_image_features(**pictures).pooler_output[0]) == 3 * 9 + 1
    model.config.vmtc_num_visual_tokens = processor.vmtc_num_visual_tokens = 9  # set later
    for call in (
        lambda: model.get_image_features(**pictures),
        lambda: processor(images=picture((30, 60)), text="<image> a"),
    ):
        with pytest.raises(ValueError, match=both):
            call()
    assert len(model.get_image_features(**pictures, num_visual_tokens=4).pooler_output[0]) == 3 * 4 + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_of_pictures_says_what_to_do_with_a_video(family):
    processor = build_processor(family)
    remedy = "`LlavaOnevisionProcessor`.*frames" if family == "llava_onevision" else "Pass the frames"
    with pytest.raises(ValueError, match=f"{type(processor).__name__} does not read `videos`. .*{remedy}"):
        processor(text="<video> a", videos=np.zeros((2, 24, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_what_views_cannot_have_is_refused(family):
    model = build(family)
    pictures = pictures_of(model, [[(30, 60)]])
    strategy = "full" if family == "llava_next" else "default"
    with pytest.raises(ValueError, match=f'`vision_feature_select_strategy` is "{strategy}"'):
        model.get_image_features(**pictures, vision_feature_select_strategy=strategy)
    with pytest.raises(ValueError, match="says that 1 pictures have 3 views"):
        model.get_image_features(**{**pictures, "pixel_values": pictures["pixel_values"][:, :2]})
    with pytest.raises(ValueError, match="`pixel_values` holds 2 pictures, but `image_sizes` 1"):
        model.get_image_features(**{**pictures, "pixel_values": pictures["pixel_values"].repeat(2, 1, 1, 1, 1)})
    if family == "llava_onevision":
        with pytest.raises(ValueError, match="`batch_num_images` counts 3 pictures, but `image_sizes` 1"):
            model.get_image_features(**{**pictures, "batch_num_images": torch.tensor([3])})
    placeholder = torch.tensor([[BOS, IMAGE]])
    for arguments in ({"pixel_values": pictures["pixel_values"]}, {"vision_features": torch.randn(1, 9, 24)}):
        name = "image_sizes" if "pixel_values" in arguments else "has no `vision_features`"
        with pytest.raises(ValueError, match=name):
            model.generate(placeholder, **arguments, max_new_tokens=1)
    with pytest.raises(ValueError, match="`pixel_values` are given without `image_sizes`"):
        model(input_ids=torch.tensor([[BOS, IMAGE]]), pixel_values=pictures["pixel_values"])
    with pytest.raises(ValueError, match="has no `vision_features`"):
        model(input_ids=torch.tensor([[BOS, 20]]), vision_features=torch.randn(1, 9, 24))


@torch.no_grad()
def test_videos_go_through_the_librarys_pooling(stock):
    theirs, folder, _ = stock["llava_onevision"]
    flags = {"use_vmtc": True, "vmtc_num_visual_tokens": 9, "vmtc_merge_weights": "normalized"}
    model = ours("llava_onevision", "ForConditionalGeneration").from_pretrained(folder, **flags).eval()
    videos = torch.randn(1, 2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    prompt = [BOS, 20, *[VIDEO] * (2 * 9 + 1), 21, 22]
    inputs = {"input_ids": torch.tensor([prompt]), "pixel_values_videos": videos}
    expected = theirs(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(generate(model, inputs), generate(theirs, inputs))
    picture = pictures_of(model, [[(30, 60)]])
    both = {**inputs, **picture, "input_ids": torch.tensor([prompt + [IMAGE] * (27 + 1) + [23]])}
    assert_close(model(**both).logits[:, : len(prompt)], expected)
    # CMAI counts them as image tokens.
    model.config.use_cmai = True
    model.set_attn_implementation("eager")
    attended = model(**inputs, output_attentions=True).attentions[-1][0, :, -1].amax(dim=0)
    is_video = inputs["input_ids"][0] == VIDEO
    assert (attended[is_video] == 0).sum() == math.ceil(18 * 0.6 - 1e-3) and (attended[~is_video] > 0).all()


# --- processors ----------------------------------------------------------------------------------------------------


def picture(size) -> Image.Image:
    height, width = size
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", ["llava", "llava_next"])  # the stock processor of OneVision needs torchvision
def test_a_stock_processor_loads_as_it_lies(family, tmp_path):
    theirs = build_processor(family, stock=True)
    theirs.save_pretrained(tmp_path)
    processor = ours(family, "Processor").from_pretrained(tmp_path)
    text = ["<image> what is it", "a <image> b <image> c"]
    images = [[picture((30, 60))], [picture((60, 15)), picture((7, 5))]]
    expected = theirs(images=images, text=text, return_tensors="pt", padding=True)
    actual = processor(images=images, text=text, return_tensors="pt", padding=True)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    sizes = [[30, 60], [7, 5]]
    counts = [data._get_num_multimodal_tokens(sizes).num_image_tokens for data in (theirs, processor)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "flags",
    [
        OFF,
        {"use_vmtc": True, "vmtc_num_visual_tokens": 9},
        {"use_vmtc": True, "vmtc_keep_ratio": 0.4},
        {"use_vmtc": True, "vmtc_total_visual_tokens": 20},
    ],
    ids=["off", "per view", "ratio", "total"],
)
@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_the_processor_writes_as_many_placeholders_as_there_are_visual_tokens(family, flags):
    model = build(family, **{"use_vmtc": False, "vmtc_num_visual_tokens": None, **flags})
    processor = build_processor(family, **{name: value for name, value in flags.items() if name != "use_cmai"})
    for size in SIZES:
        inputs = processor(images=picture(size), text="<image> a", return_tensors="pt")
        count = int((inputs["input_ids"] == IMAGE).sum())
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]  # the model checks their number
        assert processor._get_num_multimodal_tokens([size]).num_image_tokens == [count]
        if flags.get("use_vmtc"):
            [layout] = model.model._layouts(inputs["image_sizes"])
            assert count == count_packed_tokens(layout, model.config)
    rows = [[picture((30, 60))], [picture((60, 15)), picture((50, 50))], []]
    inputs = processor(images=rows, text=["<image> a", "b <image> <image>", "c"], padding=True, return_tensors="pt")
    assert model(**inputs).logits.shape[0] == 3
    if family == "llava_onevision":  # several pictures of a prompt are not cut into tiles
        assert inputs["batch_num_images"].tolist() == [1, 2]
    chat = [{"role": "user", "content": [{"type": "image", "image": rows[0][0]}, {"type": "text", "text": "what"}]}]
    encoded = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert model(**encoded).logits.shape[0] == 1


@pytest.mark.parametrize("family", VIEWS)
def test_the_budget_of_a_processor_is_saved_and_may_be_set(family, tmp_path):
    build_processor(family, use_vmtc=True, vmtc_total_visual_tokens=20).save_pretrained(tmp_path)
    processor = ours(family, "Processor").from_pretrained(tmp_path)

    def count(**kwargs):
        return sum(
            id == IMAGE for id in processor(images=picture((30, 60)), text="<image> a", **kwargs)["input_ids"][0]
        )

    assert count() == 21
    assert count(num_visual_tokens=5) == 16
    processor.set_visual_budget(6)
    assert count() == 19
    assert processor._get_num_multimodal_tokens([[30, 60]], num_visual_tokens=3).num_image_tokens == [10]
    processor.use_vmtc = False
    with pytest.raises(ValueError, match="`num_visual_tokens` is 5, but `use_vmtc` is off"):
        count(num_visual_tokens=5)
    assert processor.image_processor.image_grid_pinpoints == PINPOINTS


SCRIPT = """
import importlib.util, sys, torch
assert importlib.util.find_spec("ta_llava") is None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (60, 30), "teal"), text="<image> a", return_tensors="pt")
with torch.no_grad():
    print(type(model).__name__, model(**inputs).logits.double().abs().sum().item())
"""


@pytest.mark.parametrize("family", VIEWS)
def test_it_loads_from_its_own_code_where_the_package_is_not_installed(family, tmp_path, python_without_the_package):
    model = build(family)
    processor = build_processor(family, use_vmtc=True, vmtc_num_visual_tokens=9)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lines = run_without_the_package(
        python_without_the_package, tmp_path, SCRIPT, "model", HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    inputs = processor(images=Image.new("RGB", (60, 30), "teal"), text="<image> a", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.double().abs().sum().item()
    name, value = lines[-1].split()
    assert name == type(model).__name__ and float(value) == pytest.approx(expected, rel=1e-6)
