import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ta_llava.building.chat_templates import GEMMA_CHAT_TEMPLATE, VICUNA_CHAT_TEMPLATE, add_images, recognise_turns


# As the language models have them.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == "
    "'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + "
    "role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_2_5 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "# Tools\n\n" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
# Its way with an answer: an empty thought before the last one, none before the others.
QWEN_3 = """{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last_query_index == messages|length - 1 and index != ns.last_query_index %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and loop.last %}
            {{- '<|im_start|>' + message.role + '\n<think>\n\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ "
    "bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + "
    "content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set "
    "content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if "
    "message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
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
