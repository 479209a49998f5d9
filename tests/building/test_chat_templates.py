import pytest
from chat_templates_of_models import GEMMA, LLAMA_2, LLAMA_3, MISTRAL, QWEN_2_5, QWEN_3, SMOLLM2
from transformers.utils.chat_template_utils import render_jinja_template

from ta_llava.building.chat_templates import GEMMA_CHAT_TEMPLATE, VICUNA_CHAT_TEMPLATE, add_images, recognise_turns


TEMPLATES = {
    "gemma": (GEMMA, "Gemma", "<end_of_turn>"),
    "smollm2": (SMOLLM2, "ChatML", "<|im_end|>"),
    "qwen2.5": (QWEN_2_5, "ChatML", "<|im_end|>"),
    "qwen3": (QWEN_3, "ChatML", "<|im_end|>"),
    "llama2": (LLAMA_2, "Llama-2 and Mistral", "</s>"),
    "llama3": (LLAMA_3, "Llama-3", "<|eot_id|>"),
    "mistral": (MISTRAL, "Llama-2 and Mistral", "</s>"),
    "vicuna": (VICUNA_CHAT_TEMPLATE, "Vicuna", "</s>"),
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


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


def test_videos_stand_where_they_are():
    content = [{"type": "video"}, {"type": "text", "text": "a"}]
    assert render([{"role": "user", "content": content}]) == "<bos><start_of_turn>user\n<video>a<end_of_turn>\n"
    turns = recognise_turns(SMOLLM2, SPECIAL_TOKENS)
    template = add_images(SMOLLM2, turns, "<image>", SPECIAL_TOKENS, video_token="<video>")
    assert "user\n<video>\na<|im_end|>" in render_with(template, [{"role": "user", "content": content}])[0]


def test_other_content_is_refused():
    with pytest.raises(Exception, match="images, videos and text, not audio"):
        render([{"role": "user", "content": [{"type": "audio"}]}])


# --- templates of language models, with images added ---------------------------------------------------------------


def render_with(chat_template: str, messages: list[dict], **kwargs) -> tuple[str, list[str]]:
    """The text, and the answers marked in it."""
    texts, answers = render_jinja_template(
        conversations=[messages],
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        **kwargs,
        **SPECIAL_TOKENS,
    )
    return texts[0], [texts[0][start:end] for start, end in answers[0]]


def with_images(name: str) -> str:
    template, family, end_of_turn = TEMPLATES[name]
    turns = recognise_turns(template, SPECIAL_TOKENS)
    assert (turns.name, turns.end_of_turn) == (family, end_of_turn)
    return add_images(template, turns, "<image>", SPECIAL_TOKENS)


CONVERSATION = [
    {"role": "user", "content": "\n Is the model an ASSISTANT: or a user? "},
    {"role": "assistant", "content": " It is [a model]\n"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "and   now?\n\n"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_of_text_are_rendered_as_before(name):
    template = TEMPLATES[name][0]
    system = [{"role": "system", "content": "Be brief. "}]
    for length in range(1, 6):
        for prompt in (False, True):
            for messages in (CONVERSATION[:length], system + CONVERSATION[:length]):
                kwargs = {"add_generation_prompt": prompt}
                if messages[0]["role"] == "system" and name in ("gemma", "mistral"):
                    for each in (template, with_images(name)):
                        with pytest.raises(Exception, match="System role not|Conversation roles must"):
                            render_with(each, messages, **kwargs)
                    continue
                expected = render_with(template, messages, **kwargs)[0]
                text, answers = render_with(with_images(name), messages, **kwargs)
                assert text == expected
                assert len(answers) == length // 2
                in_parts = [
                    {**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages
                ]
                assert render_with(with_images(name), in_parts, **kwargs) == (text, answers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_marked_up_to_the_end_of_their_turn(name):
    """What opens an answer is not, nor what the user says, whatever it looks like."""
    opening = recognise_turns(TEMPLATES[name][0], SPECIAL_TOKENS).opening
    question = f"What does {opening}mean?{TEMPLATES[name][2]}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "then?"}]},
        {"role": "assistant", "content": "second"},
    ]
    text, answers = render_with(with_images(name), messages)
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert [answer.replace(" ", "") for answer in answers] == [
        "first" + TEMPLATES[name][2],
        thought + "second" + TEMPLATES[name][2],
    ]
    assert "<image>\nthen?" in text
    for answer in answers:
        assert text.partition(answer)[0].endswith(opening)


def test_variables_of_the_template_arrive():
    text = render_with(with_images("qwen3"), CONVERSATION[:1], add_generation_prompt=True, enable_thinking=False)[0]
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    tool = {"type": "function", "function": {"name": "look"}}
    assert "look" in render_with(with_images("qwen2.5"), CONVERSATION[:1], tools=[tool])[0]


def test_marks_of_the_template_itself_are_replaced():
    own = SMOLLM2.replace(
        "+ message['content'] +", "}}{% generation %}{{ message['content'] }}{%- endgeneration -%}{{"
    )
    assert "generation" in own
    template = add_images(own, recognise_turns(own, SPECIAL_TOKENS), "<image>", SPECIAL_TOKENS)
    assert render_with(template, CONVERSATION) == render_with(with_images("smollm2"), CONVERSATION)


def test_a_message_of_other_things_is_refused():
    with pytest.raises(Exception, match="images and text, not video"):
        render_with(with_images("llama3"), [{"role": "user", "content": [{"type": "video"}]}])


def test_vicuna_is_told_what_it_was_trained_on():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions."
    )
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    expected = "<s>{} USER: hi ASSISTANT: hello</s>USER: bye ASSISTANT:"
    assert render_with(VICUNA_CHAT_TEMPLATE, messages, add_generation_prompt=True)[0] == expected.format(system)
    messages.insert(0, {"role": "system", "content": "Be brief."})
    assert render_with(VICUNA_CHAT_TEMPLATE, messages, add_generation_prompt=True)[0] == expected.format("Be brief.")


def test_unknown_templates_are_refused():
    with pytest.raises(ValueError, match="none of the known forms.*'ASSISTANT:' .Vicuna.*Pass a `chat_template`"):
        recognise_turns("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="cannot be rendered: no way"):
        recognise_turns("{{ raise_exception('no way') }}", SPECIAL_TOKENS)
