"""Runs of training: what they change and what not, interruptions, full disks, and phases in turn."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_runs import MODEL, READING, losses, weights
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from typer.testing import CliRunner

from ta_llava.cli import app
from ta_llava.publishing.merge import merge_adapter
from ta_llava.training.parts import train_only
from ta_llava.training.run import RecipeTrainer, run_curriculum, train
from ta_llava.training.summary import SUMMARY


@pytest.mark.parametrize("parts", [READING, ["prefix"], ["projector", "language_model"]])
def test_what_is_frozen_stays_as_it_is_and_has_no_optimizer_state(recipe, parts):
    folder = train(replace(recipe, train=parts))
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    train_only(model, parts)
    before, after = weights(MODEL), weights(folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])} - {"lm_head.weight"}
    assert changed == trained
    state = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    sizes = sorted(entry["exp_avg"].numel() for entry in state.values())
    assert sizes == sorted(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    summary = json.loads((folder / SUMMARY).read_text())
    assert sum(part["trainable"] for part in summary["parameters"].values()) == sum(sizes)
    trained_model = AutoModelForImageTextToText.from_pretrained(folder)
    assert trained_model.config.text_config.use_cache
    assert trained_model.config.text_config.eos_token_id == model.config.text_config.eos_token_id
    assert trained_model.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert AutoProcessor.from_pretrained(folder / "checkpoint-4").num_prefix_tokens == 4
    assert AutoProcessor.from_pretrained(folder).num_prefix_tokens == 4


@pytest.mark.parametrize("kind", ["TA-LLaVA", "LLaVA", "LoRA"])
def test_an_interrupted_run_goes_on_and_a_finished_one_does_not(recipe, llava, tmp_path, monkeypatch, kind):
    if kind == "LLaVA":
        recipe = replace(recipe, model=str(llava), train=["projector", "language_model"])
    if kind == "LoRA":
        recipe = replace(recipe, train=[*READING, "language_model"], lora={"r": 2})
    whole = train(replace(recipe, output_dir=str(tmp_path / "whole")))
    steps = []
    training_step = Trainer.training_step

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="Run the same command again: it resumes from .*out/checkpoint-2"):
        train(recipe)
    folder = train(recipe)
    assert len(steps) == 3 + 1 + 2  # from the checkpoint of step 2
    assert losses(folder) == losses(whole)
    name = "adapter_model.safetensors" if kind == "LoRA" else "model.safetensors"
    expected, actual = load_file(whole / name), load_file(folder / name)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    train(replace(recipe, training_arguments=recipe.training_arguments | {"logging_steps": 2}))
    assert len(steps) == 6
    with pytest.raises(ValueError, match=r"was begun with `global_batch_size` 4, not 8. Choose another"):
        train(replace(recipe, global_batch_size=8))


@pytest.mark.parametrize("command", ["train", "curriculum"])
def test_ctrl_c_says_how_to_go_on_and_from_where(recipe, tmp_path, monkeypatch, command):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe, default=vars))))
    training_step, steps = Trainer.training_step, []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) in (2, 5):
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    result = CliRunner().invoke(app, [command, str(path)])
    folder = recipe.output_dir
    assert result.exit_code == 130
    message = f"There is no checkpoint in {folder} yet: the same command starts from the first step."
    assert result.stderr.splitlines()[-1] == f"Interrupted. {message}"
    result = CliRunner().invoke(app, [command, str(path)])
    assert result.exit_code == 130
    message = f"Run the same command again: it resumes from {folder}/checkpoint-2."
    assert result.stderr.splitlines()[-1] == f"Interrupted. {message}"
    assert CliRunner().invoke(app, [command, str(path)]).exit_code == 0


def test_a_run_that_was_killed_goes_on_from_the_last_whole_checkpoint(recipe, tmp_path):
    arguments = recipe.training_arguments | {"max_steps": 6}
    recipe = replace(recipe, training_arguments=arguments)
    whole = train(replace(recipe, output_dir=str(tmp_path / "whole")))
    path, folder = tmp_path / "recipe.yaml", Path(recipe.output_dir)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe, default=vars))))
    command = [sys.executable, "-m", "ta_llava.cli", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "checkpoint-2" / "trainer_state.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / SUMMARY).exists()
    torn = folder / "checkpoint-5"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "trainer_state.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint-5 was not written to its end"):
        train(recipe)
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-3)  # another process may round otherwise


@pytest.mark.parametrize(
    ("arguments", "num_checkpoints", "num_models"),
    [
        ({"save_total_limit": 1}, 2, 0),  # one is written while another is there
        ({"save_total_limit": 2}, 2, 1),  # a run of 4 steps has no third
        ({"save_steps": 4}, 1, 1),
        ({"save_strategy": "no"}, 0, 1),
        ({"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"}, 3, 1),
        ({"max_steps": -1, "num_train_epochs": 1, "save_steps": 500}, 1, 1),
    ],
)
def test_a_disk_without_room_is_found_before_the_first_step(
    recipe, monkeypatch, arguments, num_checkpoints, num_models
):
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    train_only(model, READING)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    trained = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = num_checkpoints * (weights + 2 * trained) + num_models * weights

    usage, started = shutil.disk_usage("."), []
    recipe.training_arguments.update(arguments)
    monkeypatch.setattr(Trainer, "train", lambda self, **kwargs: started.append(self))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"needs 0.. GB, 0.0 GB for each checkpoint, but its disk has 0.. GB free"):
        train(recipe)
    assert not started
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    train(recipe)
    assert started


@pytest.mark.parametrize(
    ("error", "free", "is_full"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1 << 30, True),
        (OSError(28, "No space left on device"), 1 << 30, True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 0, True),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), 1 << 30, False),  # /dev/shm
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1 << 30, False),
    ],
)
def test_a_disk_that_gets_full_is_named_and_the_run_goes_on_when_there_is_room(
    recipe, tmp_path, monkeypatch, error, free, is_full
):
    save, calls, usage = RecipeTrainer._save, [], shutil.disk_usage(".")

    def fail_once(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
            raise error
        save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "_save", fail_once)
        with pytest.raises(ValueError if is_full else RuntimeError) as raised:
            train(recipe)
    assert ("Free some of it and start again" in str(raised.value)) == is_full
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if is_full:
        whole = losses(train(replace(recipe, output_dir=str(tmp_path / "whole"))))
        assert losses(train(recipe)) == pytest.approx(whole, rel=1e-5)


def test_a_llava_with_vmtc_and_cmai_trains_in_mixed_precision(recipe, llava):
    arguments = recipe.training_arguments | {
        "bf16": True,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
    }
    recipe = replace(recipe, model=str(llava), train=["projector", "language_model"], global_batch_size=2)
    assert len(losses(train(replace(recipe, training_arguments=arguments)))) == 4


def test_training_learns(recipe):
    arguments = recipe.training_arguments | {"max_steps": 20, "per_device_train_batch_size": 8, "save_steps": 20}
    folder = train(
        replace(recipe, training_arguments=arguments, global_batch_size=8, train=[*READING, "language_model"])
    )
    curve = losses(folder)
    assert sum(curve[-3:]) < 0.3 * sum(curve[:3])


def test_an_output_folder_of_something_else_is_left_alone(recipe, tmp_path):
    for folder in (MODEL, tmp_path):
        (tmp_path / "checkpoint-4").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="exists already and holds something else"):
            train(replace(recipe, output_dir=str(folder)))


def test_streamed_samples_are_counted_and_learned(recipe, data, tmp_path, capsys):
    streamed = replace(recipe, data=replace(data, streaming=True), train=READING)
    folder = train(streamed)
    assert len(losses(folder)) == 4
    assert json.loads((folder / SUMMARY).read_text())["data"]["kept"] == 8
    assert "8 of 8 samples kept" in capsys.readouterr().out


def test_a_curriculum_goes_from_phase_to_phase(recipe, tmp_path):
    phases = [
        replace(recipe, output_dir=str(tmp_path / "1")),
        replace(recipe, model="", output_dir=str(tmp_path / "2"), train=["language_model"]),
    ]
    folder = run_curriculum(phases)
    start, first, second = weights(MODEL), weights(tmp_path / "1"), weights(folder)
    prefix, layer = "model.prefix_embedding.weight", "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[prefix], first[prefix]) and torch.equal(start[layer], first[layer])
    assert torch.equal(first[prefix], second[prefix]) and not torch.equal(first[layer], second[layer])
    assert run_curriculum(phases) == folder  # finished
    with pytest.raises(ValueError, match="only the last may use it"):
        run_curriculum([replace(phases[0], train=["language_model"], lora={}), phases[1]])
    with pytest.raises(ValueError, match="an `output_dir` of its own"):
        run_curriculum([phases[0], phases[0]])
    with pytest.raises(ValueError, match="no part 'head'"):  # found before the first phase begins
        run_curriculum([replace(phases[0], output_dir=str(tmp_path / "3")), replace(phases[1], train=["head"])])
    assert not (tmp_path / "3").exists()


def test_cached_features_give_the_same_losses(recipe, tmp_path):
    plain = losses(train(recipe))
    cached = replace(recipe, output_dir=str(tmp_path / "cached"), cache_vision_features=str(tmp_path / "features"))
    assert losses(train(cached)) == pytest.approx(plain, abs=1e-5)


def test_evaluation_during_training(recipe, data):
    arguments = recipe.training_arguments | {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True}
    folder = train(replace(recipe, evaluation_data=data, training_arguments=arguments))
    summary = json.loads((folder / SUMMARY).read_text())
    assert sum("eval_loss" in entry for entry in summary["log"]) == 2
    assert summary["evaluation_data"]["kept"] == 8


def test_bad_samples_are_skipped_and_written_down(recipe, data, tmp_path):
    records = json.loads(Path(data.path).read_text())
    records[2]["image"] = "missing.png"
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    data = replace(data, path=str(path))
    with pytest.raises(ValueError, match="sample-2"):
        train(replace(recipe, data=data))
    folder = train(replace(recipe, data=replace(data, on_bad_sample="skip")))
    assert "sample-2" in (folder / "bad_samples.jsonl").read_text()
    assert json.loads((folder / SUMMARY).read_text())["data"]["bad"] == 1


def test_the_command_line(data, tmp_path):
    run = CliRunner()
    recipes = [str(ROOT / "recipes" / "ta_llava" / f"phase{phase}.yaml") for phase in (2, 3)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 0, "bf16": "false"}
    overrides = [f"training_arguments.{key}={value}" for key, value in settings.items()]
    overrides += [f"data.path={data.path}", f"data.image_folder={data.image_folder}", "global_batch_size=4"]
    options = [argument for override in overrides for argument in ("--override", override)]
    options += [
        "--cache-vision-features",
        str(tmp_path / "features"),
        "--output-dir",
        str(tmp_path / "runs"),
        "--lora",
    ]
    result = run.invoke(app, ["curriculum", *recipes, "--model", str(MODEL), *options])
    assert result.exit_code == 0, result.output
    phase3 = tmp_path / "runs" / "phase3"
    assert f"The LoRA adapter is in {phase3}" in result.output
    assert f"`ta-llava merge {phase3} OUT`" in result.output
    image = str(ROOT / "examples" / "teal_triangle.png")
    answers = [run.invoke(app, ["ask", image, "what?", "--model", str(phase3)])]
    assert answers[0].exit_code == 0, answers[0].output
    assert (tmp_path / "runs" / "phase2" / "model.safetensors").is_file()
    result = run.invoke(app, ["merge", str(tmp_path / "runs" / "phase3"), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").config.num_prefix_tokens == 4
    answers.append(run.invoke(app, ["ask", image, "what?", "--model", str(tmp_path / "merged")]))
    assert answers[0].output == answers[1].output
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| phase2 |" in card and "| phase3 |" in card  # as that of the last phase without LoRA
    result = run.invoke(app, ["train", recipes[0], "--model", str(MODEL)])
    assert (result.exit_code, result.stderr) == (
        1,
        "error: There is no file data/LLaVA-Instruct/llava_v1_5_mix665k.json (`path` of the data).\n",
    )
    result = run.invoke(app, ["merge", str(MODEL), str(tmp_path / "other")])
    assert result.exit_code == 1 and "is no PEFT adapter" in result.stderr
    parts = ["--vision-tower", str(tmp_path), "--language-model", str(MODEL)]
    for command in ("init", "init-llava"):
        result = run.invoke(app, [command, str(tmp_path / "new"), *parts])
        assert result.exit_code == 1 and "No config could be loaded" in result.stderr


def test_a_model_that_lacks_weights_is_neither_trained_nor_merged(recipe, tmp_path):
    """They would be random, and what came out would hide it."""
    from peft import LoraConfig, get_peft_model

    folder = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.py"))
    state = load_file(folder / "model.safetensors")
    names = [name for name in state if "multi_modal_projector" in name]
    save_file({name: value for name, value in state.items() if name not in names}, folder / "model.safetensors")
    message = f"lacks {len(names)} weights, such as '.*multi_modal_projector"
    with pytest.raises(ValueError, match=message):
        train(replace(recipe, model=str(folder)))

    base = AutoModelForImageTextToText.from_pretrained(MODEL)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(folder))
    assert not (tmp_path / "merged").exists()


def test_a_trained_model_that_was_given_index_embeddings_is_trained_on(recipe, tmp_path):
    """As the docs say: by `from_pretrained`, and saved."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL, num_image_index_embeddings=2)
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    folder = train(replace(recipe, model=str(tmp_path / "model"), train=["prefix"]))
    assert any("image_index_embedding" in name for name in load_file(folder / "model.safetensors"))
