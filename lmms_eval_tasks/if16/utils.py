"""
lmms-eval's task `if16`: a question about each image with each of the 16 instructions. `ta-llava evaluate --task if16` asks
the same about easy-VQA, and the same programs check the answers.
"""

import json
import os

from datasets import Dataset
from PIL import Image

from ta_llava.evaluation.instruction_following import Prompt, build_prompts, check, load_checkers
from ta_llava.evaluation.questions import read_questions
from ta_llava.evaluation.tasks import one_per_image
from ta_llava.image_loading import load_rgb_image


load_checkers()  # they may be missing, which must be known before the model is asked


def if16_process_docs(samples: Dataset) -> Dataset:
    """
    Builds the prompts about samples in LLaVA's format: 16 about the question of the first image, then 16 about that of the
    next. If an image has several questions, the last one is asked.

    Returns:
        `Dataset`: `task`, `images` (paths as in the samples), `question`, `prompt` and `arguments` (as JSON, since each task
        has other arguments).

    Raises:
        `ValueError`: A sample is not one question and its answer.
    """
    questions = one_per_image(read_questions(samples, "", "the data of if16"))
    prompts = build_prompts([(question.images, question.text) for question in questions])
    return Dataset.from_list([{**vars(prompt), "arguments": json.dumps(prompt.arguments)} for prompt in prompts])


def if16_doc_to_visual(doc: dict, lmms_eval_specific_kwargs: dict) -> list[Image.Image]:
    folder = lmms_eval_specific_kwargs["image_folder"]
    return [load_rgb_image(os.path.join(folder, image)) for image in doc["images"]]


def if16_doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict) -> str:
    return doc["prompt"]


def if16_process_results(doc: dict, results: list[str]) -> dict:
    """Whether the answer follows the instruction, for the metric of its task and for the average."""
    followed = check(Prompt(**{**doc, "arguments": json.loads(doc["arguments"])}), results[0])
    return {doc["task"]: float(followed), "average": {"task": doc["task"], "followed": followed}}


def if16_average(outcomes: list[dict]) -> float:
    """The mean of the tasks' success rates."""
    by_task: dict[str, list[bool]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome["task"], []).append(outcome["followed"])
    return sum(sum(followed) / len(followed) for followed in by_task.values()) / len(by_task)
