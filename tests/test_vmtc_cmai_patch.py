"""LLaVA with VMTC and CMAI: loading, equality with the stock model, generation, training, and the processor."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    EOS,
    EXAMPLE_IMAGE,
    IMAGE,
    NUM_VISUAL_TOKENS,
    PAD,
    VOCAB,
    batch_of,
    build_llava,
    build_llava_config,
    llava_inputs,
    llava_prompt,
    make_lively,
    random_tokens,
    text_config,
)
from PIL import Image
from tiny_parts import build_image_processor, build_tokenizer
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CompileConfig,
    Dinov2Config,
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    StaticCache,
)
from transformers.cache_utils import StaticLayer
from transformers.image_utils import SizeDict
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ta_llava import (
    VmtcCmaiLlavaConfig,
    VmtcCmaiLlavaForConditionalGeneration,
    VmtcCmaiLlavaModel,
    VmtcCmaiLlavaProcessor,
    vmtc_cmai_mixins,
)
from ta_llava.vmtc import count_visual_tokens


BACKBONES = ["llama", "gemma2", "gemma3", "mistral", "qwen2", "qwen3"]
OFF = {"use_vmtc": False, "use_cmai": False}


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock LLaVA and the folder it was saved to."""
    config = build_llava_config().to_dict()
    names = {name for name in config if name.startswith(("use_", "vmtc_", "cmai_", "spd_"))}
    config = LlavaConfig(**{name: value for name, value in config.items() if name not in {*names, "model_type"}})
    torch.manual_seed(0)
    model = make_lively(LlavaForConditionalGeneration(config), seed=3).eval()
    folder = tmp_path_factory.mktemp("stock")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("flags", [{}, {"use_vmtc": True, "vmtc_num_visual_tokens": 9, "use_cmai": True}])
def test_a_stock_checkpoint_loads_as_it_lies(stock, flags):
    model, folder = stock
    loaded, info = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **flags)
    assert not any(info.values()), info
    theirs = model.state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.use_cmai is bool(flags)
    base, info = VmtcCmaiLlavaModel.from_pretrained(folder, output_loading_info=True, **flags)
    assert not info["missing_keys"]
    assert torch.equal(base.language_model.embed_tokens.weight, model.model.language_model.embed_tokens.weight)


@torch.no_grad()
def test_with_both_flags_off_it_is_the_stock_model(stock):
    model, folder = stock
    loaded = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(folder).eval()
    inputs = llava_inputs(
        [llava_prompt(num_visual_tokens=36), llava_prompt(length=3, num_visual_tokens=36)], num_visual_tokens=36
    )
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(loaded.generate(**inputs, **arguments), model.generate(**inputs, **arguments))
    labels = inputs["input_ids"]
    assert torch.equal(loaded(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)


def test_what_is_saved_loads_again(tmp_path):
    model = build_llava()
    model.save_pretrained(tmp_path)
    loaded, info = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    flags = ("use_vmtc", "vmtc_num_visual_tokens", "vmtc_merge_weights", "use_cmai", "cmai_max_ratio")
    assert all(getattr(loaded.config, name) == getattr(model.config, name) for name in flags)
    inputs = llava_inputs([llava_prompt()])
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    for auto_class in (AutoModelForImageTextToText, AutoModel):
        assert type(auto_class.from_pretrained(tmp_path)).__name__.startswith("VmtcCmaiLlava")
    saved = (tmp_path / "config.json").read_text()
    assert "cmai_sdpa" not in saved
    assert "vmtc_sdpa" not in saved
    assert "vmtc_cmai_patch.VmtcCmaiLlavaForConditionalGeneration" in saved
    assert {"vmtc_cmai_patch.py", "vmtc_cmai_mixins.py", "vmtc.py", "cmai.py"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_config_survives_a_round_trip(tmp_path):
    config = build_llava_config(vmtc_layers=[1, 2], cmai_focus="sum", cmai_attention="weights", vmtc_method="merge")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is VmtcCmaiLlavaConfig
    assert loaded.vmtc_layers == [1, 2]
    for name in ("vmtc_method", "cmai_focus", "cmai_attention", "use_vmtc", "use_cmai", "vmtc_num_visual_tokens"):
        assert getattr(loaded, name) == getattr(config, name)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"cmai_max_ratio": 1.2}, "cmai_max_ratio.*must be from 0 to 1, got 1.2"),
        ({"cmai_max_ratio": -0.1}, "cmai_max_ratio.*must be from 0 to 1, got -0.1"),
        ({"cmai_discount": 0.0}, "cmai_discount.*must be above 0 and at most 1, got 0.0"),
        ({"cmai_focus": "all"}, "cmai_focus"),
        ({"cmai_attention": "logits"}, "cmai_attention"),
        ({"spd_factor": 0}, "spd_factor.*must be at least 1, got 0"),
        ({"spd_factor": 2}, "`spd_factor` is 2 and `use_vmtc` is on"),
        (
            {"vision_feature_layer": [-2, -3]},
            r"VMTC works with one `vision_feature_layer`, but the config has \[-2, -3\]",
        ),
        ({"vmtc_keep_ratio": 2.0}, "vmtc_keep_ratio.*must be above 0 and at most 1, got 2.0"),
    ],
)
def test_wrong_fields_are_named(stock, kwargs, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        build_llava_config(**kwargs)
    with pytest.raises(Exception, match=f"(?s){message}"):
        VmtcCmaiLlavaForConditionalGeneration.from_pretrained(stock[1], **{"use_vmtc": True, **kwargs})


def test_ratios_may_be_whole_numbers():
    assert build_llava_config(cmai_max_ratio=1, vmtc_keep_ratio=1, cmai_discount=1).cmai_max_ratio == 1


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    text_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'llama' model; VMTC and CMAI work on 'llava'"):
        VmtcCmaiLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_flash_attention_with_cmai_is_refused_by_name(stock):
    _, folder = stock
    with pytest.raises(ValueError, match=r'`attn_implementation="flash_attention_2"`.*Choose "sdpa" or "eager"'):
        VmtcCmaiLlavaForConditionalGeneration.from_pretrained(
            folder, use_cmai=True, attn_implementation="flash_attention_2"
        )
    model = build_llava()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='Choose "sdpa" or "eager"'):
        model(**llava_inputs([llava_prompt()]))


def test_a_new_model_is_initialised_as_the_stock_one():
    ours = VmtcCmaiLlavaForConditionalGeneration(build_llava_config(**OFF))
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            **{name: getattr(ours.config, name) for name in ("vision_config", "text_config", "image_token_index")}
        )
    )
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters()):
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.25, abs=2e-3), name


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        model = VmtcCmaiLlavaForConditionalGeneration(build_llava_config())
    assert all(parameter.is_meta for parameter in model.parameters())


# --- CMAI in the model ---------------------------------------------------------------------------------------------


def slow_logits(model, input_ids, pixel_values):
    """
    Logits of one row without padding, layer by layer from the modules of a Llama-like language model: attention of every
    pair of tokens, focus, quantile and inhibition written out from the paper.
    """
    config, lm = model.config, model.model.language_model
    is_image = [token == IMAGE for token in input_ids.tolist()]
    length, heads = len(is_image), config.text_config.num_attention_heads
    kv_heads = config.text_config.num_key_value_heads
    states = lm.embed_tokens(input_ids)
    if any(is_image):
        features = torch.cat(model.get_image_features(pixel_values).pooler_output)
        states = states.clone()
        states[torch.tensor(is_image)] = features
    cos, sin = (value[0] for value in lm.rotary_emb(states[None], torch.arange(length)[None]))
    for layer_idx, layer in enumerate(lm.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(states)
        q, k, v = (
            getattr(attention, name)(normed).unflatten(-1, (-1, 8)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k))
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        scores = q @ k.mT * 8**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        averaged = (scores if config.cmai_attention == "scores" else scores.softmax(-1)).mean(0)
        gamma = config.cmai_max_ratio * layer_idx / (len(lm.layers) - 1)
        texts = [j for j in range(length) if not is_image[j]]
        images = [i for i in range(length) if is_image[i]]
        for rank, j in enumerate(texts):
            seen = [i for i in images if i < j]
            if not seen or config.cmai_focus == "none" or not config.use_cmai:
                continue
            focus = []
            for i in seen:
                value = averaged[j, i]
                for distance, h in enumerate(reversed(texts[:rank]), start=1):
                    if h < i:
                        continue
                    weight = {
                        "focus": averaged[j, h],
                        "tia": 0.0,
                        "sum": 1.0,
                        "discounted_sum": config.cmai_discount**distance,
                    }[config.cmai_focus]
                    value = value + weight * averaged[h, i]
                focus.append(value)
            threshold = torch.quantile(torch.stack(focus), gamma)
            for i, value in zip(seen, focus):
                if value < threshold:
                    scores[:, j, i] = -math.inf
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        states = states + attention.o_proj(attended)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(lm.norm(states))


ROWS = [
    llava_prompt(length=7, seed=1),
    llava_prompt(length=4, seed=2, images=2),
    [BOS, *random_tokens(8, 3)],
    llava_prompt(length=1, seed=4),
]


def image_slices(rows):
    ends = np.cumsum([row.count(IMAGE) // NUM_VISUAL_TOKENS for row in rows])
    return [slice(end - row.count(IMAGE) // NUM_VISUAL_TOKENS, end) for row, end in zip(rows, ends)]


@pytest.mark.parametrize("backbone", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["scores", "weights"])
@pytest.mark.parametrize("focus", ["none", "tia", "sum", "discounted_sum", "focus"])
@torch.no_grad()
def test_a_batch_is_what_the_paper_says_row_by_row(backbone, attention, focus):
    model = build_llava(backbone, cmai_attention=attention, cmai_focus=focus)
    inputs = llava_inputs(ROWS, side="left")
    logits = model(**inputs).logits
    for row, ids, images in zip(range(len(ROWS)), ROWS, image_slices(ROWS)):
        expected = slow_logits(model, torch.tensor(ids), inputs["pixel_values"][images])
        assert_close(logits[row, -len(ids) :], expected, 2e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_cmai_changes_text_after_an_image_and_nothing_else(backbone):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS)
    states = {}
    for use_cmai in (True, False):
        model.config.use_cmai = use_cmai
        states[use_cmai] = model(**inputs).logits
    with_image = states[True][:2] - states[False][:2]
    assert with_image[:, -1].abs().amax() > 0.01
    text_only = len(ROWS[2])
    assert_close(states[True][2, -text_only:], states[False][2, -text_only:])
    first_image = ROWS[0].index(IMAGE)
    start = inputs["input_ids"].shape[1] - len(ROWS[0])
    assert_close(states[True][0, start : start + first_image], states[False][0, start : start + first_image])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("attention", ["scores", "weights"])
@torch.no_grad()
def test_eager_and_sdpa_agree(backbone, attention):
    model = build_llava(backbone, cmai_attention=attention)
    inputs = llava_inputs(ROWS)
    default = model(**inputs).logits
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True)
    real = inputs["attention_mask"].bool()
    assert_close(outputs.logits[real], default[real])
    # What was inhibited has no weight, and the weights of a token still sum to 1.
    last = outputs.attentions[-1][0, :, -1]
    assert_close(last.sum(-1), torch.ones(len(last)))
    is_image = inputs["input_ids"][0] == IMAGE
    seen = (
        model.config.text_config.layer_types[-1] == "full_attention"
        if hasattr(model.config.text_config, "layer_types") and model.config.text_config.layer_types
        else backbone != "mistral"
    )
    if seen:
        assert (last[:, is_image] == 0).all(0).sum() == 5  # below the 0.6-quantile of 9


def implementations(model):
    """What the config says of the whole model, of the language model and of the tower, by whichever way one asks."""
    config = model.config
    found = [part._attn_implementation for part in (config, config.text_config, config.vision_config)]
    parts = (model, model.model.language_model, model.model.vision_tower)
    assert found == [part.config._attn_implementation for part in parts]
    return found


def used_by(model, inputs, monkeypatch):
    """Which attention functions of ours run in one pass."""
    used = set()
    with monkeypatch.context() as patch:
        for name in ("cmai_eager", "cmai_sdpa", "vmtc_sdpa"):

            def recording(*args, name=name, attend=ALL_ATTENTION_FUNCTIONS[name], **kwargs):
                used.add(name)
                return attend(*args, **kwargs)

            patch.setitem(ALL_ATTENTION_FUNCTIONS, name, recording)
        model(**inputs)
    return used


@torch.no_grad()
def test_the_config_says_what_was_set_and_that_is_used(stock, monkeypatch):
    _, folder = stock
    flags = {"use_vmtc": True, "vmtc_num_visual_tokens": NUM_VISUAL_TOKENS, "use_cmai": True}
    inputs = llava_inputs([llava_prompt()])
    assert implementations(build_llava()) == ["sdpa"] * 3
    for asked, expected in (
        (None, ["sdpa", "sdpa", "sdpa"]),
        ("eager", ["eager", "eager", "eager"]),
        ({"text_config": "eager"}, ["sdpa", "eager", "sdpa"]),
        ({"vision_config": "eager"}, ["sdpa", "sdpa", "eager"]),
    ):
        model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(folder, attn_implementation=asked, **flags)
        model.eval()
        before = copy.deepcopy(model.config.to_dict())
        towers = {"vmtc_sdpa"} if expected[2] == "sdpa" else set()
        for _ in range(2):
            assert used_by(model, inputs, monkeypatch) == {f"cmai_{expected[1]}", *towers}
            assert implementations(model) == expected
        assert model.config.to_dict() == before
        generate(model, inputs)
        assert implementations(model) == expected
        model.set_attn_implementation({"text_config": "sdpa"})
        assert used_by(model, inputs, monkeypatch) == {"cmai_sdpa", *towers}
        assert implementations(model)[1:] == ["sdpa", expected[2]]


def test_a_language_model_that_soft_caps_is_never_given_sdpa():
    model = build_llava("gemma2")
    assert implementations(model)[1] == "eager"
    for asked in ("sdpa", {"text_config": "sdpa"}):
        model.set_attn_implementation(asked)
        assert implementations(model)[1:] == ["eager", "sdpa"]


@torch.no_grad()
def test_a_copy_has_an_attention_of_its_own(monkeypatch):
    model = build_llava()
    inputs = llava_inputs([llava_prompt()])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.set_attn_implementation("eager")
        assert used_by(copied, inputs, monkeypatch) == {"cmai_eager"}
        assert implementations(model) == ["sdpa"] * 3
        assert_close(copied(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_attentions_may_be_asked_for_by_the_config():
    model = build_llava()
    inputs = llava_inputs([llava_prompt()])
    model.set_attn_implementation("eager")
    model(**inputs)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.output_attentions = True
    assert len(model(**inputs).attentions) == 4
    model.config.validate()


@torch.no_grad()
def test_a_ratio_of_0_is_no_inhibition():
    model = build_llava(cmai_max_ratio=0.0)
    inputs = llava_inputs(ROWS)
    logits = model(**inputs).logits
    model.config.use_cmai = False
    assert torch.equal(logits, model(**inputs).logits)


@torch.no_grad()
def test_gemmas_soft_capping_of_logits_is_kept():
    model = build_llava("gemma2", **OFF)
    assert model.config.text_config.final_logit_softcapping == 30.0
    inputs = llava_inputs([llava_prompt(num_visual_tokens=36)], num_visual_tokens=36)
    states = model.model(**inputs).last_hidden_state
    assert torch.equal(model(**inputs).logits, torch.tanh(model.lm_head(states) / 30.0) * 30.0)


# --- generation ----------------------------------------------------------------------------------------------------


def generate(model, inputs, **kwargs):
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    arguments["suppress_tokens"] = [
        IMAGE
    ]  # a model that writes placeholders itself cannot be run again without a cache
    return model.generate(**inputs, **{**arguments, **kwargs})


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several returned": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("backbone", ["llama", "gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("mode", list(MODES))
def test_every_way_to_generate_is_the_same_with_any_cache(backbone, mode):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS)
    expected = generate(model, inputs, use_cache=False, **MODES[mode])
    assert expected.shape[1] > inputs["input_ids"].shape[1] + 2
    assert torch.equal(generate(model, inputs, **MODES[mode]), expected)
    static = generate(model, inputs, cache_implementation="static", disable_compile=True, **MODES[mode])
    assert torch.equal(static, expected)


@pytest.mark.parametrize("focus", ["tia", "sum", "discounted_sum"])
@pytest.mark.parametrize("attention", ["scores", "weights"])
def test_every_focus_is_the_same_with_any_cache(focus, attention):
    model = build_llava("gemma2", cmai_focus=focus, cmai_attention=attention)
    inputs = llava_inputs(ROWS)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_cached_logits_are_those_of_one_pass(backbone):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS)
    new = torch.randint(10, VOCAB, (len(ROWS), 6))
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    expected = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
    length = inputs["input_ids"].shape[1]
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config.text_config),
        StaticCache(model.config.text_config, max_cache_len=64),
    ):
        outputs = [model(**inputs, past_key_values=cache).logits]
        for end in (length + 1, length + 4, length + 5, length + 6):  # one token, several, one, one
            outputs.append(
                model(
                    input_ids=ids[:, outputs_length(outputs) : end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                ).logits
            )
        real = mask.bool()
        assert_close(torch.cat(outputs, 1)[real], expected[real], 2e-4)


def outputs_length(outputs):
    return sum(output.shape[1] for output in outputs)


@pytest.mark.parametrize("backbone", ["llama", "gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_its_rows(backbone, side):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS, side=side)
    logits = model(**inputs).logits
    generated = generate(model, inputs) if side == "left" else None
    for row, ids, images in zip(range(len(ROWS)), ROWS, image_slices(ROWS)):
        alone = {"input_ids": torch.tensor([ids])}
        if IMAGE in ids:
            alone["pixel_values"] = inputs["pixel_values"][images]
        assert_close(logits[row][inputs["attention_mask"][row].bool()], model(**alone).logits[0])
        if generated is not None:
            tokens = generate(model, alone)[0, len(ids) :].tolist()
            assert generated[row, inputs["input_ids"].shape[1] :][: len(tokens)].tolist() == tokens


@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
@pytest.mark.parametrize("assistant", [False, True])
def test_assisted_decoding_is_greedy_decoding(backbone, assistant):
    model = build_llava(backbone)
    inputs = llava_inputs([llava_prompt(length=12, seed=6)])
    inputs["input_ids"][0, -6:] = inputs["input_ids"][0, -12:-6]  # something to look up
    expected = generate(model, inputs, max_new_tokens=16)
    if assistant:
        helper = copy.deepcopy(model)
        with torch.no_grad():
            helper.lm_head.weight.add_(0.3 * torch.randn(helper.lm_head.weight.shape))  # it is not always right
        kwargs = {"assistant_model": helper}
    else:
        kwargs = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(model, inputs, max_new_tokens=16, **kwargs), expected)
    if getattr(StaticLayer, "is_croppable", False):
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generate(model, inputs, max_new_tokens=16, **kwargs, **static), expected)


def test_placeholders_are_not_looked_up_in_the_prompt():
    """The colon of "ASSISTANT:" is also that of "USER: <image>"."""
    model = build_llava("llama")
    prompt = llava_prompt(length=6, seed=6)
    prompt[prompt.index(IMAGE) - 1] = prompt[-1]
    inputs = llava_inputs([prompt])
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), generate(model, inputs))


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
@pytest.mark.parametrize("new_image", [False, True])
def test_a_second_turn_goes_on_from_the_cache(backbone, new_image):
    model = build_llava(backbone)
    inputs = llava_inputs([llava_prompt(length=5, seed=1)])
    first = generate(model, inputs, return_dict_in_generate=True, eos_token_id=None)
    more = llava_prompt(length=3, seed=9) if new_image else random_tokens(5, 9)
    ids = torch.cat([first.sequences, torch.tensor([more])], dim=1)
    pixels = inputs["pixel_values"]
    other = torch.randn(1, 3, 24, 24)
    whole = {"input_ids": ids, "pixel_values": torch.cat([pixels, other]) if new_image else pixels}
    expected = generate(model, whole, use_cache=False)
    second = {"input_ids": ids, **({"pixel_values": other} if new_image else {})}
    assert torch.equal(generate(model, second, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
def test_an_image_may_come_in_the_second_turn(backbone):
    model = build_llava(backbone)
    first = generate(
        model,
        {"input_ids": torch.tensor([[BOS, *random_tokens(6, 1)]])},
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    ids = torch.cat([first.sequences, torch.tensor([llava_prompt(seed=2)[1:]])], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24)}
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
def test_embeddings_do_as_well_as_ids(backbone):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        by_embeddings = model(
            inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"]
        )
        assert_close(by_embeddings.logits, model(**inputs).logits)
    length = inputs["input_ids"].shape[1]
    expected, beams = (generate(model, inputs, num_beams=n)[:, length:] for n in (1, 2))
    inputs["inputs_embeds"] = embeddings
    del inputs["input_ids"]
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, num_beams=2), beams)


@pytest.mark.parametrize("backbone", ["gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_goes_on_beyond_the_window(backbone, kind):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS[:2])
    arguments = {"max_new_tokens": 40, "eos_token_id": None}
    expected = generate(model, inputs, use_cache=False, **arguments)
    kwargs = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    assert torch.equal(generate(model, inputs, **arguments, **kwargs), expected)


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
@torch.no_grad()
def test_a_compiled_decoding_step_is_compiled_once(backbone):
    model = build_llava(backbone)
    inputs = llava_inputs([ROWS[0], ROWS[3]])
    cache = StaticCache(model.config.text_config, max_cache_len=64)
    model(**inputs, past_key_values=cache)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    reference = DynamicCache()
    model(**inputs, past_key_values=reference)
    mask = inputs["attention_mask"]
    for index in range(10):
        token = torch.randint(10, VOCAB, (2, 1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        position_ids = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
        compiled_inputs = model.prepare_inputs_for_generation(
            token, past_key_values=cache, attention_mask=mask, position_ids=position_ids
        )
        actual = step(**{name: value for name, value in compiled_inputs.items() if value is not None}).logits
        expected = model(
            input_ids=token, attention_mask=mask, position_ids=position_ids, past_key_values=reference
        ).logits
        assert_close(actual[:, -1], expected[:, -1], 2e-4)
        if index == 2:
            compiled = counter.frame_count
    assert counter.frame_count == compiled <= 2


def test_generate_with_a_compiled_static_cache(monkeypatch):
    model = build_llava("llama")
    inputs = llava_inputs(ROWS[:2])
    expected = generate(model, inputs)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)  # on the CPU too
    torch._dynamo.reset()
    config = GenerationConfig(cache_implementation="static", max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD)
    config.compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    assert torch.equal(model.generate(**inputs, generation_config=config, do_sample=False), expected)


@torch.no_grad()
def test_the_state_is_there_when_keys_and_values_have_been_offloaded():
    """In the order of the library: a layer is updated and offloaded, and then its attention runs."""
    model = build_llava("llama")
    inputs = llava_inputs(ROWS[:1])
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    for layer in cache.layers:
        state = layer.row_buffer
        layer.offload()
        assert layer.row_buffer is state


def test_prefill_in_chunks_is_refused_with_images():
    model = build_llava("llama")
    with pytest.raises(ValueError, match="cannot be prefilled in chunks of 4 tokens"):
        generate(model, llava_inputs(ROWS[:1]), prefill_chunk_size=4)
    text = {"input_ids": torch.tensor([ROWS[2]])}
    assert torch.equal(generate(model, text, prefill_chunk_size=4), generate(model, text))


@torch.no_grad()
def test_the_last_column_of_a_prompt_may_hold_an_image_token():
    model = build_llava("llama")
    ids = torch.tensor([[BOS, 11, 12, IMAGE, 13, 14, IMAGE]])
    pixels = torch.randn(2, 3, 24, 24)
    expected = model(input_ids=ids, pixel_values=pixels, num_visual_tokens=1).logits
    cache = DynamicCache()
    first = model(input_ids=ids[:, :-1], pixel_values=pixels[:1], num_visual_tokens=1, past_key_values=cache).logits
    last = model(input_ids=ids[:, -1:], pixel_values=pixels[1:], num_visual_tokens=1, past_key_values=cache).logits
    assert_close(torch.cat([first, last], dim=1), expected)
    assert cache.layers[0].image_columns.tolist() == [[3, 6]]


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="CMAI does not support continuous batching"):
        build_llava().init_continuous_batching()


# --- budgets -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_budget_may_be_set_for_a_call_or_for_good():
    model = build_llava()
    prompt = llava_prompt(num_visual_tokens=4)
    inputs = llava_inputs([prompt], num_visual_tokens=4)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"has 4 image placeholders \(id 7\), but there are 9 visual tokens"):
            call(**inputs)
    logits = model(**inputs, num_visual_tokens=4).logits
    tokens = generate(model, inputs, num_visual_tokens=4)
    for kwargs in ({"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        generate(model, inputs, num_visual_tokens=4, **kwargs)
    assert torch.equal(generate(model, inputs, num_visual_tokens=4, use_cache=False), tokens)
    assert model.config.vmtc_num_visual_tokens == 9
    model.set_visual_budget(4)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), tokens)
    with pytest.raises(ValueError, match="The budget is 37 visual tokens, but an image has 36 patches"):
        model(**inputs, num_visual_tokens=37)
    with pytest.raises(ValueError, match="has 0 image placeholders.*Write `<image>` into the prompt"):
        model(input_ids=torch.tensor([[BOS, 11, 12]]), pixel_values=inputs["pixel_values"])


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
def test_cmais_ratio_may_be_set_for_a_call_or_for_good(backbone, stock):
    model = build_llava(backbone)
    inputs = llava_inputs(ROWS)
    default = model(**inputs).logits
    modes = ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    for ratio in (0.2, 1, 0):
        logits = model(**inputs, cmai_max_ratio=ratio).logits
        base = model.model(**inputs, cmai_max_ratio=ratio).last_hidden_state
        tokens = [generate(model, inputs, cmai_max_ratio=ratio, **mode) for mode in modes]
        assert model.config.cmai_max_ratio == 0.6
        assert torch.equal(model(**inputs).logits, default)
        model.config.cmai_max_ratio = ratio
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.model(**inputs).last_hidden_state, base)
        assert all(torch.equal(generate(model, inputs, **mode), each) for mode, each in zip(modes, tokens))
        model.config.cmai_max_ratio = 0.6
        assert not torch.allclose(logits, default, atol=1e-3)
    # An assistant without CMAI is not asked for what it does not have.
    without_cmai = copy.deepcopy(model)
    without_cmai.config.use_cmai = False
    for assistant in (copy.deepcopy(model), without_cmai):
        one = llava_inputs(ROWS[:1])
        tokens = generate(model, one, cmai_max_ratio=0.2)
        assert torch.equal(generate(model, one, cmai_max_ratio=0.2, assistant_model=assistant), tokens)
    text = llava_inputs([llava_prompt(images=0)])
    tokens = generate(model, text)
    assert torch.equal(generate(model, text, cmai_max_ratio=0.2, assistant_model=stock[0]), tokens)


@torch.no_grad()
def test_what_follows_in_a_cache_may_have_another_ratio():
    model = build_llava("llama")
    ids = torch.tensor([ROWS[0]])
    pixels = llava_inputs(ROWS[:1])["pixel_values"]
    cache = DynamicCache()
    first = model(input_ids=ids[:, :-1], pixel_values=pixels, past_key_values=cache, cmai_max_ratio=0.9).logits
    kept = copy.deepcopy(cache)
    last = model(input_ids=ids[:, -1:], past_key_values=cache, cmai_max_ratio=0.9).logits
    assert_close(torch.cat([first, last], dim=1), model(input_ids=ids, pixel_values=pixels, cmai_max_ratio=0.9).logits)
    other = model(input_ids=ids[:, -1:], past_key_values=kept, cmai_max_ratio=0.1).logits
    assert not torch.allclose(other, last, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_what_follows_tokens_without_inhibition_knows_their_attention(cache_class):
    """A ratio so small that it inhibits nothing must leave the same in the cache as a ratio of 0."""
    model = build_llava("llama")
    ids = torch.tensor([ROWS[0]])
    pixels = llava_inputs(ROWS[:1])["pixel_values"]
    logits = []
    for ratio in (0.0, 1e-9):
        cache = (
            DynamicCache() if cache_class is DynamicCache else StaticCache(model.config.text_config, max_cache_len=64)
        )
        model(input_ids=ids[:, :-2], pixel_values=pixels, past_key_values=cache, cmai_max_ratio=ratio)
        model(input_ids=ids[:, -2:-1], past_key_values=cache, cmai_max_ratio=ratio)
        logits.append(model(input_ids=ids[:, -1:], past_key_values=cache, cmai_max_ratio=0.9).logits)
    assert_close(*logits)


def test_a_compiled_decoding_step_takes_a_ratio(monkeypatch):
    model = build_llava("llama")
    inputs = llava_inputs(ROWS[:2])
    ratios = (0.2, 0.9, 0.5)
    expected = [
        generate(model, inputs, cmai_max_ratio=each, max_new_tokens=6, suppress_tokens=None) for each in ratios
    ]
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)  # on the CPU too
    torch._dynamo.reset()
    config = GenerationConfig(cache_implementation="static", max_new_tokens=6, eos_token_id=EOS, pad_token_id=PAD)
    config.compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    for ratio, answers in zip(ratios, expected, strict=True):
        compiled = model.generate(**inputs, generation_config=config, do_sample=False, cmai_max_ratio=ratio)
        assert torch.equal(compiled, answers)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_wrong_ratio_is_refused(call):
    model = build_llava()
    inputs = llava_inputs(ROWS)
    for ratio in (1.2, -0.1):
        with pytest.raises(ValueError, match=f"`cmai_max_ratio` must be a number from 0 to 1, got {ratio}"):
            getattr(model, call)(**inputs, cmai_max_ratio=ratio)
    model.config.use_cmai = False
    with pytest.raises(ValueError, match=r"is 0.3, but `use_cmai` is off. .*: `model.config.use_cmai = True`"):
        getattr(model, call)(**inputs, cmai_max_ratio=0.3)


@torch.no_grad()
def test_a_list_of_one_feature_layer_is_that_layer(tmp_path):
    model = build_llava(vision_feature_layer=-3)
    inputs = llava_inputs(ROWS)
    expected = model(**inputs).logits
    assert not torch.allclose(model(**inputs, vision_feature_layer=-2).logits, expected, atol=1e-3)
    listed = build_llava(vision_feature_layer=[-3])
    assert torch.equal(listed(**inputs).logits, expected)
    assert torch.equal(generate(listed, inputs), generate(model, inputs))
    pixels = inputs["pixel_values"]
    assert torch.equal(listed.get_vision_features(pixels), model.get_vision_features(pixels))
    assert torch.equal(listed(**inputs, vision_feature_layer=-3).logits, expected)
    model.config.vision_feature_layer = -2
    for layers in ([-3], (-3,)):
        assert torch.equal(model(**inputs, vision_feature_layer=layers).logits, expected)
    listed.save_pretrained(tmp_path)
    loaded = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vision_feature_layer == [-3]
    assert torch.equal(loaded(**inputs).logits, expected)
    with pytest.raises(ValueError, match=r"VMTC works with one `vision_feature_layer`, got \[-2, -3\]"):
        model(**inputs, vision_feature_layer=[-2, -3])


@pytest.mark.parametrize(
    "kind, strategy",  # SigLIP has no class token to drop
    [("clip", "default"), ("clip", "full"), ("dinov2", "default"), ("dinov2", "full"), ("siglip", "full")],
)
def test_model_and_processor_count_the_same(kind, strategy):
    vision = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 24, "patch_size": 4}
    towers = {"dinov2": Dinov2Config(**vision), "siglip": SiglipVisionConfig(intermediate_size=32, **vision)}
    kwargs = {"vision_feature_select_strategy": strategy}
    if kind in towers:
        kwargs["vision_config"] = towers[kind]
    processor = build_processor(
        vision_feature_select_strategy=strategy, num_additional_image_tokens=int(kind != "siglip")
    )
    for flags in (
        {"use_vmtc": False},
        {"use_vmtc": True, "vmtc_num_visual_tokens": 5},
        {"use_vmtc": True, "vmtc_num_visual_tokens": None, "vmtc_keep_ratio": 0.3},
        {"use_vmtc": False, "spd_factor": 3},
    ):
        model = build_llava(**{**kwargs, **flags})
        for name, value in flags.items():
            setattr(processor, name, value)
        if "spd_factor" in flags and strategy == "full" and kind != "siglip":
            with pytest.raises(
                ValueError,
                match="`spd_factor` needs a grid of 6 x 6 visual tokens, but there are 37,",
            ):
                model.get_image_features(torch.randn(1, 3, 24, 24))
            continue
        inputs = processor(images=picture(), text="<image> what is it", return_tensors="pt")
        model(**inputs)
        assert (inputs["input_ids"] == IMAGE).sum() == len(
            model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        )


@torch.no_grad()
def test_image_features_come_with_all_states_of_the_tower():
    model = build_llava()
    outputs = model.get_image_features(torch.randn(2, 3, 24, 24), output_hidden_states=True)
    assert [tokens.shape for tokens in outputs.pooler_output] == [(9, 32)] * 2
    assert [states.shape[1] for states in outputs.hidden_states] == [37, 37, 28, 19, 10, 10]
    assert isinstance(model.get_image_features(torch.randn(1, 3, 24, 24), return_dict=False), tuple)


@torch.no_grad()
def test_the_baseline_averages_the_grid_before_the_projector():
    model = build_llava(use_vmtc=False, spd_factor=2)
    pixels = torch.randn(2, 3, 24, 24)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    pooled = torch.nn.functional.avg_pool2d(states.mT.unflatten(-1, (6, 6)), 2).flatten(2).mT
    expected = model.model.multi_modal_projector(pooled)
    assert_close(torch.stack(model.get_image_features(pixels).pooler_output), expected)
    with pytest.raises(ValueError, match="`spd_factor` is 2, but .* Set `spd_factor=1` first"):
        model.set_visual_budget(9)
    assert not model.config.use_vmtc
    with pytest.raises(ValueError, match="`spd_factor` is 2, but images of several sizes"):
        model.get_image_features(pixels, image_sizes=torch.tensor([[24, 24], [24, 20]]))
    model.config.spd_factor = 4
    with pytest.raises(ValueError, match="`spd_factor` is 4, which does not divide the grid of 6 x 6"):
        model.get_image_features(pixels)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        OFF,
        {"use_vmtc": False, "spd_factor": 2},
        {**OFF, "vision_feature_layer": [-2, -1]},
        {"use_vmtc": False, "vision_feature_select_strategy": "full"},
    ],
)
@torch.no_grad()
def test_vision_features_stand_for_pixel_values(flags):
    model = build_llava(**flags)
    pixels = torch.randn(4, 3, 24, 24)
    features = model.get_vision_features(pixels)
    assert torch.equal(model.model.get_vision_features(pixels.view(2, 2, 3, 24, 24)), features)
    count = features.shape[1]
    rows = [
        llava_prompt(5, 1, num_visual_tokens=count),
        llava_prompt(3, 2, images=2, num_visual_tokens=count),
        llava_prompt(4, 3, num_visual_tokens=count),
    ]
    inputs = batch_of(rows)
    expected = model(**inputs, pixel_values=pixels, labels=inputs["input_ids"])
    output = model(**inputs, vision_features=features.clone(), labels=inputs["input_ids"])
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    # One tensor, or since transformers 5.24 one for each image.
    assert all(map(torch.equal, output.image_hidden_states, expected.image_hidden_states))
    for mode in MODES.values():
        for kwargs in ({}, {"use_cache": False}):
            by_pixels = generate(model, {**inputs, "pixel_values": pixels}, **mode, **kwargs)
            assert torch.equal(generate(model, {**inputs, "vision_features": features}, **mode, **kwargs), by_pixels)


@torch.no_grad()
def test_vision_features_are_checked_as_pixels_are():
    model = build_llava()
    inputs = llava_inputs([llava_prompt()])
    features = model.get_vision_features(inputs["pixel_values"])
    assert features.shape == (1, NUM_VISUAL_TOKENS, 24)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="not both"):
            call(**inputs, vision_features=features)
        encoded = {"image": model.get_image_features(inputs["pixel_values"])}
        with pytest.raises(ValueError, match="not both"):
            call(input_ids=inputs["input_ids"], vision_features=features, mm_encoder_outputs=encoded)
        with pytest.raises(ValueError, match=r"has shape \(1, 9, 20\), expected \(images, visual tokens, 24\)"):
            call(input_ids=inputs["input_ids"], vision_features=features[..., :20])
        with pytest.raises(ValueError, match=r"has shape \(1, 1, 9, 24\), expected \(images, visual tokens, 24\)"):
            call(input_ids=inputs["input_ids"], vision_features=features[None])
        with pytest.raises(ValueError, match=r"has 9 image placeholders \(id 7\), but there are 8 visual tokens"):
            call(input_ids=inputs["input_ids"], vision_features=features[:, :8])
        with pytest.raises(ValueError, match="`num_visual_tokens` is 4, but `vision_features` are compressed already"):
            call(input_ids=inputs["input_ids"], vision_features=features, num_visual_tokens=4)
    half = build_llava().to(torch.bfloat16)
    assert half(input_ids=inputs["input_ids"], vision_features=features).logits.dtype == torch.bfloat16


def test_vision_features_are_projected_once_and_go_through_assisted_decoding(monkeypatch):
    model = build_llava("llama")
    inputs = llava_inputs([llava_prompt(length=12, seed=6)])
    inputs["input_ids"][0, -6:] = inputs["input_ids"][0, -12:-6]  # something to look up
    expected = generate(model, inputs, max_new_tokens=16)
    with torch.no_grad():
        features = model.get_vision_features(inputs.pop("pixel_values"))
    calls = []
    model.model.multi_modal_projector.register_forward_hook(lambda *args: calls.append(1))
    for kwargs in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(build_llava("llama"))}):
        calls.clear()
        arguments = {"max_new_tokens": 16, **kwargs}
        assert torch.equal(generate(model, {**inputs, "vision_features": features}, **arguments), expected)
        assert calls == [1]


def test_a_list_of_layers_works_without_vmtc_and_is_refused_with_it():
    model = build_llava(**OFF)
    with pytest.raises(ValueError, match=r"one `vision_feature_layer`, got \[-2, -1\]"):
        build_llava().get_image_features(torch.randn(1, 3, 24, 24), vision_feature_layer=[-2, -1])
    with pytest.raises(RuntimeError):  # the projector of this model is for one layer; stock LLaVA says the same
        model.get_image_features(torch.randn(1, 3, 24, 24), vision_feature_layer=[-2, -1])


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["scores", "weights"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_the_same_with_checkpointing(attention, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build_llava("llama", cmai_attention=attention).train()
        if checkpointing and reentrant is None:
            continue
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = llava_inputs(ROWS, side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert torch.isfinite(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    unused = {"post_layernorm", "vision_tower.encoder.layers.4"}  # after the hidden state that is used
    for name in gradients[0].keys() | {name for name, _ in build_llava("llama").named_parameters()}:
        used = not any(part in name for part in unused)
        if used and "k_proj.bias" not in name:
            assert gradients[0][name].abs().sum() > 0, name
        if len(gradients) > 1 and used:
            assert_close(gradients[1][name], gradients[0][name])
    assert all(torch.isfinite(gradient).all() for gradient in gradients[0].values())


@pytest.mark.parametrize("flags", [{}, OFF, {**OFF, "spd_factor": 2}], ids=["on", "off", "SPD"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_batch_without_an_image_gives_what_reads_images_gradients_of_zero(flags, checkpointing):
    """Other processes wait for them; and a frozen language model alone would have nothing to go back to."""
    model = build_llava(**flags)
    batch = batch_of([[BOS, *random_tokens(6, 1)], [BOS, *random_tokens(3, 2)]], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batch, labels=labels)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_(False)
    for ids in (
        {"input_ids": batch["input_ids"]},
        {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])},
    ):
        model.zero_grad()
        outputs = model(**ids, attention_mask=batch["attention_mask"], labels=labels, use_cache=False)
        assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        without = {name for name, gradient in gradients.items() if gradient is None}
        assert all("vision_tower.encoder.layers.4" in name or "post_layernorm" in name for name in without), without
        assert all(not gradient.any() for gradient in gradients.values() if gradient is not None)


def test_placeholders_in_the_labels_count_as_in_stock_llava_and_are_warned_of(stock, monkeypatch):
    warnings = []
    monkeypatch.setattr(vmtc_cmai_mixins.logger, "warning_once", warnings.append)
    theirs, folder = stock
    model = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(folder).train()
    inputs = llava_inputs([llava_prompt(num_visual_tokens=36)], num_visual_tokens=36)
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss)
    assert len(warnings) == 1 and "labels[labels == model.config.image_token_id] = -100" in warnings[0]
    labels[labels == model.config.image_token_id] = -100
    model(**inputs, labels=labels)
    assert len(warnings) == 1


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["padded", "one layout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype, rows):
    model = build_llava("llama")
    inputs = llava_inputs(rows)
    with torch.autocast("cpu", dtype=dtype):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        generate(model.eval(), inputs)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model = build_llava("llama").to(dtype).eval()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        assert model(**inputs).logits.dtype == dtype
        assert torch.isfinite(model(**inputs).logits[inputs["attention_mask"].bool()]).all()
        generate(model, inputs)


@torch.no_grad()
def test_a_forward_pass_leaves_nothing_on_the_modules():
    model = build_llava("llama")
    inputs = llava_inputs(ROWS)
    model(**inputs)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    model(**inputs)
    generate(model, inputs)
    for name, module in model.named_modules():
        assert set(module.__dict__) == before[name]
        assert not any(isinstance(value, torch.Tensor) for value in module.__dict__.values()), name


# --- the processor -------------------------------------------------------------------------------------------------


def picture(size=(30, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def build_processor(processor_class=VmtcCmaiLlavaProcessor, **kwargs):
    words = ["a", "b", "c", "<image>", "what", "is", "it"]
    return processor_class(
        **{
            "image_processor": build_image_processor(),
            "tokenizer": build_tokenizer("words", words=words, additional_special_tokens=["<image>"]),
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            **kwargs,
        }
    )


def test_a_stock_processor_loads_as_it_lies(tmp_path):
    stock = build_processor(LlavaProcessor)
    stock.save_pretrained(tmp_path)
    loaded = VmtcCmaiLlavaProcessor.from_pretrained(tmp_path)
    text = ["<image> what is it", "a <image> b <image> c"]
    images = [[picture()], [picture((24, 40)), picture()]]
    theirs = stock(images=images, text=text, return_tensors="pt", padding=True)
    ours = loaded(images=images, text=text, return_tensors="pt", padding=True)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    compressed = VmtcCmaiLlavaProcessor.from_pretrained(tmp_path, use_vmtc=True, vmtc_num_visual_tokens=5)
    assert (compressed(images=images, text=text, padding=True, return_tensors="pt")["input_ids"] == IMAGE).sum() == 15


def test_the_budget_of_a_processor_is_saved_and_may_be_set(tmp_path):
    processor = build_processor(use_vmtc=True, vmtc_num_visual_tokens=5)
    processor.save_pretrained(tmp_path)
    loaded = VmtcCmaiLlavaProcessor.from_pretrained(tmp_path)
    assert (loaded.use_vmtc, loaded.vmtc_num_visual_tokens) == (True, 5)

    def count(**kwargs):
        return int(np.sum(np.array(loaded(images=picture(), text="<image> a", **kwargs)["input_ids"]) == IMAGE))

    assert count() == 5
    assert count(num_visual_tokens=7) == 7
    assert count(images_kwargs={"num_visual_tokens": 8}) == 8
    assert count() == 5
    loaded.set_visual_budget(11)
    assert count() == 11
    with pytest.raises(ValueError, match="The budget is 40 visual tokens, but an image has 36 patches"):
        count(num_visual_tokens=40)
    assert loaded._get_num_multimodal_tokens([[24, 24], [100, 30]]).num_image_tokens == [11, 11]
    assert loaded._get_num_multimodal_tokens([[24, 24]], num_visual_tokens=3).num_image_tokens == [3]


@pytest.mark.parametrize("settings", [{"do_center_crop": False, "crop_size": None}, {"do_center_crop": False}])
def test_images_that_are_not_cropped_are_counted_by_their_size(settings):
    """vLLM sizes its memory by this count. An image processor that does not crop may say a size of crops all the same."""
    processor = build_processor(use_vmtc=True, vmtc_keep_ratio=0.5)
    processor.image_processor.size = SizeDict(height=24, width=24)
    processor.image_processor.crop_size = SizeDict(height=48, width=48)
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    written = processor(images=Image.new("RGB", (100, 30)), text="<image> a")["input_ids"][0].count(IMAGE)
    counted = processor._get_num_multimodal_tokens([[30, 100]])
    assert (counted.num_image_tokens, counted.num_image_patches) == ([written], [1])
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_a_ratio_that_is_none_is_named():
    processor = build_processor(use_vmtc=True, vmtc_keep_ratio=5)
    with pytest.raises(ValueError, match="`vmtc_keep_ratio` must be above 0 and at most 1, got 5"):
        processor(images=picture(), text="<image> a")


def test_a_budget_needs_vmtc():
    with pytest.raises(ValueError, match="`num_visual_tokens` is 5, but `use_vmtc` is off"):
        build_processor()(images=picture(), text="<image> a", num_visual_tokens=5)


def test_the_budget_goes_through_a_chat_template():
    processor = build_processor(use_vmtc=True)
    processor.chat_template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is it"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": 6},
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 6


def test_images_that_cannot_be_read_are_named(tmp_path):
    processor = build_processor()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(EXAMPLE_IMAGE).read_bytes()[:200])
    for image in (damaged, str(damaged), Image.open(damaged) if damaged.stat().st_size > 100 else None):
        with pytest.raises(ValueError, match=r"damaged\.png"):
            processor(images=image, text="<image> a")
    with pytest.raises(ValueError, match="There is no image file 'nowhere.png'"):
        processor(images="nowhere.png", text="<image> a")
    with pytest.raises(ValueError, match="(?i)pass the frames of a video as `images`"):
        processor(text="a", videos=[np.zeros((2, 3, 8, 8))])


def test_files_are_read_as_the_stock_processor_reads_them(tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture((40, 24)).save(turned, exif=exif)
    transparent = tmp_path / "transparent.png"
    picture().convert("RGBA").save(transparent)
    for path in (turned, transparent):
        ours, theirs = (
            build_processor(kind)(images=str(path), text="<image> a", return_tensors="pt")["pixel_values"]
            for kind in (VmtcCmaiLlavaProcessor, LlavaProcessor)
        )
        assert torch.equal(ours, theirs)


def test_numbers_of_images_that_differ_are_refused():
    with pytest.raises(ValueError, match="The prompts have 1 <image>, but got 2 images"):
        build_processor()(images=[picture(), picture()], text="<image> a")
    with pytest.raises(ValueError, match="The prompts have 1, 0 <image>, but got 1, 1 images"):
        build_processor()(images=[[picture()], picture()], text=["<image> a", "b"])
    with pytest.raises(ValueError, match="The prompts have 2 <image>, but got 0 images"):
        build_processor()(text=["<image> a", "b <image>"])


def test_a_row_without_image_may_stand_beside_others():
    processor = build_processor(use_vmtc=True, vmtc_num_visual_tokens=9)
    model = build_llava()
    inputs = processor(
        images=[picture(), picture((24, 60))],
        text=["<image> a", "b c", "a <image> what is it"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [9, 0, 9]
    generated = generate(model, inputs)
    nested = processor(
        images=[[picture()], [], [picture((24, 60))]],
        text=["<image> a", "b c", "a <image> what is it"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert all(torch.equal(nested[name], inputs[name]) for name in inputs)
    with pytest.raises(ValueError, match="The prompts have 1, 0 <image>, but got 0, 1 images"):
        processor(images=[[], [picture()]], text=["<image> a", "b"])
    alone = processor(images=picture(), text="<image> a", return_tensors="pt")
    assert generate(model, alone)[0].tolist()[-8:] == generated[0].tolist()[-8:]
    assert count_visual_tokens(processor, 36) == 9
    assert batch_of([[1]])["input_ids"].shape == (1, 1)
