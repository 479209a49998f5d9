"""The tables of the papers come out, here of models that have learned nothing, and say what they are computed from."""

import json
import math

import pytest
import small_models
import tables
import torch
import yaml
from jobs import Job, run_job
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM


def quick_config() -> dict:
    config = yaml.safe_load(tables.CONFIG.read_text())
    config |= {"seeds": [0, 1], "train_images": 4, "test_images": 3, "if16_images": 1, "prefix_lengths": [2]}
    config["stages"] = {name: {"steps": 1, "batch_size": 2, "learning_rate": 1e-3} for name in config["stages"]}
    config["language_model"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    return config


@pytest.fixture
def tower(tmp_path):
    """A tower of the same patches as the real one, which is not installed for the tests."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 5, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**sizes, image_size=112, patch_size=14)).save_pretrained(tmp_path / "run" / "tower")
    size = {"height": 112, "width": 112}
    BitImageProcessorPil(size={"shortest_edge": 112}, crop_size=size).save_pretrained(tmp_path / "run" / "tower")


def test_interval_is_that_of_students_t():
    mean, half = tables.interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], "+10.0 ± 0.0: reproduced"),
        ([0.4, 0.5, 0.6], [0.5, 0.6, 0.7], "-10.0 ± 0.0: **the opposite**"),
        ([0.5, 0.6, 0.7], [0.4, 0.6, 0.6], "+6.7 ± 14.3: not seen"),
    ],
)
def test_verdict_compares_seed_by_seed(first, second, expected):
    assert tables.verdict(first, second) == expected


def test_the_loss_of_a_batch_is_that_of_all_answers():
    """Though logits are taken of the last columns only."""
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [8, 9], "image": None}]
    rows.append({"input_ids": [3, 4, 5], "labels": [4, 5], "image": None})
    rows.append({"input_ids": [3, 9, 9, 9, 9, 9, 4], "labels": [9, 9, 4], "image": None})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes)).eval()
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(ids).logits[0, -len(row["labels"]) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"]), reduction="none").tolist()
    batch = small_models.Samples.collate(None, rows)
    assert model(**batch).loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_rows_of_the_larger_models_are_rows_of_the_smaller():
    small, large = (
        yaml.safe_load((tables.CONFIG.parent / name).read_text()) for name in ("tables.yaml", "tables_smollm2.yaml")
    )
    assert large["variants"].items() <= small["variants"].items()
    assert small.keys() <= large.keys()


def test_every_row_and_claim_has_a_variant():
    variants = yaml.safe_load(tables.CONFIG.read_text())["variants"]
    for rows in tables.LLAVA_TABLES.values():
        assert set(rows.values()) <= set(variants)
    for _, measure, first, second in tables.CLAIMS:
        assert measure in ("accuracy", "if16")
        assert {first, second} <= set(variants)


def test_towers_differ_by_what_changes_the_features_only():
    variants = yaml.safe_load(tables.CONFIG.read_text())["variants"]
    name = {variant: tables.tower_name(fields) for variant, fields in variants.items()}
    assert name["base"] == name["cmai"] == "base"
    assert name["vmtc-32"] == name["both-32"] == name["tia-of-weights"]
    assert len({name[variant] for variant in ("base", "vmtc-32", "both-7", "raw-32", "merge-32", "spd-16")}) == 6


def test_another_config_is_refused_but_more_seeds_are_not(tmp_path):
    config = quick_config()
    tables.check_config(tmp_path, config)
    tables.check_config(tmp_path, config | {"seeds": [0, 1, 2], "prefix_lengths": [2, 4]})
    with pytest.raises(ValueError, match="begun with `train_images` 4, not 5"):
        tables.check_config(tmp_path, config | {"train_images": 5})
    more = config | {"variants": config["variants"] | {"new": {"spd_factor": 2}}}
    tables.check_config(tmp_path, more)
    with pytest.raises(ValueError, match="begun with `variants`"):
        tables.check_config(tmp_path, more | {"variants": more["variants"] | {"new": {"spd_factor": 4}}})
    with pytest.raises(ValueError, match="at least 2 seeds"):
        tables.check_config(tmp_path, config | {"seeds": [0]})
    changed = config["variants"] | {"vmtc-32": {"use_vmtc": True, "vmtc_num_visual_tokens": 31}}
    with pytest.raises(ValueError, match="begun with `variants`"):
        tables.check_config(tmp_path, config | {"variants": changed})


def test_prompts_hold_the_placeholders_where_the_models_want_them(tmp_path):
    config = quick_config()
    tokenizer = small_models.train_tokenizer(["What color is it? red", "user model"])
    image = tokenizer.convert_tokens_to_ids("<image>")
    llava = small_models.Chat(tokenizer, config["turns"], 3, at_start=False)
    ta_llava = small_models.Chat(tokenizer, config["turns"], 3, at_start=True)
    text = "<bos><start_of_turn>user\n{}What color is it?<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(llava.prompt("What color is it?", True)) == text.format("<image><image><image>\n")
    assert tokenizer.decode(llava.prompt("What color is it?", False)) == text.format("")
    prefixed = ta_llava.prompt("What color is it?", True)
    assert prefixed[:3] == [image] * 3
    assert prefixed[3:] == ta_llava.prompt("What color is it?", False)
    samples = small_models.Samples([("What color is it?", "red", None)], llava)
    labels = [label for label in samples[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == "red<end_of_turn>\n"


def test_all_tables_come_out_and_what_is_finished_is_not_done_again(tmp_path, tower, monkeypatch):
    config, folder = quick_config(), tmp_path / "run"
    config["variants"] = {name: config["variants"][name] for name in ("base", "vmtc-32", "both-32")}
    monkeypatch.setattr(small_models, "NEW_TOKENS", 3)
    monkeypatch.setattr(tables, "CLAIMS", (*tables.CLAIMS, ("a claim", "if16", "both-32", "base")))
    tables.check_config(folder, config)
    for jobs in tables.list_jobs(config):
        for job in jobs:
            job.function(folder, config, *job.arguments)
    tables.write_results(folder, config, tmp_path / "results", "tables")
    text = (tmp_path / "results" / "tables.md").read_text()
    assert "| VMTC + CMAI | 32 | 0.0 ± 0.0 |" in text
    assert "Table 3:" in text and "Table 5:" not in text  # it has two of nine rows
    assert "a claim" in text and "TIA" not in text
    record = json.loads((tmp_path / "results" / "tables.json").read_text())
    assert record["operations"]["2-blind"] < record["operations"]["2"] < record["operations"]["base"]
    assert set(record["scores"]["llava-base-training-free-0"]) == {"accuracy", "if16", "upper_limit"}
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {
        "tables_prefix.png",
        "tables_vmtc_cmai.png",
    }

    monkeypatch.setattr(small_models, "run_stage", None)
    monkeypatch.setattr(small_models, "generate", None)
    for jobs in tables.list_jobs(config):
        for job in jobs:
            if job.function is not small_models.train_llava:  # whose stages `run_stage` keeps
                job.function(folder, config, *job.arguments)


def test_the_instruction_experiment_tunes_without_instructions_and_tells_what_erodes(tmp_path, tower, monkeypatch):
    config, folder = quick_config(), tmp_path / "run"
    instructions = yaml.safe_load((tables.CONFIG.parent / "instructions.yaml").read_text())
    names = ("tuned_on_instructions", "prefix_lengths")
    config |= {name: instructions[name] for name in names}
    config["variants"] = {name: instructions["variants"][name] for name in ("base", "cmai")}
    assert set(instructions["variants"]) <= set(tables.DRAWN)
    monkeypatch.setattr(small_models, "NEW_TOKENS", 3)
    seen = {}
    original = small_models.train

    def remember(model, samples, folder, name, *rest):
        seen[name] = {prompt for prompt, _, _ in samples.items}
        original(model, samples, folder, name, *rest)

    monkeypatch.setattr(small_models, "train", remember)
    tables.check_config(folder, config)
    for jobs in tables.list_jobs(config):
        for job in jobs:
            job.function(folder, config, *job.arguments)
    assert seen["text"] and len(seen["finetune"]) > len(seen["pretrain"])
    asked = {text for text, _, _ in small_models.load_data(config, 1).questions()}
    assert seen["finetune"] == seen["continue"] == asked | {small_models.CAPTION_PROMPT}
    tables.write_results(folder, config, tmp_path / "results", "instructions")
    text = (tmp_path / "results" / "instructions.md").read_text()
    assert "| the language model alone |  |  |" in text and "16 prompts" in text
    record = json.loads((tmp_path / "results" / "instructions.json").read_text())
    assert set(record["scores"]["erosion-1"]["finetune"]) == {"image", "own description", "true description"}
    assert set(record["scores"]["erosion-1"]["pretrain"]) == {"image", "own description", "true description", "cmai"}
    values, base = (
        [record["scores"][f"erosion-{seed}"]["pretrain"][name] for seed in (0, 1)] for name in ("cmai", "image")
    )
    assert f"| CMAI | {tables.cell(values)} | {tables.verdict(values, base)} |" in text
    assert [path.name for path in (tmp_path / "results").glob("*.png")] == ["instructions_vmtc_cmai.png"]


def test_a_job_that_fails_is_named_and_the_others_go_on(tmp_path):
    job = Job("broken", small_models.train_llava, (0,))
    (tmp_path / "logs").mkdir()
    assert not run_job(job, tmp_path, quick_config())
    assert "language-model" in (tmp_path / "logs" / "broken.log").read_text()
