"""The counts over frames on tiny sizes, and that table and picture are made of them."""

import pytest
from conftest import text_config
from plot_frames import LLAVA, TA_LLAVA, count_rows, draw, format_report
from transformers import CLIPVisionConfig, LlavaConfig

from ta_llava import TaLlavaConfig


@pytest.fixture(scope="module")
def rows():
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = text_config("llama", num_hidden_layers=1)
    ta_llava = TaLlavaConfig(
        vision_config=vision, text_config=text, num_prefix_tokens=3, image_token_id=7, response_marker_ids=[3]
    )
    return count_rows({LLAVA: LlavaConfig(vision_config=vision, text_config=text), TA_LLAVA: ta_llava}, (1, 3))


def test_what_grows_with_the_frames(rows):
    one, three = rows
    assert three["tower"] == 3 * one["tower"]
    assert [row["tokens"] for row in rows] == [{LLAVA: 44, TA_LLAVA: 43}, {LLAVA: 52, TA_LLAVA: 43}]
    for row in rows:  # one layer, keys and values of 2 heads of 8 in bfloat16
        assert row["cache"] == {name: 2 * 2 * 8 * 2 * tokens for name, tokens in row["tokens"].items()}
    # Without the text adapter's and the vision adapter's layers, which a single layer has none of, what grows is the
    # projector from 24 to 32 and keys and values of 16 each, for 8 more visual tokens.
    assert three["operations"][TA_LLAVA] - one["operations"][TA_LLAVA] == 8 * 2 * 32 * (24 + 16 + 16)


def test_logits_are_those_of_the_last_token(rows):
    # Projections and MLP of a Llama layer, its attention, and the head: all of 32 columns but what is said.
    tokens = 44
    layer = tokens * 2 * 32 * (32 + 16 + 16 + 32 + 3 * 48) + 2 * 2 * tokens * tokens * 32
    projector = 4 * 2 * (24 * 32 + 32 * 32)
    assert rows[0]["operations"][LLAVA] == layer + projector + 2 * 32 * 60


def test_table_and_picture(rows, tmp_path):
    report = format_report(rows, max_tokens=50)
    table = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|")]
    assert table[2:] == ["1", "3*"]
    draw(rows, 50, tmp_path / "frames.png")
    assert (tmp_path / "frames.png").read_bytes().startswith(b"\x89PNG")
