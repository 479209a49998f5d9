"""
Exact match on easy-VQA's official test questions, answered by `generate()`, per type of question.

    python -m ta_llava.evaluate_easy_vqa [MODEL] [--visual-tokens 16] [--cmai 0.6] [--questions 500] [--output results.json]
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from .easy_vqa_data import QUESTION_TYPES, load_easy_vqa, question_type, wording_prior
from .inference import DEFAULT_MODEL, answer, load


def evaluate_easy_vqa(model, processor, num_questions: int | None = None, batch_size: int = 128) -> dict:
    """
    Args:
        num_questions (`int`, *optional*):
            Evenly spaced sample of the 9,673 test questions; all of them by default.

    Returns:
        `dict`: per question type and `"all"` a dict of `questions`, `accuracy`, and `prior`, the accuracy of the most
        frequent training answer to the same wording.
    """
    test = load_easy_vqa("test")
    items = [(scene.path, question, expected) for scene in test for question, expected in scene.questions]
    if num_questions is not None:
        items = items[:: max(len(items) // num_questions, 1)][:num_questions]
    questions = [([path], question) for path, question, _ in items]
    answers = answer(model, processor, questions, batch_size=batch_size, max_new_tokens=8, progress=True)
    correct: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (_, question, expected), given in zip(items, answers):
        for name in (question_type(question, expected), "all"):
            correct[name] += given == expected
            total[name] += 1
    prior = wording_prior(load_easy_vqa("train"), test)
    return {
        name: {"questions": total[name], "accuracy": correct[name] / total[name], "prior": prior[name]}
        for name in (*QUESTION_TYPES, "all")
        if total[name]
    }


def format_table(results: dict) -> str:
    """The results as a Markdown table."""
    lines = ["| question | asked | exact match | without the image |", "|---|---:|---:|---:|"]
    for name, row in results.items():
        lines.append(f"| {name} | {row['questions']} | {row['accuracy']:.2%} | {row['prior']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match on easy-VQA's official test questions.")
    parser.add_argument("model", nargs="?", default=str(DEFAULT_MODEL))
    parser.add_argument("--visual-tokens", type=int, help="of a LLaVA: VMTC on, with so many visual tokens per image")
    parser.add_argument("--cmai", type=float, help="of a LLaVA: CMAI on, with this share inhibited in the last layer")
    parser.add_argument("--questions", type=int, help="evenly spaced sample instead of all 9,673")
    parser.add_argument("--output", type=Path, help="also write the results as JSON")
    arguments = parser.parse_args()
    loaded = load(arguments.model, arguments.visual_tokens, arguments.cmai)
    results = evaluate_easy_vqa(*loaded, num_questions=arguments.questions)
    print(format_table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
