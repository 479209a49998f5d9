"""
Repeats the tables of both papers with small models (`small_models.py`) on grids of shapes, trained and measured with each
seed of `tables.yaml`.

    python experiments/tables.py --output-dir runs/tables --results benchmarks/results

The output folder keeps finished work: rerun the same command to resume. The results are named after the config: a JSON file
with all scores, the tables in Markdown, a picture of TA-LLaVA's accuracy against its operations, and one of the scores of
VMTC and CMAI. `--config experiments/tables_smollm2.yaml` uses a larger language model.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from jobs import Job, run_jobs
from scipy import stats
from small_models import (
    EROSION_STAGES,
    IMAGE,
    OWN_DESCRIPTION,
    TRUE_DESCRIPTION,
    Parts,
    compute_features,
    count_operations,
    make_language_model,
    measure_erosion,
    measure_llava,
    train_and_measure_ta_llava,
    train_llava,
    write_tower,
)

from ta_llava.common.files import write_text
from ta_llava.evaluation.instruction_following import TASKS


CONFIG = Path(__file__).parent / "tables.yaml"
CONFIDENCE = 0.95


# --- jobs ----------------------------------------------------------------------------------------------------------


def list_jobs(config: dict[str, Any]) -> list[list[Job]]:
    """All jobs. The jobs of a list need those of the lists before it."""
    towers = {tower_name(fields): tower_fields(fields) for fields in config["variants"].values()}
    parts = [Job("language-model", make_language_model, ())]
    parts += [Job(f"features-{name}", compute_features, (name, fields)) for name, fields in towers.items()]
    bases = [Job(f"llava-{seed}", train_llava, (seed,)) for seed in config["seeds"]]
    variants = [
        Job(
            f"llava-{name}-{'trained' if trained else 'training-free'}-{seed}",
            measure_llava,
            (seed, name, tower_name(fields), fields, trained, name == "base" and not trained),
        )
        for trained in (False, True)
        for seed in config["seeds"]
        for name, fields in config["variants"].items()
    ]
    prefixes = [
        Job(f"ta-llava-{length}{'-blind' if blind else ''}-{seed}", train_and_measure_ta_llava, (seed, length, blind))
        for seed in config["seeds"]
        for length in sorted(config["prefix_lengths"], reverse=True)
        for blind in (False, True)
    ]
    if not config["tuned_on_instructions"]:
        named = {name: (tower_name(fields), fields) for name, fields in config["variants"].items() if name != "base"}
        variants += [Job(f"erosion-{seed}", measure_erosion, (seed, named)) for seed in config["seeds"]]
    return [parts, bases + prefixes, variants]


def tower_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant that change its vision tower: all but those of CMAI."""
    return {name: value for name, value in fields.items() if not name.startswith(("use_cmai", "cmai_"))}


def tower_name(fields: dict[str, Any]) -> str:
    return (
        "-".join(f"{name}-{value}" for name, value in sorted(tower_fields(fields).items()) if value is not True)
        or "base"
    )


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """
    Remembers the config of a folder. A later run may add seeds, variants and prefix lengths.

    Raises:
        `ValueError`: The folder was begun with another config, or there are fewer than two seeds.
    """
    if len(config["seeds"]) < 2:
        raise ValueError(f"A confidence interval needs at least 2 seeds, got {config['seeds']}.")
    path = folder / "config.json"
    begun_with = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else config
    for name in config.keys() | begun_with.keys():
        now, then = config.get(name), begun_with.get(name)
        if name == "variants":
            both = config[name].keys() & begun_with[name].keys()
            now, then = {key: config[name][key] for key in both}, {key: begun_with[name][key] for key in both}
        if name not in ("seeds", "prefix_lengths") and now != then:
            raise ValueError(f"{folder} was begun with `{name}` {then}, not {now}. Choose another --output-dir.")
    write_text(path, json.dumps({**config, "variants": begun_with["variants"] | config["variants"]}, indent=1))


# --- results -------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its confidence interval by Student's t."""
    mean = sum(values) / len(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error)


def cell(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


@dataclass
class Results:
    """
    Scores of all models, from the files of `small_models`.

    Args:
        folder (`Path`): Folder of the run.
        config (`dict[str, Any]`): Config of the run.
    """

    folder: Path
    config: dict[str, Any]

    def read(self, name: str, *keys: str) -> list[float]:
        """One score per seed."""
        values = []
        for seed in self.config["seeds"]:
            value = json.loads((self.folder / "scores" / f"{name}-{seed}.json").read_text(encoding="utf-8"))
            for key in keys:
                value = value[key]
            values.append(value)
        return values

    def question_types(self) -> list[str]:
        """The question types that have scores, and `"all"`."""
        path = self.folder / "scores" / f"llava-base-trained-{self.config['seeds'][0]}.json"
        return list(json.loads(path.read_text(encoding="utf-8"))["accuracy"])

    def accuracy(self, variant: str, training: str) -> list[float]:
        return self.read(f"llava-{variant}-{training}", "accuracy", "all")

    def if16(self, variant: str, training: str) -> list[float]:
        return self.read(f"llava-{variant}-{training}", "if16", "average")

    def prefix_accuracy(self, length: int, blind: bool, phase: str) -> list[float]:
        return self.read(f"ta-llava-{length}{'-blind' if blind else ''}", "accuracy", phase, "all")


# Variants in the pictures, and their labels.
DRAWN = {
    "base": "LLaVA",
    "spd-16": "SPD, 16 tokens",
    "spd-4": "SPD, 4 tokens",
    "vmtc-32": "VMTC, 32 tokens",
    "cmai": "CMAI",
    "both-32": "VMTC + CMAI, 32 tokens",
    "both-7": "VMTC + CMAI, 7 tokens",
    "both-4": "VMTC + CMAI, 4 tokens",
}
TRAININGS = ("training-free", "trained")
# Titles, and the variant of each row by the name of the row.
LLAVA_TABLES = {
    "VMTC + CMAI, Table 1: against spatial down-sampling": {
        "LLaVA": "base",
        "SPD": "spd-16",
        "VMTC + CMAI": "both-32",
    },
    "VMTC + CMAI, Table 2: fewer visual tokens": {
        "LLaVA": "base",
        "VMTC + CMAI, 1/2": "both-32",
        "VMTC + CMAI, 1/9": "both-7",
        "VMTC + CMAI, 1/16": "both-4",
        "SPD, 1/4 (not in the paper)": "spd-16",
        "SPD, 1/16 (not in the paper)": "spd-4",
    },
    "VMTC + CMAI, Table 3: each by itself": {
        "LLaVA": "base",
        "VMTC": "vmtc-32",
        "CMAI": "cmai",
        "VMTC + CMAI": "both-32",
    },
    "VMTC + CMAI, Table 4: how tokens are removed (CMAI on)": {
        "all tokens": "cmai",
        "last layer pruning (LLP)": "last-layer-prune-32",
        "layerwise pruning (LWP)": "layerwise-prune-32",
        "LWP, merging (MG)": "merge-32",
        "LWP, MG, clustering (CLST)": "both-32",
        "LLP, 1/9": "last-layer-prune-7",
        "LWP, 1/9": "layerwise-prune-7",
        "LWP, MG, 1/9": "merge-7",
        "LWP, MG, CLST, 1/9": "both-7",
    },
    "VMTC + CMAI, Table 5: text-to-image focus (VMTC on)": {
        "no CMAI": "vmtc-32",
        "TIA, scores": "tia",
        "sum of TIA, scores": "sum",
        "discounted sum, scores": "discounted-sum",
        "the method, scores": "both-32",
        "TIA, weights": "tia-of-weights",
        "sum of TIA, weights": "sum-of-weights",
        "discounted sum, weights": "discounted-sum-of-weights",
        "the method, weights": "focus-of-weights",
    },
    "Both readings of eq. 7 (CMAI on)": {
        "normalized, 1/2": "both-32",
        "raw, as printed, 1/2": "raw-32",
        "normalized, 1/9": "both-7",
        "raw, as printed, 1/9": "raw-7",
    },
}
# Claims of the VMTC + CMAI paper: measure, and two variants whose difference (first - second) should be above 0.
CLAIMS = (
    ("VMTC follows instructions better than LLaVA (Table 3)", "if16", "vmtc-32", "base"),
    ("CMAI follows instructions better than LLaVA (Table 3)", "if16", "cmai", "base"),
    ("both follow instructions better than LLaVA (Tables 1, 3)", "if16", "both-32", "base"),
    ("both follow better than VMTC alone (Table 3)", "if16", "both-32", "vmtc-32"),
    ("both follow better than CMAI alone (Table 3)", "if16", "both-32", "cmai"),
    ("SPD follows instructions better than LLaVA (Table 1)", "if16", "spd-16", "base"),
    ("SPD loses accuracy (Table 1)", "accuracy", "base", "spd-16"),
    ("both follow better than SPD (Table 1)", "if16", "both-32", "spd-16"),
    ("both are more accurate than SPD (Table 1)", "accuracy", "both-32", "spd-16"),
    ("1/9 of the tokens follow better than 1/2 (Table 2)", "if16", "both-7", "both-32"),
    ("1/16 of the tokens follow better than 1/9 (Table 2)", "if16", "both-4", "both-7"),
    ("1/2 of the tokens are more accurate than 1/9 (Table 2)", "accuracy", "both-32", "both-7"),
    ("1/9 of the tokens are more accurate than 1/16 (Table 2)", "accuracy", "both-7", "both-4"),
    ("layerwise is more accurate than last layer (Table 4)", "accuracy", "layerwise-prune-32", "last-layer-prune-32"),
    ("layerwise follows better than last layer pruning (Table 4)", "if16", "layerwise-prune-32", "last-layer-prune-32"),
    ("merging is more accurate than pruning (Table 4)", "accuracy", "merge-32", "layerwise-prune-32"),
    ("merging follows better than pruning (Table 4)", "if16", "merge-32", "layerwise-prune-32"),
    ("clusters are more accurate than one merged token (Table 4)", "accuracy", "both-32", "merge-32"),
    ("clusters follow better than one merged token (Table 4)", "if16", "both-32", "merge-32"),
    ("the focus follows better than no CMAI (Table 5)", "if16", "both-32", "vmtc-32"),
    ("TIA follows better than no CMAI (Table 5)", "if16", "tia", "vmtc-32"),
    ("the sum follows better than no CMAI (Table 5)", "if16", "sum", "vmtc-32"),
    ("the discounted sum follows better than no CMAI (Table 5)", "if16", "discounted-sum", "vmtc-32"),
    ("the focus follows better than TIA (Table 5)", "if16", "both-32", "tia"),
    ("the focus follows better than the sum (Table 5)", "if16", "both-32", "sum"),
    ("the focus follows better than the discounted sum (Table 5)", "if16", "both-32", "discounted-sum"),
    ("the focus is more accurate than the discounted sum (Table 5)", "accuracy", "both-32", "discounted-sum"),
)  # fmt: skip


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """The mean difference over the seeds, in points, and whether it is above 0 beyond chance."""
    mean, half = interval([a - b for a, b in zip(first, second)])
    if mean - half > 0:
        outcome = "reproduced"
    elif mean + half < 0:
        outcome = "**the opposite**"
    else:
        outcome = "not seen"
    return f"{100 * mean:+.1f} ± {100 * half:.1f}: {outcome}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def format_tables(results: Results, operations: dict[str, int]) -> str:
    """All tables as Markdown."""
    parts = (
        [format_phases(results), format_prefix_lengths(results, operations)]
        if results.config["prefix_lengths"]
        else []
    )
    if not results.config["tuned_on_instructions"]:
        parts.append(format_erosion(results))
    for title, variants in LLAVA_TABLES.items():
        measured = {name: variant for name, variant in variants.items() if variant in results.config["variants"]}
        if 2 * len(measured) > len(variants):  # with fewer rows it compares little
            parts.append(format_llava_table(results, title, measured))
    return "\n\n".join([*parts, format_claims(results)]) + "\n"


def format_phases(results: Results) -> str:
    """TA-LLaVA's accuracy before and after its language model is trained, by type of question."""
    longest, types = max(results.config["prefix_lengths"]), results.question_types()
    rows = [
        [f"TA-LLaVA, after phase {phase[-1]}"]
        + [cell(results.read(f"ta-llava-{longest}", "accuracy", phase, name)) for name in types]
        for phase in ("phase2", "phase3")
    ]
    rows.append(["LLaVA"] + [cell(results.read("llava-base-trained", "accuracy", name)) for name in types])
    change = verdict(*(results.prefix_accuracy(longest, False, phase) for phase in ("phase3", "phase2")))
    return (
        f"## TA-LLaVA, Table 2: before and after the language model is trained ({longest} prefix tokens)\n\n"
        f"{markdown(['accuracy, %', *types], rows)}\n\nPhase 3 is more accurate than phase 2: {change}."
    )


def format_prefix_lengths(results: Results, operations: dict[str, int]) -> str:
    """TA-LLaVA's accuracy and operations with and without the text adapter, by number of prefix tokens."""
    config = results.config
    rows, lengths = [], config["prefix_lengths"]
    for length in lengths:
        row = [str(length), *(_mega(operations[f"{length}{blind}"]) for blind in ("", "-blind"))]
        for phase in ("phase2", "phase3"):
            aware, blind = (results.prefix_accuracy(length, is_blind, phase) for is_blind in (False, True))
            mean, half = interval([a - b for a, b in zip(aware, blind)])
            row += [cell(aware), cell(blind), f"{100 * mean:+.1f} ± {100 * half:.1f}"]
        rows.append(row)
    header = ["prefix tokens", "MFLOP, aware", "blind"]
    header += [f"{column}, phase {phase}" for phase in (2, 3) for column in ("aware", "blind", "difference")]
    over_lengths = []
    for phase in ("phase2", "phase3"):
        means = (
            [statistics.mean(seed) for seed in zip(*(results.prefix_accuracy(n, blind, phase) for n in lengths))]
            for blind in (False, True)
        )
        over_lengths.append(f"after phase {phase[-1]} {verdict(*means)}")
    base = f"LLaVA with all {config_tokens(config['variants']['base'], config)} visual tokens: " + (
        f"{cell(results.accuracy('base', 'trained'))} % at {_mega(operations['base'])} MFLOP."
    )
    return (
        "## TA-LLaVA: with and without the text adapter\n\n"
        f"{markdown(header, rows)}\n\n{base} Blind: without the text adapter, and so with fewer layers too. "
        "Operations are those of a prefill after the vision tower.\n\n"
        f"A prefix that reads the instruction is more accurate (mean over the rows): {'; '.join(over_lengths)}."
    )


def format_erosion(results: Results) -> str:
    """How LLaVA follows instructions before, between and after the stages of its training, which have none."""
    names = dict(zip(EROSION_STAGES, ("the language model alone", "after captions", "after captions and questions")))
    sources = (IMAGE, OWN_DESCRIPTION, TRUE_DESCRIPTION)
    rows = []
    for stage, name in names.items():
        if stage == "text":  # the same model for all seeds
            rows.append([name, "", "", f"{100 * results.read('erosion', stage, TRUE_DESCRIPTION)[0]:.1f}"])
        else:
            rows.append([name, *(cell(results.read("erosion", stage, source)) for source in sources)])
    prompts = results.config["if16_images"] * len(TASKS)
    text = (
        "## Instructions followed before and after the visual tuning, which has none\n\n"
        f"{markdown(['IF16, %', *(f'about the {source}' for source in sources)], rows)}\n\n"
        f"{prompts} prompts. Following them about its own description is the paper's upper limit."
    )
    bases = results.read("erosion", "pretrain", IMAGE), results.if16("base", "training-free")
    rows = [["LLaVA", cell(bases[0]), "", cell(bases[1]), ""]]
    for name in (name for name in DRAWN if name in results.config["variants"] and name != "base"):
        row = [DRAWN[name]]
        for values, base in zip(
            (results.read("erosion", "pretrain", name), results.if16(name, "training-free")), bases
        ):
            row += [cell(values), verdict(values, base)]
        rows.append(row)
    header = ["IF16 about the image, training-free, %"]
    header += [column for stage in EROSION_STAGES[1:] for column in (names[stage], "minus LLaVA")]
    return f"{text}\n\n{markdown(header, rows)}"


def format_llava_table(results: Results, title: str, variants: dict[str, str]) -> str:
    """Accuracy and IF16 of variants of the LLaVA, by name of the row."""
    config = results.config
    header = ["", "visual tokens"]
    header += [f"{score}, {training}" for training in TRAININGS for score in ("accuracy", "IF16")]
    rows = []
    for name, variant in variants.items():
        row = [name, str(config_tokens(config["variants"][variant], config))]
        for training in TRAININGS:
            row += [cell(results.accuracy(variant, training)), cell(results.if16(variant, training))]
        rows.append(row)
    if "SPD" in variants:
        limit = results.read("llava-base-training-free", "upper_limit", "average")
        rows.append(["upper limit: LLaVA describes first", "", "", cell(limit), "", ""])
    return f"## {title}\n\n{markdown(header, rows)}"


def format_claims(results: Results) -> str:
    """The claims of the VMTC + CMAI paper, and whether these models show them."""
    rows = []
    for claim, measure, first, second in CLAIMS:
        if not {first, second} <= set(results.config["variants"]):
            continue
        read = results.accuracy if measure == "accuracy" else results.if16
        rows.append([claim, *(verdict(read(first, training), read(second, training)) for training in TRAININGS)])
    return f"## The directions of the VMTC + CMAI paper\n\n{markdown(['', *TRAININGS], rows)}"


def config_tokens(fields: dict[str, Any], config: dict[str, Any]) -> int:
    """Number of visual tokens of a variant."""
    all_tokens = (config["image_size"] // 14) ** 2
    return fields.get("vmtc_num_visual_tokens", all_tokens // fields.get("spd_factor", 1) ** 2)


def _mega(operations: int) -> str:
    return f"{operations / 1e6:,.0f}"


def count_all_operations(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Operations of the prefill after the vision tower, by prefix length with and without "-blind", and by variant."""
    parts, size = Parts.load(folder, config), config["image_size"]
    counts = {}
    for length in config["prefix_lengths"]:
        prefix_config = parts.ta_llava_config(length, config["adapter_interval"])
        counts[f"{length}"] = count_operations(prefix_config, size)
        counts[f"{length}-blind"] = count_operations(prefix_config, size, blind=True)
    for name, fields in config["variants"].items():
        if not fields.get("use_cmai"):  # its own operations are not matrix products
            counts[name] = count_operations(parts.llava_config(fields), size)
    return counts


def draw_prefix(results: Results, operations: dict[str, int], path: Path) -> None:
    """Draws accuracy against operations: of TA-LLaVA, aware and blind, after phases 2 and 3, and of LLaVA."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2, sharey=True), ("phase2", "phase3")):
        for blind, label in ((False, "TA-LLaVA"), (True, "TA-LLaVA blind to the instruction")):
            lengths = results.config["prefix_lengths"]
            points = [interval(results.prefix_accuracy(length, blind, phase)) for length in lengths]
            x = [operations[f"{length}{'-blind' if blind else ''}"] / 1e6 for length in lengths]
            y, error = [100 * mean for mean, _ in points], [100 * half for _, half in points]
            axes.errorbar(x, y, error, marker="o", capsize=3, label=label)
            for length, *place in zip(lengths, x, y):
                axes.annotate(str(length), place, textcoords="offset points", xytext=(5, -12) if blind else (-9, 6))
        for name in (name for name in DRAWN if name in operations):
            mean, half = interval(results.accuracy(name, "trained"))
            place = operations[name] / 1e6, 100 * mean, 100 * half
            axes.errorbar(*place, marker="s", capsize=3, label=DRAWN[name], linestyle="")
        axes.set(title=f"after phase {phase[-1]}", xscale="log", xlabel="MFLOP of the prefill, after the vision tower")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    _finish(figure, path)


def draw_scores(results: Results, path: Path) -> None:
    """Draws IF16 against accuracy for the rows of the paper's Tables 1 to 3, before and after training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    names = [name for name in DRAWN if name in results.config["variants"]]
    for axes, training in zip(figure.subplots(1, 2, sharex=True, sharey=True), TRAININGS):
        for name in names:
            (x, x_error), (y, y_error) = (
                interval(results.accuracy(name, training)),
                interval(results.if16(name, training)),
            )
            axes.errorbar(100 * x, 100 * y, 100 * y_error, 100 * x_error, marker="o", capsize=3, label=DRAWN[name])
        axes.set(title=training, xlabel="accuracy, %")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("IF16, %")
    _finish(figure, path)


def _finish(figure: Any, path: Path) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def write_results(folder: Path, config: dict[str, Any], out: Path, name: str) -> None:
    """Writes tables and pictures of a finished run to files in `out` whose names begin with `name`."""
    results, operations = Results(folder, config), count_all_operations(folder, config)
    scores = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "scores").glob("*.json"))
    }
    record = {
        "config": config,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "operations": operations,
        "scores": scores,
    }
    write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text(out / f"{name}.md", format_tables(results, operations))
    if config["prefix_lengths"]:
        draw_prefix(results, operations, out / f"{name}_prefix.png")
    draw_scores(results, out / f"{name}_vmtc_cmai.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tables"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    check_config(arguments.output_dir, config)
    write_tower(arguments.output_dir, config)
    if failed := run_jobs(arguments.output_dir, config, list_jobs(config), arguments.workers):
        sys.exit(f"{len(failed)} jobs failed: {', '.join(failed)}. Rerun the same command to retry only these.")
    write_results(arguments.output_dir, config, arguments.results, arguments.config.stem)


if __name__ == "__main__":
    main()
