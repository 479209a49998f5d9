"""Chat templates: recognises how they write an answer, and turns those of language models into templates with images."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..common.errors import one_line


# Gemma's turns. `<image>` and `<video>` stand where an image or video is; the processor moves all of them into the prefix.
# Answers are marked for `apply_chat_template(..., return_assistant_tokens_mask=True)`.
GEMMA_CHAT_TEMPLATE = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}{%- for item in content -%}"
    "{%- if item['type'] in ('image', 'video') -%}{{ '<' + item['type'] + '>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] }}"
    "{%- else -%}{{ raise_exception('A message holds images, videos and text, not ' + item['type'] + '.') }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<start_of_turn>model\n' }}{% generation %}{{ render(message['content']) | trim }}"
    "{{ '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + render(message['content']) | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Turns:
    """
    How a family of chat templates writes an answer.

    Args:
        name (`str`): Name of the family.
        opening (`str`): Text before an answer and at the end of a prompt. Without the white space at its end it is the
            response marker.
        end_of_turn (`str`, *optional*): Token after an answer. `None` stands for the tokenizer's EOS token.
    """

    name: str
    opening: str
    end_of_turn: str | None = None


FAMILIES = (
    Turns("Gemma", "<start_of_turn>model\n", "<end_of_turn>"),
    Turns("ChatML", "<|im_start|>assistant\n", "<|im_end|>"),
    Turns("Llama-3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    Turns("Llama-2 and Mistral", "[/INST]"),
    Turns("Vicuna", "ASSISTANT:"),
)

# Vicuna's checkpoints have no template. They and LLaVA-1.5 were trained on what this one writes.
VICUNA_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] | trim }}"
    '{%- else -%}{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions.\" }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ (' ' if loop.index0 < 2 else '') + 'USER: ' + message['content'] | trim }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' + message['content'] | trim + eos_token }}"
    "{%- elif not loop.first -%}{{ raise_exception('Only the first message may be a system message.') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)

# Two questions and answers, with words that must not be taken for a response marker.
_PROBE = [
    {"role": "user", "content": "Is the model an assistant?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "ASSISTANT or USER?"},
    {"role": "assistant", "content": "Second answer."},
]


def recognise_turns(chat_template: str, special_tokens: dict[str, str]) -> Turns:
    """
    Finds the family of a chat template by what it writes around the answers of a conversation.

    Args:
        chat_template (`str`): A Jinja template for conversations of text.
        special_tokens (`dict[str, str]`): Variables of the template, such as `bos_token` and `eos_token`.

    Returns:
        [`Turns`], always with an `end_of_turn`.

    Raises:
        `ValueError`: The template belongs to none of the families, or cannot be rendered.
    """
    told = _render(chat_template, _PROBE, special_tokens)[0]
    prompt = _render(chat_template, _PROBE[:1], special_tokens, add_generation_prompt=True)[0]
    between, _, rest = told.partition(_PROBE[0]["content"])[2].partition(_PROBE[1]["content"])
    opened = prompt.partition(_PROBE[0]["content"])[2]
    for turns in FAMILIES:
        end_of_turn = turns.end_of_turn or special_tokens.get("eos_token")
        if (
            turns.opening in between
            and turns.opening in opened
            and end_of_turn
            and rest.strip().startswith(end_of_turn)
        ):
            return replace(turns, end_of_turn=end_of_turn)
    raise ValueError(
        f"The chat template writes {between!r} before an answer and {rest[:40]!r} after it, and ends a prompt with "
        f"{opened!r}, which is none of the known forms: "
        + ", ".join(f"{turns.opening.strip()!r} ({turns.name})" for turns in FAMILIES)
        + ". Pass a `chat_template` of one of them."
    )


def add_images(
    chat_template: str, turns: Turns, image_token: str, special_tokens: dict[str, str], video_token: str | None = None
) -> str:
    """
    Makes a chat template take images, and videos if there is a `video_token`. The given template still renders the
    conversation, so that one of text comes out the same, errors included.

    Before it runs, the content of each message is made a string: an image becomes its token and a line break. Its output is
    then taken apart at `turns`, so that each answer, with its end-of-turn token, is marked for
    `apply_chat_template(..., return_assistant_tokens_mask=True)`.

    Args:
        chat_template (`str`): The template of a language model.
        turns ([`Turns`]): Its family, as `recognise_turns` gives it.
        image_token (`str`): Token that the processor takes for an image.
        special_tokens (`dict[str, str]`): As for `recognise_turns`.
        video_token (`str`, *optional*): Token that the processor takes for a video.

    Raises:
        `ValueError`: The template cannot be taken apart.
    """
    # Marks of the template itself would count from the wrong place.
    without_marks = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", chat_template)
    without_marks = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", without_marks)
    with_images = (
        _contents_as_strings(image_token, video_token)
        # Jinja removes the line break after the tag, like one at the end of a file. It may remove no others.
        + "{%- set rendered %}\n"
        + without_marks.removesuffix("\n")
        + "{{ '' }}{% endset -%}"
        + _marked_answers(turns)
    )
    told, answers = _render(with_images, _PROBE, special_tokens, return_assistant_tokens_mask=True)
    marked = [told[start:end] for start, end in answers]
    expected = [message["content"] for message in _PROBE if message["role"] == "assistant"]
    if (
        told != _render(chat_template, _PROBE, special_tokens)[0]
        or len(marked) != len(expected)
        or not all(answer in text and text.endswith(str(turns.end_of_turn)) for answer, text in zip(expected, marked))
    ):
        raise ValueError(
            f"The chat template does not write its answers as {turns.name} does; {marked} were taken for them."
        )
    return with_images


def _contents_as_strings(image_token: str, video_token: str | None) -> str:
    """The part of a template that makes the content of each of `messages` a string."""
    contents = {"image": json.dumps(image_token + "\n")}
    if video_token is not None:
        contents["video"] = json.dumps(video_token + "\n")
    contents["text"] = "item['text']"
    kinds = "images and text" if video_token is None else "images, videos and text"
    return (
        "{%- set chat = namespace(messages=[], content='', rest='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is defined and message['content'] is sequence and message['content'] is not string -%}"
        "{%- set chat.content = '' -%}"
        "{%- for item in message['content'] -%}"
        "{%- if "
        + "{%- elif ".join(
            f"item['type'] == '{kind}' -%}}{{%- set chat.content = chat.content + {content} -%}}"
            for kind, content in contents.items()
        )
        + "{%- else -%}{{ raise_exception('A message holds "
        + kinds
        + ", not ' + item['type'] + '.') }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set chat.messages = chat.messages + [dict(message, content=chat.content)] -%}"
        "{%- else -%}{%- set chat.messages = chat.messages + [message] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = chat.messages -%}"
    )


def _marked_answers(turns: Turns) -> str:
    """The part of a template that writes `rendered` with its answers marked."""
    opening, end_of_turn = json.dumps(turns.opening), json.dumps(turns.end_of_turn)
    return (
        "{%- set chat.rest = rendered -%}"
        "{%- for message in messages -%}"
        "{%- set parts = chat.rest.split(" + opening + ", 1) -%}"
        "{%- if message['role'] == 'user' and message['content'] is string and message['content'] | trim -%}"
        # What the user says may look like the opening of an answer.
        "{%- set parts = chat.rest.split(message['content'] | trim, 1) -%}"
        "{%- if parts | length == 2 -%}"
        "{{ parts[0] + message['content'] | trim }}{%- set chat.rest = parts[1] -%}"
        "{%- endif -%}"
        "{%- elif message['role'] == 'assistant' and parts | length == 2 -%}"
        "{{ parts[0] + " + opening + " }}"
        "{%- set answer = parts[1].split(" + end_of_turn + ", 1) -%}"
        "{%- if answer | length == 2 -%}"
        "{% generation %}{{ answer[0] + " + end_of_turn + " }}{% endgeneration %}{%- set chat.rest = answer[1] -%}"
        "{%- else -%}{%- set chat.rest = parts[1] -%}{%- endif -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{{ chat.rest }}"
    )


def _render(
    chat_template: str, messages: list[dict], special_tokens: Mapping[str, Any], **kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and start and end of each answer if `return_assistant_tokens_mask` asks for them."""
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages], chat_template=chat_template, **kwargs, **special_tokens
        )
    except Exception as error:  # templates are programs and may fail in any way
        raise ValueError(f"The chat template cannot be rendered: {one_line(error)[:300]}") from error
    texts, answers = rendered
    return texts[0], answers[0] if answers else []
