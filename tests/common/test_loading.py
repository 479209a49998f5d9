import pytest
from conftest import SHIPPED_MODEL
from hub_server import HubServer

from ta_llava.common.loading import check_format, config_of
from ta_llava.common.sources import check_source


@pytest.mark.parametrize(
    "name", ["./model", "../model", "/no/model", "~/model", "a/b/c", "model", "runs/", "my runs/a"]
)
def test_what_can_be_no_repo_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ta_llava.common.loading.PreTrainedConfig.get_config_dict", pytest.fail)
    with pytest.raises(ValueError, match=f"There is no folder '{name}', and a repo on the Hub is called USER/NAME"):
        config_of(name)


def test_in_a_folder_that_is_here_nothing_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source("runs/model")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="There is no folder 'runs/model'.* where there is no folder 'runs'"):
        check_source("runs/model")
    (tmp_path / "runs" / "model").mkdir()
    check_source("runs/model")
    with pytest.raises(ValueError, match="No model could be loaded from 'runs/model'"):
        config_of("runs/model")


def test_a_repo_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        hub.add("alice/model-1.5_b", {"config.json": (SHIPPED_MODEL / "config.json").read_bytes()})
        assert config_of("alice/model-1.5_b").model_type == "ta_llava"
        with pytest.raises(ValueError, match="from 'alice/none' .there is no such folder, so a repo"):
            config_of("alice/none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "tallava_gemma", "mm_vision_tower": "a"},
            "ta-llava convert-original FOLDER OUT --vision-tower",
        ),
        ({"model_type": "llava", "mm_vision_tower": "a"}, "`mm_vision_tower`.*convert_llava_weights_to_hf.py"),
        ({"model_type": "llava_llama", "mm_hidden_size": 1024}, "original LLaVA code.*`mm_hidden_size`"),
    ],
)
def test_checkpoints_of_original_code_are_known(settings, message):
    with pytest.raises(ValueError, match=message):
        check_format(settings)


def test_other_checkpoints_pass():
    check_format({"model_type": "llava", "text_config": {}, "mm_tokens": 1})
    check_format({"model_type": "llava"})
