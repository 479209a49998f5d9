"""
Makes both systems models of lmms-eval, which scores them on POPE, VQAv2, MME and others by its own tasks and metrics.

    lmms-eval --model ta_llava --model_args pretrained=checkpoints/ta-llava-tiny --batch_size 8 --tasks pope
    lmms-eval --model vmtc_cmai_llava --model_args pretrained=llava-hf/llava-1.5-7b-hf,visual_tokens=64,cmai=0.6 --tasks gqa

lmms-eval finds them by this package's entry point in the group `lmms_eval.models`, which names `manifests`.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.utils import logging

from ..common.families import LLAVA_TYPES
from ..common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ..image_loading import load_rgb_image
from ..inference import GREEDY, load


try:
    from lmms_eval.api.model import lmms
    from lmms_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ImportError(f"lmms-eval cannot be imported: {error}. Is it installed? `pip install lmms-eval`") from error


logger = logging.get_logger(__name__)

T = TypeVar("T")

# The limit of lmms-eval's own LLaVA for tasks that name none.
DEFAULT_MAX_NEW_TOKENS = 1024

# Arguments of `generate()` that a task may set. The second group matters only when sampling.
_DECODING = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")


def generation_settings(gen_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    Reads the `gen_kwargs` of a request. As in lmms-eval's own models, a temperature above 0 is enough to sample, and a blank
    line does not end an answer: lmms-eval adds that ending to every task that names none.

    Returns:
        Arguments of `generate()`, and the strings that end an answer.
    """
    do_sample, temperature = gen_kwargs.get("do_sample"), gen_kwargs.get("temperature")
    sample = temperature != 0 and bool(temperature if do_sample is None else do_sample)
    names = (*_DECODING, *_SAMPLING) if sample else _DECODING
    settings = {name: gen_kwargs[name] for name in names if gen_kwargs.get(name) is not None}
    unknown = gen_kwargs.keys() - {*_DECODING, *_SAMPLING, "do_sample", "until"}
    if unknown:
        logger.warning_once(f"This model ignores unknown gen_kwargs: {', '.join(sorted(unknown))}.")
    until = gen_kwargs.get("until") or []
    stops = [until] if isinstance(until, str) else until
    return (
        {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "num_beams": 1, "do_sample": sample, **settings},
        [stop for stop in stops if stop and stop != "\n\n"],
    )


def user_content(text: str, num_images: int, image_token: str) -> list[dict[str, str]]:
    """
    The content of a message: its images take the places of `image_token` in the text, or come first if there is none.

    Raises:
        `ValueError`: The text has another number of `image_token`s than images.
    """
    parts = text.split(image_token)
    if len(parts) == 1:
        return [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    if len(parts) - 1 != num_images:
        raise ValueError(
            f"The task's text has {len(parts) - 1} {image_token}, but there are {num_images} images: {text[:200]!r}. The "
            f"numbers must be equal, or the text must have no {image_token}; the images then come first."
        )
    content = []
    for part, follows in zip_longest(parts, [True] * num_images):
        if part.strip():
            content.append({"type": "text", "text": part})
        if follows:
            content.append({"type": "image"})
    return content


class _Answers(Sequence[T]):
    """
    Results in order, each computed when it is first read. lmms-eval takes a list of them and writes one after the other to
    its cache (`--use_cache`), so that an interruption loses no answer.
    """

    def __init__(self, results: Generator[T], length: int):
        self._results, self._length = results, length
        self._found: list[T] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        wanted = range(self._length)[index]
        last = max(wanted, default=-1) if isinstance(wanted, range) else wanted
        while len(self._found) <= last:
            self._found.append(next(self._results))
            if len(self._found) == self._length:
                self._results.close()  # and the progress bar with it
        return self._found[index]


class _Model(lmms):
    """The base of the two models. `model_types` are the types of the configs that a model takes."""

    is_simple = True  # gets text and images instead of messages, and also the tasks that rank given answers
    model_types: tuple[str, ...]

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        visual_tokens: int | None = None,
        cmai: float | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"The batch size must be a number from 1, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        if torch.cuda.is_available():  # each process has its own GPU
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model: Any
        self.processor: Any
        model, self.processor = load(pretrained, visual_tokens, cmai)
        if model.config.model_type not in self.model_types:
            raise ValueError(
                f"{pretrained} is a {model.config.model_type!r} model, not {' or '.join(map(repr, self.model_types))}. Use "
                "`--model ta_llava` for a TA-LLaVA and `--model vmtc_cmai_llava` for a LLaVA."
            )
        self.model = model.to(device or model.device)
        self.device = self.model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None):
        """
        Makes the model of `--model_args`. `additional_config` has the other options of the command line. It always has a
        `batch_size`; a `batch_size` in `--model_args` overrides it.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def generate_until(self, requests: list[Any]) -> Sequence[str]:
        """
        Answers requests `(text, gen_kwargs, doc_to_visual, doc_id, task, split)`, in their order. Requests with the same
        `gen_kwargs` are answered in batches; the size of a batch does not change an answer.

        Raises:
            `ValueError`: An image cannot be read, or a text has places for another number of images. This is raised when
                the request is reached.
        """
        return _Answers(self._generate_until(requests), len(requests))

    def _generate_until(self, requests: list[Any]) -> Generator[str]:
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[str(sorted(request.args[1].items()))].append(index)
        answers: dict[int, str] = {}
        num_given = 0
        with self._progress_bar(len(requests)) as bar:
            for indices in groups.values():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    answers.update(zip(batch, self._generate([requests[index].args for index in batch])))
                    bar.update(len(batch))
                    while num_given in answers:
                        yield answers.pop(num_given)
                        num_given += 1

    @torch.no_grad()
    def _generate(self, batch: list[tuple]) -> list[str]:
        """Answers to requests with the same `gen_kwargs`."""
        settings, stops = generation_settings(batch[0][1])
        prompts, images = [], []
        for text, _, *source in batch:
            images_of_row = self._images(*source)
            prompts.append(self._prompt(text, len(images_of_row)))
            images += images_of_row
        inputs = self._encode(prompts, images)
        output = self.model.generate(**inputs, **{**GREEDY, **settings})
        answers = self.processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
        for stop in stops:
            answers = [answer.partition(stop)[0] for answer in answers]
        return [answer.strip() for answer in answers]

    def loglikelihood(self, requests: list[Any]) -> Sequence[tuple[float, bool]]:
        """
        Computes how likely given answers are, for requests `(text, answer, doc_to_visual, doc_id, task, split)`. The chat
        template writes the answer, so white space around it does not count, nor does the end of the turn. An answer may be
        a function of the document. A request that ends with its answer has no image.

        Returns:
            For each request, in order, the sum of the log-probabilities of the answer's tokens, and whether each of them is
            the likeliest.

        Raises:
            `ValueError`: An answer is empty (found before any work), or the errors of `generate_until`.
        """
        answers = [self._answer(*request.args[1:]) for request in requests]
        for request, answer in zip(requests, answers):
            if not answer:
                raise ValueError(f"The answer to rank is empty, after {request.args[0][-200:]!r}.")
        return _Answers(self._loglikelihood(requests, answers), len(requests))

    def _loglikelihood(self, requests: list[Any], answers: list[str]) -> Generator[tuple[float, bool]]:
        with self._progress_bar(len(requests)) as bar:
            for start in range(0, len(requests), self.batch_size):
                batch = slice(start, start + self.batch_size)
                scores = self._score([request.args for request in requests[batch]], answers[batch])
                bar.update(len(scores))
                yield from scores

    @torch.no_grad()
    def _score(self, batch: list[tuple], answers: list[str]) -> list[tuple[float, bool]]:
        texts, images, lengths = [], [], []
        for (text, _, *source), answer in zip(batch, answers):
            images_of_row = self._images(*source) if source else []
            prompt = self._prompt(text, len(images_of_row))
            whole = self._prompt(text, len(images_of_row), answer)
            texts.append(whole)
            images += images_of_row
            lengths.append(self._count_new_tokens(prompt, whole))
        inputs = self._encode(texts, images)
        # Padding is on the left, so the rows end with the answers. Positions are counted as `generate()` does.
        longest = max(lengths)
        position_ids = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
        logits = self.model(**inputs, position_ids=position_ids, logits_to_keep=longest + 1, use_cache=False).logits
        log_probs = logits[:, :-1].float().log_softmax(dim=-1)
        targets = inputs["input_ids"][:, -longest:]
        of_targets = log_probs.gather(-1, targets[..., None]).squeeze(-1)
        is_likeliest = log_probs.argmax(dim=-1) == targets
        return [
            (of_targets[row, -length:].sum().item(), bool(is_likeliest[row, -length:].all()))
            for row, length in enumerate(lengths)
        ]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported.")

    def _progress_bar(self, total: int) -> tqdm:
        return tqdm(total=total, unit="question", disable=self.rank != 0)

    def _answer(self, answer: str | Callable, *source: Any) -> str:
        if not isinstance(answer, str):
            _, doc_id, task, split = source
            answer = answer(self.task_dict[task][split][doc_id])
        return str(answer).strip()

    def _images(self, doc_to_visual: Callable, doc_id: Any, task: str, split: str) -> list[Image.Image]:
        """The images of a document, if it has any."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return [load_rgb_image(visual) for visual in visuals or []]

    def _prompt(self, text: str, num_images: int, answer: str | None = None) -> str:
        """
        A question as the chat template writes it, up to the start of the answer; with an answer, up to the answer's end.

        Raises:
            `ValueError`: The template does not write the answer after the prompt.
        """
        content = user_content(text, num_images, self.processor.image_token)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if answer is None:
            return prompt
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.processor.apply_chat_template(messages, tokenize=False)
        start = text.find(answer, len(prompt)) if text.startswith(prompt) else -1
        if start < 0:
            raise ValueError(
                f"The chat template does not write {answer!r} after {prompt[-40:]!r}, but {text[-80:]!r}."
            )
        return text[: start + len(answer)]

    def _count_new_tokens(self, prompt: str, whole: str) -> int:
        """Number of tokens of `whole` from the first one that differs from those of `prompt`, its beginning."""
        old, new = self.processor.tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
        shared = next((index for index, pair in enumerate(zip(old, new)) if pair[0] != pair[1]), len(old))
        return len(new) - shared

    def _encode(self, texts: list[str], images: list[Image.Image]) -> BatchFeature:
        """Inputs of the model, padded on the left, with one BOS token even if the template has written it."""
        bos_token = self.processor.tokenizer.bos_token
        return self.processor(
            text=texts,
            images=images or None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos_token and texts[0].startswith(bos_token)),
        ).to(self.device)


class TaLlavaLmms(_Model):
    """
    A TA-LLaVA in lmms-eval, `--model ta_llava`.

    Args:
        pretrained (`str`): Folder or Hub repo.
        batch_size (`int` or `str`): Questions answered at a time.
        device (`str`, *optional*): Defaults to the GPU if there is one.

    Raises:
        `ValueError`: No TA-LLaVA can be loaded from there, or the batch size is wrong.
    """

    model_types = ("ta_llava",)

    def __init__(self, pretrained: str = str(DEFAULT_MODEL), batch_size: int | str = 1, device: str | None = None):
        super().__init__(pretrained, batch_size, device)


class VmtcCmaiLlavaLmms(_Model):
    """
    A LLaVA in lmms-eval, `--model vmtc_cmai_llava`, with VMTC and CMAI. Settings that you don't pass are those of its
    config; in a stock checkpoint both are off.

    Args:
        pretrained, batch_size, device: See [`TaLlavaLmms`].
        visual_tokens (`int`, *optional*): Turn VMTC on and keep this many visual tokens per image.
        cmai (`float`, *optional*): Turn CMAI on and inhibit this share of the image tokens in the last layer; 0 turns it
            off.

    Raises:
        `ValueError`: No LLaVA can be loaded from there, or the batch size, visual tokens or share are wrong.
    """

    model_types = LLAVA_TYPES

    def __init__(
        self,
        pretrained: str = str(DEFAULT_LLAVA),
        batch_size: int | str = 1,
        device: str | None = None,
        visual_tokens: int | None = None,
        cmai: float | None = None,
    ):
        super().__init__(pretrained, batch_size, device, visual_tokens, cmai)


def manifests() -> list:
    """The two models, for lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest  # lmms-eval imports this module while it loads its models

    return [
        ModelManifest(model_id=name, simple_class_path=f"{model.__module__}.{model.__name__}")
        for name, model in (("ta_llava", TaLlavaLmms), ("vmtc_cmai_llava", VmtcCmaiLlavaLmms))
    ]
