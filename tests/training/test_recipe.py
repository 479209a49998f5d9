"""Recipes: what is read from YAML, with which types, and what is refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from training_runs import READING

from ta_llava.training.recipe import DataSettings, accumulation_steps, load_recipe
from ta_llava.training.run import train


@pytest.mark.parametrize(
    "name, parts, learning_rate, batch_size, max_length",
    [
        ("ta_llava/phase1", READING, 1e-3, 256, 1024),
        ("ta_llava/phase2", READING, 5e-5, 128, 1024),
        ("ta_llava/phase3", [*READING, "language_model"], 2e-5, 128, 1024),
        ("llava/pretrain", ["projector"], 1e-3, 256, 2048),
        ("llava/finetune", ["projector", "language_model"], 2e-5, 128, 2048),
    ],
)
def test_the_recipes_have_the_values_of_the_papers(name, parts, learning_rate, batch_size, max_length):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.train == parts
    assert recipe.global_batch_size == batch_size
    assert recipe.data.max_length == max_length
    arguments = recipe.training_arguments
    assert arguments["learning_rate"] == learning_rate
    assert (arguments["num_train_epochs"], arguments["warmup_steps"], arguments["weight_decay"]) == (1, 0.03, 0)
    assert (arguments["lr_scheduler_type"], arguments["adam_beta1"], arguments["adam_beta2"]) == ("cosine", 0.9, 0.999)
    assert accumulation_steps(recipe, arguments["per_device_train_batch_size"], 8) == 1


def test_overrides_reach_every_level(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"train": ["prefix"], "training_arguments": {"learning_rate": "1e-3"}}))
    recipe = load_recipe(
        path, ["data.path=a=b.json", "lora.r=4", "training_arguments.max_steps=3", "train=[projector]"]
    )
    assert recipe.training_arguments == {"learning_rate": 1e-3, "max_steps": 3}
    assert (recipe.data.path, recipe.lora, recipe.train) == ("a=b.json", {"r": 4}, ["projector"])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        # A quoted text stays a text.
        ('run_name: "2024"', "2024"),
        ('hub_model_id: "007"', "007"),
        ('run_name: "1e-3"', "1e-3"),
        ("metric_for_best_model: 'nan'", "nan"),
        # So does anything else where only a text is declared.
        ("run_name: 2024", "2024"),
        ("hub_model_id: 007", "007"),
        ("run_name: 2024-01-31", "2024-01-31"),
        ("run_name: 1e-3", "1e-3"),
        ("eval_strategy: no", "no"),
        ("run_name: ~", None),
        ("report_to: [2024, none]", ["2024", "none"]),
        ("fsdp: true", True),
        # A number where a number is declared, with or without quotes.
        ("learning_rate: 1e-3", 1e-3),
        ('learning_rate: "1e-3"', 1e-3),
        ("learning_rate: 2", 2),
        ("neftune_noise_alpha: 5e0", 5.0),
        ("max_steps: 3", 3),
        ("dataloader_prefetch_factor: 3", 3),
        ("bf16: yes", True),
        # Nothing is declared inside: as YAML has it, with 1e-5 a number.
        (
            'lr_scheduler_kwargs: {min_lr: 1e-5, name: "1e-5", on: [true, 2, "2"]}',
            {"min_lr": 1e-5, "name": "1e-5", "on": [True, 2, "2"]},
        ),
        ("accelerator_config: {dispatch_batches: false}", {"dispatch_batches": False}),
        ('optim_args: "rank=1,scale=0.5"', "rank=1,scale=0.5"),
    ],
)
def test_each_value_gets_the_type_that_its_field_declares(tmp_path, line, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"training_arguments:\n  {line}\n")
    name, _, text = line.partition(": ")
    in_file = load_recipe(path).training_arguments
    path.write_text("train: [prefix]\n")
    in_override = load_recipe(path, [f"training_arguments.{name}={text}"]).training_arguments
    for arguments in (in_file, in_override):
        assert arguments == {name: value} and type(arguments[name]) is type(value)


def test_types_outside_of_the_training_arguments(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: 2024\noutput_dir: '007'\ntrain: [1, prefix]\ncache_vision_features: 5\nload_in_4bit: on\n"
        "data: {path: 1e-3, image_folder: 7, num_proc: 2, max_length: 64, on_bad_sample: skip}\n"
        "lora: {r: 4, lora_dropout: 1e-1, target_modules: [1, q_proj], init_lora_weights: true, bias: none,\n"
        "       rank_pattern: {q_proj: 8}, alpha_pattern: {'1': 1e1}, layers_to_transform: [0, 1]}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.model, recipe.output_dir, recipe.train) == ("2024", "007", ["1", "prefix"])
    assert recipe.cache_vision_features == "5" and recipe.load_in_4bit is True
    assert recipe.data == DataSettings(path="1e-3", image_folder="7", num_proc=2, max_length=64, on_bad_sample="skip")
    assert recipe.lora == {
        "r": 4,
        "lora_dropout": 0.1,
        "target_modules": ["1", "q_proj"],
        "init_lora_weights": True,
        "bias": "none",
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"1": 10.0},
        "layers_to_transform": [0, 1],
    }
    assert load_recipe(path, ["output_dir=2024", "lora.target_modules=1e3"]).output_dir == "2024"


@pytest.mark.parametrize(
    "override, message",
    [
        ("batch=3", "Unknown key 'batch' in the recipe"),
        ("data.paht=x", "Unknown key 'paht' in `data` of the recipe"),
        (
            "training_arguments.learning_rat=1",
            r"Unknown key 'learning_rat' in .* nearest are learning_rate, \w+, \w+\.$",
        ),
        ("training_arguments.lr=1", r"Unknown key 'lr' in `training_arguments` .* nearest are \w+, \w+, \w+\.$"),
        ("training_arguments.learning_rate=fast", "`learning_rate` in .* must be of type float, got 'fast'"),
        ("training_arguments=[1]", "must be a mapping, got .1."),
        ("global_batch_size=many", "`global_batch_size` in the recipe .* must be of type int, got 'many'"),
        ("global_batch_size=1e3", "`global_batch_size` in the recipe .* must be of type int, got 1000.0"),
        ("training_arguments.max_steps='3'", "`max_steps` in .* must be of type int, got '3'"),
        (
            "training_arguments.save_total_limit=few",
            r"`save_total_limit` in .* must be of type int \| None, got 'few'",
        ),
        ("training_arguments.bf16=1", "`bf16` in .* must be of type bool, got 1"),
        ("model=[a]", "`model` in .* must be of type str, got .'a'."),
        ("model=true", "`model` in .* must be of type str, got True"),
        ("data=5", "`data` of the recipe .* must be a mapping, got 5"),
        ("data.num_proc=many", r"`num_proc` in `data` .* must be of type int \| None, got 'many'"),
        ("lora.r=4.5", "`r` in `lora` .* must be of type int, got 4.5"),
        ("lora.bais=none", "Unknown key 'bais' in `lora`"),
        ("global_batch_size", "An override must be key=value, got 'global_batch_size'"),
        ("output_dir.x=1", "goes into 'output_dir', which has no keys"),
    ],
)
def test_wrong_keys_are_named(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: here\n")
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize("content", [None, "- a list", "a: [unclosed"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="recipe.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": []}, "must be a list with at least one of projector, prefix"),
        ({"train": "prefix"}, "must be a list with at least one of .*, got 'prefix'"),
        ({"global_batch_size": 0}, "must be at least 1, got 0"),
        ({"training_arguments": {"per_device_train_batch_size": 0}}, "must be at least 1, got 0"),
        ({"model": "runs/ta-llava/nowhere"}, "There is no folder .runs/ta-llava/nowhere..*Run the phase before it"),
        ({"lora": {"rank": 4}, "train": ["language_model"]}, "Unknown key 'rank' in `lora`"),
        ({"training_arguments": {"eval_strategy": "epoch"}}, "the recipe has no `evaluation_data`"),
        ({"training_arguments": {"save_only_model": True}}, "its optimizer would be lost"),
        ({"data": DataSettings(path="nothing.json")}, "There is no file nothing.json"),
        ({"data": DataSettings(path="x", image_folder="nowhere")}, "There is no folder nowhere"),
        ({"train": ["head"]}, "has no part 'head' to train, only projector, prefix"),
        ({"model": ""}, "no `model` to start from"),
        ({"output_dir": ""}, "no `output_dir`"),
        ({"data": DataSettings()}, "no `data.path`"),
        ({"data": DataSettings(path="x", on_bad_sample="ignore")}, 'must be "error" or "skip", got \'ignore\''),
        ({"train": ["vision_tower"], "cache_vision_features": "c"}, "needs a frozen vision tower"),
        (
            {"data": DataSettings(path="x", streaming=True), "cache_vision_features": "c"},
            "the recipe streams its data",
        ),
        (
            {"data": DataSettings(path="x", streaming=True), "training_arguments": {}},
            "set `training_arguments.max_steps`",
        ),
        ({"lora": {}}, "does not name `language_model`"),
        ({"load_in_4bit": True}, "`load_in_4bit` needs `lora`"),
        (
            {"lora": {"modules_to_save": ["x"]}, "train": ["language_model"]},
            "`modules_to_save` .* follows from `train`",
        ),
        ({"global_batch_size": 6}, "`global_batch_size` is 6, which 1 devices .* 4 cannot share: .* multiple of 4"),
        ({"training_arguments": {"gradient_accumulation_steps": 2}}, "follows from `global_batch_size`"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        train(replace(recipe, **changes))
    assert not Path(recipe.output_dir).exists()
