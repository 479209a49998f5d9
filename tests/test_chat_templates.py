import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ta_llava.chat_templates import GEMMA_CHAT_TEMPLATE


def render(messages: list[dict], add_generation_prompt: bool = False) -> str:
    return render_jinja_template(
        conversations=[messages],
        chat_template=GEMMA_CHAT_TEMPLATE,
        add_generation_prompt=add_generation_prompt,
        bos_token="<bos>",
    )[0][0]


def test_text_is_rendered_as_gemma_does():
    messages = [
        {"role": "user", "content": " hello\n"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
    ]
    expected = (
        "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\nhi<end_of_turn>\n"
        "<start_of_turn>user\nbye<end_of_turn>\n"
    )
    assert render(messages) == expected
    assert render(messages, add_generation_prompt=True) == expected + "<start_of_turn>model\n"


def test_images_stand_where_they_are():
    content = [{"type": "image"}, {"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert render([{"role": "user", "content": content}]) == (
        "<bos><start_of_turn>user\n<image>a <image>b<end_of_turn>\n"
    )


def test_other_content_is_refused():
    with pytest.raises(Exception, match="images and text, not video"):
        render([{"role": "user", "content": [{"type": "video"}]}])
