"""
Counts the cost of more frames for TA-LLaVA and LLaVA with CLIP ViT-L/14 at 336 pixels and Gemma-2-2B: operations of the
prefill and bytes of the KV cache. The tensors have no data, so this takes a minute and needs no weights.

    python benchmarks/plot_frames.py --output-dir benchmarks/results
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import LlavaConfig

from ta_llava.analysis.cost import Cost, count_cost, full_size_config


FRAMES = (1, 2, 4, 8, 16, 32, 64)
TEXT_TOKENS = 40
LLAVA, TA_LLAVA = "LLaVA", "TA-LLaVA"
TOWER = "vision tower"


def paper_configs() -> dict[str, Any]:
    """TA-LLaVA as in the paper, and LLaVA with its backbones."""
    config = full_size_config("ta-llava-gemma-2-2b")
    return {LLAVA: LlavaConfig(vision_config=config.vision_config, text_config=config.text_config), TA_LLAVA: config}


def operations_after_tower(config: Any, cost: Cost) -> int:
    """
    Operations of the prefill after the vision tower, as generation runs it: with the logits of the last column only.
    [`Cost`] counts those of all columns.
    """
    head = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    return sum(cost.operations.values()) - cost.operations[TOWER] - (cost.num_tokens - 1) * head


def count_rows(configs: dict[str, Any], frames: tuple[int, ...] = FRAMES) -> list[dict[str, Any]]:
    """
    One row per number of frames: operations of the vision tower, which are the same in both models, and by model the tokens
    of the sequence, operations after the tower and bytes of the cache.
    """
    rows = []
    for num_frames in tqdm(frames, unit="length"):
        costs = {name: count_cost(config, TEXT_TOKENS, num_frames) for name, config in configs.items()}
        rows.append(
            {
                "frames": num_frames,
                "tower": costs[LLAVA].operations[TOWER],
                "tokens": {name: cost.num_tokens for name, cost in costs.items()},
                "operations": {name: operations_after_tower(configs[name], cost) for name, cost in costs.items()},
                "cache": {name: cost.cache_bytes for name, cost in costs.items()},
            }
        )
    return rows


def format_report(rows: list[dict[str, Any]], max_tokens: int) -> str:
    """The rows as a Markdown table, with notes on how to read it."""
    lines = [
        "| frames | vision tower, TFLOP | after it, TFLOP: LLaVA | TA-LLaVA | ratio | cache, MB: LLaVA | TA-LLaVA | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [str(row["frames"]), f"{row['tower'] / 1e12:.2f}"]
        for key, unit in (("operations", 1e12), ("cache", 1e6)):
            llava, ta_llava = row[key][LLAVA], row[key][TA_LLAVA]
            cells += [f"{llava / unit:,.2f}", f"{ta_llava / unit:,.2f}", f"{llava / ta_llava:.1f}x"]
        if row["tokens"][LLAVA] > max_tokens:
            cells[0] += "*"
        lines.append(f"| {' | '.join(cells)} |")
    notes = [
        "![operations after the vision tower and KV cache over the number of frames](frames.png)",
        f"CLIP ViT-L/14 at 336 pixels and Gemma-2-2B, {TEXT_TOKENS} text tokens, counted. TA-LLaVA's sequence has "
        f"{rows[0]['tokens'][TA_LLAVA]} tokens whatever the number of frames, LLaVA's {rows[0]['tokens'][LLAVA]} with "
        f"one and {rows[-1]['tokens'][LLAVA]:,} with {rows[-1]['frames']}. After the tower only TA-LLaVA's projector, one "
        "projection of the visual tokens to keys and values, and the prefix's attention to these grow.",
        "Attention counts in full, as Gemma-2's soft-capped one is computed, without savings from the causal mask or the "
        "sliding window; the cache of every other layer ends at its window of 4,096 tokens. Logits are of the last token, "
        "and the cache is in bfloat16.",
        f"\\* LLaVA's sequence is longer than the language model's context of {max_tokens:,} tokens.",
    ]
    return "\n\n".join(["# Cost over the number of frames", "\n".join(lines), *notes]) + "\n"


def draw(rows: list[dict[str, Any]], max_tokens: int, path: Path) -> None:
    """Draws operations after the tower and cache over the frames. A hollow mark is a sequence longer than the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    frames = [row["frames"] for row in rows]
    for axes, (key, unit, label) in zip(
        figure.subplots(1, 2),
        (("operations", 1e12, "TFLOP of the prefill after the vision tower"), ("cache", 1e6, "KV cache, MB")),
    ):
        for name, color in ((LLAVA, "tab:orange"), (TA_LLAVA, "tab:blue")):
            values = [row[key][name] / unit for row in rows]
            axes.plot(frames, values, color=color, label=name)
            for row, value in zip(rows, values):
                face = color if row["tokens"][name] <= max_tokens else "white"
                axes.plot(row["frames"], value, marker="o", color=color, markerfacecolor=face)
        if key == "operations":
            tower = [row["tower"] / unit for row in rows]
            axes.plot(frames, tower, color="tab:gray", linestyle="--", label="the vision tower itself, in both")
        axes.plot([], [], "o", color="tab:orange", markerfacecolor="white", label="beyond the context of the model")
        axes.set(xscale="log", yscale="log", xlabel="frames", ylabel=label, xticks=frames, xticklabels=frames)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the cost of TA-LLaVA and LLaVA over the number of frames.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write frames.md and frames.png to")
    arguments = parser.parse_args()
    configs = paper_configs()
    max_tokens = configs[LLAVA].text_config.max_position_embeddings
    rows = count_rows(configs)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    report = format_report(rows, max_tokens)
    (arguments.output_dir / "frames.md").write_text(report)
    draw(rows, max_tokens, arguments.output_dir / "frames.png")
    print(report)


if __name__ == "__main__":
    main()
