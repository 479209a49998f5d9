import pytest
from conftest import build_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
)

from ta_llava import TaLlavaConfig, TaLlavaForConditionalGeneration, TaLlavaModel, TaLlavaProcessor


def test_the_defaults_are_those_of_the_paper():
    config = TaLlavaConfig()
    assert isinstance(config.text_config, Gemma2Config) and config.text_config.hidden_size == 2304
    vision = config.vision_config
    assert isinstance(vision, CLIPVisionConfig)
    assert (vision.image_size // vision.patch_size) ** 2 == 576
    assert (config.num_prefix_tokens, config.adapter_interval, config.vision_feature_layer) == (32, 4, -2)
    assert config.vision_feature_select_strategy == "default" and config.projector_type == "linear"
    assert config.instruction_scope == "first" and config.response_marker_ids == [106, 2516]
    assert config.num_image_index_embeddings == 0


def test_sub_configs_may_be_dicts_or_configs():
    config = TaLlavaConfig(text_config={"model_type": "llama", "hidden_size": 64}, vision_config={"patch_size": 7})
    assert isinstance(config.text_config, LlamaConfig) and config.text_config.hidden_size == 64
    assert isinstance(config.vision_config, CLIPVisionConfig) and config.vision_config.patch_size == 7
    text_config = LlamaConfig(hidden_size=32)
    assert TaLlavaConfig(text_config=text_config).text_config is text_config
    assert TaLlavaConfig(text_config=text_config).tie_word_embeddings == text_config.tie_word_embeddings
    with pytest.raises(TypeError, match="text_config"):
        TaLlavaConfig(text_config="llama")


@pytest.mark.parametrize("backbone", ["gemma2", "llama"])
def test_saved_is_loaded(backbone, tmp_path):
    """The whole of both backbones is in the file: building a model asks no other repo."""
    config = build_config(
        backbone, projector_type="mlp", instruction_scope="last", adapter_interval=3, num_image_index_embeddings=8
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TaLlavaConfig and type(loaded.text_config) is type(config.text_config)
    for name in (
        "num_prefix_tokens",
        "adapter_interval",
        "projector_type",
        "instruction_scope",
        "num_image_index_embeddings",
        "response_marker_ids",
    ):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.text_config.to_diff_dict() == config.text_config.to_diff_dict()
    assert loaded.vision_config.to_diff_dict() == config.vision_config.to_diff_dict()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_prefix_tokens", "32"),
        ("num_prefix_tokens", 0),
        ("adapter_interval", 1),
        ("num_image_index_embeddings", -1),
        ("num_image_index_embeddings", 10**9),
        ("projector_type", "conv"),
        ("instruction_scope", "all"),
        ("vision_feature_select_strategy", "class"),
        ("response_marker_ids", []),
    ],
)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(Exception, match=field):
        TaLlavaConfig(**{field: value})


def test_importing_the_package_registers_it():
    config = build_config()
    assert type(AutoConfig.for_model("ta_llava")) is TaLlavaConfig
    assert type(AutoModel.from_config(config)) is TaLlavaModel
    assert type(AutoModelForImageTextToText.from_config(config)) is TaLlavaForConditionalGeneration
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    assert PROCESSOR_MAPPING[TaLlavaConfig] is TaLlavaProcessor


def test_the_projector_follows_the_config():
    projector = TaLlavaModel(build_config(projector_type="mlp")).multi_modal_projector
    assert [type(part).__name__ for part in projector] == ["Linear", "GELU", "Linear"]
