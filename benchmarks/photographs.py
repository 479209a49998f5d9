"""
Compares VMTC with its rivals at equal tokens on photographs: accuracy without training and after a short one, time and
operations. TA-LLaVA answers the same questions.

    PYTHONPATH=experiments python benchmarks/photographs.py --data GroceryStoreDataset

The photographs are those of the public GroceryStoreDataset (`grocery_questions.py`). Sizes of models and training are in
`photographs.yaml`. The output folder keeps finished work: rerun the same command to resume. The results are a JSON file with
all scores, and tables in Markdown.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import yaml
from compare_with_llava import describe_machine
from grocery_questions import read_photos
from jobs import Job, run_jobs
from photograph_answers import (
    ALL_TOKENS,
    CMAI,
    PRESET_AND_CMAI,
    TOME,
    Prompts,
    answer_with_llava,
    answer_with_ta_llava,
    compute_compressed,
    compute_tower_outputs,
    methods,
    tower_method,
    tune_llava,
    vmtc_variants,
)
from photograph_models import (
    cache_training_features,
    data_of,
    prepare,
    ta_llava_name,
    train_language_model,
    train_llava,
    train_ta_llava,
    trained_model,
)
from photograph_tables import (
    Results,
    cell,
    format_average,
    format_differences,
    format_ta_llava,
    format_times,
    format_types,
)
from rival_towers import read_tower
from rivals import RIVALS
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ta_llava.analysis.cost import CPU_ATTENTION
from ta_llava.common.files import write_text


CONFIG = Path(__file__).parent / "photographs.yaml"
IMAGES = 8  # timed at once
ROUNDS = 3
QUESTION = "What kind of product is this?"  # of the prefills that are timed or counted


# --- jobs ----------------------------------------------------------------------------------------------------------


def list_jobs(config: dict[str, Any]) -> list[list[Job]]:
    """All jobs. The jobs of a list need those of the lists before it. The comparison without training comes first."""
    seeds = config["seeds"]
    prefixes = [
        (ta_llava_name(length, blind), (seed, length, blind))
        for seed in seeds
        for length in config["prefix_lengths"]
        for blind in (False, True)
    ]
    llavas = [Job(f"train-llava-{seed}", train_llava, (seed,)) for seed in seeds]
    language_models = [Job(f"train-text-{seed}", train_language_model, (seed,)) for seed in seeds]
    answers, tuned = (
        [
            Job(f"{kind}-{seed}-{name}-{budget}", function, (seed, name, budget))
            for seed in seeds
            for name, budget in list_asked(config, kind == "tuned")
        ]
        for kind, function in (("answers", answer_with_llava), ("tuned", tune_llava))
    )
    ta_llavas = [Job(f"train-{name}-{arguments[0]}", train_ta_llava, arguments) for name, arguments in prefixes]
    ta_answers = [
        Job(f"answers-{name}-{arguments[0]}", answer_with_ta_llava, arguments) for name, arguments in prefixes
    ]
    return [
        [Job("features-llava", cache_training_features, ("llava",))],
        llavas + list_tower_jobs(config, "test"),
        answers,
        [
            Job("features-ta_llava", cache_training_features, ("ta_llava",)),
            *language_models,
            *list_tower_jobs(config, "tuning"),
        ],
        tuned + ta_llavas,
        ta_answers,
    ]


def list_asked(config: dict[str, Any], tuned: bool) -> list[tuple[str, int | None]]:
    """The methods with which a LLaVA is asked, and their visual tokens, without training or after a short one."""
    by_budget = [(name, budget) for budget in config["budgets"] for name in methods(config, tuned)]
    return [(ALL_TOKENS, None), (CMAI, None), *by_budget]


def list_tower_jobs(config: dict[str, Any], split: str) -> list[Job]:
    """The vision tower on the pictures of a split: its output for the rivals, and the methods that work inside it."""
    names = [name for name in methods(config, split == "tuning") if name in (*vmtc_variants(config), TOME)]
    inside = [(name, budget) for name in names for budget in config["budgets"]]
    return [Job(f"tower-{split}", compute_tower_outputs, (split,))] + [
        Job(f"tower-{split}-{name}-{budget}", compute_compressed, (split, name, budget)) for name, budget in inside
    ]


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """
    Remembers the config of a folder. A later run may add seeds, budgets, prefix lengths and variants of VMTC.

    Raises:
        `ValueError`: The folder was begun with other sizes.
    """
    path = folder / "config.json"
    fixed = {
        name: value for name, value in config.items() if name not in ("data", "seeds", "budgets", "prefix_lengths")
    }
    begun_with = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else fixed
    growing = ("vmtc", "ablations")
    for name in fixed.keys() | begun_with.keys():
        now, then = fixed.get(name), begun_with.get(name)
        if name in growing and now is not None and then is not None:
            common = now.keys() & then.keys()
            now, then = ({key: variants[key] for key in common} for variants in (now, then))
        if now != then:
            raise ValueError(f"{folder} was begun with `{name}` {then}, not {now}. Choose another --output-dir.")
    write_text(path, json.dumps(fixed | {name: begun_with[name] | fixed[name] for name in growing}, indent=1))


# --- time ----------------------------------------------------------------------------------------------------------


def measure_times(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """
    Time and operations of the tower with each method, and of the prefill, in turns. The file `times.json` keeps them.
    """
    path = folder / "times.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    name = f"llava-{config['seeds'][0]}"
    model, processor = trained_model(folder, name)
    pixels = torch.randn(IMAGES, 3, config["image_size"], config["image_size"])
    calls = list_calls(folder / name / "trained", config, model, processor, pixels)
    seconds: dict[tuple[str, int, str], list[float]] = {key: [] for key in calls}
    with torch.no_grad():
        for number in tqdm(range(ROUNDS + 1), desc="times", unit="round"):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                if number > 0:  # the first warms up
                    seconds[key].append(time.perf_counter() - start)
        operations = {key: count_operations(call) for key, call in calls.items()}
    torch.set_num_threads(num_threads)
    rows = [
        {"method": method, "tokens": tokens}
        | {f"{part}_s": median(seconds[method, tokens, part]) for part in ("tower", "prefill")}
        | {f"{part}_operations": operations[method, tokens, part] // IMAGES for part in ("tower", "prefill")}
        for method, tokens, part in calls
        if part == "tower"
    ]
    times = {"machine": describe_machine(torch.float32), "rounds": ROUNDS, "images": IMAGES, "rows": rows}
    write_text(path, json.dumps(times, indent=1))
    return times


def list_calls(
    source: Path, config: dict[str, Any], model: Any, processor: Any, pixels: torch.Tensor
) -> dict[tuple[str, int, str], Callable[[], Any]]:
    """What is timed, by method, visual tokens and part ("tower" with the method, or "prefill")."""
    all_tokens = model.get_vision_features(pixels).shape[1]
    calls: dict[tuple[str, int, str], Callable[[], Any]] = {}

    def add(method: str, budget: int, tower: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            features = tower()
        ids = torch.tensor([Prompts(processor, features.shape[1])(QUESTION)] * IMAGES)
        calls[method, budget, "tower"] = tower
        calls[method, budget, "prefill"] = lambda: model(input_ids=ids, vision_features=features, logits_to_keep=1)

    add(ALL_TOKENS, all_tokens, lambda: model.get_vision_features(pixels))
    for budget in config["budgets"]:
        for method in methods(config):
            if method == PRESET_AND_CMAI:  # with the tower of the preset; `compare_vmtc_cmai.py` times CMAI
                continue
            if method in RIVALS:
                add(method, budget, lambda method=method, budget=budget: run_rival(model, pixels, method, budget))
            else:
                run = tower_method(source, config, method, budget)
                add(method, budget, lambda run=run: run(pixels))
    return calls


def run_rival(model: Any, pixels: torch.Tensor, method: str, budget: int) -> torch.Tensor:
    output = read_tower(model, pixels)
    if method == "DivPrune":
        output.projected = model.model.multi_modal_projector(output.tokens)
    return RIVALS[method](output, budget)


def count_operations(call: Callable[[], Any]) -> int:
    """Floating point operations of matrix products."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def count_ta_llava(folder: Path, config: dict[str, Any], length: int, blind: bool) -> int:
    """Operations of the prefill of a TA-LLaVA behind the tower, for one image."""
    model, processor = trained_model(folder, f"{ta_llava_name(length, blind)}-{config['seeds'][0]}")
    vision = model.config.vision_config
    features = torch.zeros(1, 1, (config["image_size"] // vision.patch_size) ** 2, vision.hidden_size)
    ids = torch.tensor([Prompts(processor, blind=blind)(QUESTION)])
    with torch.no_grad():
        return count_operations(lambda: model(input_ids=ids, vision_features=features, logits_to_keep=1))


# --- results -------------------------------------------------------------------------------------------------------


def write_results(folder: Path, config: dict[str, Any], out: Path) -> None:
    """
    Writes `photographs.json` and `photographs.md` to the folder `out`: the comparison without training, and the other parts
    of the run that are finished.
    """
    data = data_of(folder, config)
    results = Results(folder, config, data)
    if not results.has_llava(tuned=False):
        return
    times = measure_times(folder, config)
    seeds = ", ".join(map(str, config["seeds"]))
    over = (
        f"questions and {len(config['seeds'])} seeds" if len(config["seeds"]) > 1 else "questions (there is one seed)"
    )
    head = (
        f"# Photographs\n\n{len(data.questions)} questions about {config['test_photographs']} photographs and "
        f"{config['test_grids']} grids of the official test split; seeds {seeds}. ± is half of a 95 % interval over {over}. "
        f"The language model has {config['language_model']['num_hidden_layers']} layers of width "
        f"{config['language_model']['hidden_size']}. The LLaVAs were trained with all visual tokens of DINOv2-small."
    )
    finished = [tuned for tuned in (False, True) if results.has_llava(tuned)]
    prefixes = [
        (length, blind)
        for length in config["prefix_lengths"]
        for blind in (False, True)
        if results.has(ta_llava_name(length, blind), "all")
    ]
    parts = [part(results, tuned) for tuned in finished for part in (format_average, format_differences)]
    parts += [format_types(results)]
    if prefixes:
        operations = {prefix: count_ta_llava(folder, config, *prefix) for prefix in prefixes}
        parts.append(format_ta_llava(results, operations, times))
    write_text(out / "photographs.md", "\n\n".join([head, *parts, format_times(times)]) + "\n")
    accuracy = {
        f"{method}-{budget or 'all'}{'-tuned' if tuned else ''}": {
            name: cell(draws) for name, draws in results.llava(method, budget, tuned).items()
        }
        for tuned in finished
        for method, budget in list_asked(config, tuned)
    }
    accuracy |= {
        name: {column: cell(draws) for column, draws in results.read(name, "all").items()}
        for name in (ta_llava_name(*prefix) for prefix in prefixes)
    }
    record = {
        "config": {name: value for name, value in config.items() if name != "data"},
        "vmtc": vmtc_variants(config),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "accuracy": accuracy,
        "times": times,
    }
    write_text(out / "photographs.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the GroceryStoreDataset")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to train with (default: those of the config)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs at a time, each on one core")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    config["data"] = str(arguments.data)
    config["seeds"] = arguments.seeds or config["seeds"]
    try:
        read_photos(arguments.data)
        check_config(arguments.output_dir, config)
    except ValueError as error:
        sys.exit(str(error))
    prepare(arguments.output_dir, config)
    failed = run_jobs(arguments.output_dir, config, list_jobs(config), arguments.workers)
    write_results(arguments.output_dir, config, arguments.results)
    if failed:
        sys.exit(f"{len(failed)} jobs failed: {', '.join(failed)}. Rerun the same command to retry only these.")


if __name__ == "__main__":
    main()
