"""What a card that exists tells of itself."""

import pytest
from conftest import build_config
from hub_server import HubServer
from huggingface_hub import ModelCard, close_session
from model_cards import count_nothing, save_config

from ta_llava.publishing.existing_card import find_card, is_unedited, pin_revision, pinned_revision
from ta_llava.publishing.model_card import write_model_card


@pytest.fixture
def counted(monkeypatch):
    count_nothing(monkeypatch)


def test_a_card_knows_whether_it_was_edited(counted, tmp_path):
    save_config(tmp_path / "model", build_config())
    card = write_model_card(tmp_path / "model", "my-model")
    pinned = pin_revision(card, "me/my-model", "0" * 40)
    assert 'repo, revision = "me/my-model", "' + "0" * 40 + '"\n' in pinned
    assert is_unedited(card) and is_unedited(pinned) and is_unedited(str(ModelCard(pinned)))
    assert pinned_revision(pinned, "me/my-model") == "0" * 40
    assert pinned_revision(pinned, "me/another") is None and pinned_revision(card, "my-model") is None
    assert is_unedited(pinned.replace("\n", "\r\n"))
    for edited in (
        card.replace("## Limits", "## Limitations"),
        card.replace("transformers", "diffusers", 1),
        "",
        "mine",
    ):
        assert not is_unedited(edited)
    (tmp_path / "model" / "README.md").write_text(card)
    assert find_card(tmp_path / "model") == card and find_card(tmp_path) is None


def test_a_hub_that_does_not_answer_has_no_card(tmp_path, monkeypatch, caplog):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.add("alice/model", {"README.md": "mine"})
        hub.add("alice/other", {"README.md": "mine"})
        hub.add("alice/blank", {})
        assert find_card("alice/model") == "mine" and find_card("alice/blank") is None and not caplog.text
    close_session()  # whose connection is open still
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # before it tries again
    assert find_card("alice/model") == "mine"  # it was downloaded before
    assert find_card("alice/other") is None and "The README.md of alice/other cannot be downloaded now" in caplog.text
