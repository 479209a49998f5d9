"""Runs by several processes learn what one does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from training_runs import READING, losses, run_processes, weights

from ta_llava.training.run import run_curriculum, train


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configs_of_deepspeed_leave_to_the_trainer_what_it_knows(stage):
    """DeepSpeed itself is not needed for this."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(str(ROOT / "recipes" / "distributed" / f"zero{stage}.json"))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled"):
        assert config.get_value(key) == "auto"
    assert stage == 2 or config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(recipe, tmp_path, kind):
    """Two phases, of which the second accumulates gradients over two passes, with checkpointing."""
    recipe = replace(recipe, train=[*READING, "language_model"])
    arguments = recipe.training_arguments | {"gradient_checkpointing": True}
    second = replace(recipe, output_dir=str(tmp_path / "2"), global_batch_size=8, training_arguments=arguments)
    expected = run_curriculum([replace(recipe, output_dir=str(tmp_path / "1")), second])

    split = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    if kind == "fsdp":
        split |= {"fsdp": True, "fsdp_config": str(ROOT / "recipes" / "distributed" / "fsdp2.json")}
    together = tmp_path / kind
    phases = [
        replace(recipe, output_dir=str(together / "1"), training_arguments=recipe.training_arguments | split),
        replace(second, output_dir=str(together / "2"), training_arguments=arguments | split),
    ]
    run_processes(phases, tmp_path, kind)
    for phase in "12":
        assert losses(together / phase) == pytest.approx(losses(tmp_path / phase), rel=1e-3)
    one, two = weights(expected), weights(together / "2")
    assert one.keys() == two.keys()
    # By what was learned, as a whole: Adam turns the rounding of a gradient near zero into a whole step of that weight.
    start = weights(Path(recipe.model))
    for name in one:
        learned = (one[name] - start[name]).norm()
        assert (one[name] - two[name]).norm() <= 0.1 * learned, name
    names = [{path.name for path in (folder / "2").iterdir()} for folder in (tmp_path, together)]
    assert names[0] == names[1]  # the code too, of the class that is not sharded
    configs = [json.loads((folder / "2" / "config.json").read_text()) for folder in (tmp_path, together)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("system", "kind"),
    [("ta_llava", "ddp"), ("llava", "ddp"), ("ta_llava", "fsdp"), ("llava and its tower", "fsdp")],
)
def test_a_process_without_an_image_does_not_keep_the_others_waiting(recipe, llava, data, tmp_path, system, kind):
    """One process has images in every batch, the other none, and the language model is frozen."""
    records = json.loads(Path(data.path).read_text())[:4]
    text = {"id": "text", "conversations": [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "yes"}]}
    (tmp_path / "data.json").write_text(json.dumps([each for record in records for each in (record, text)]))
    arguments = recipe.training_arguments | {"train_sampling_strategy": "sequential"}
    recipe = replace(
        recipe,
        data=replace(data, path=str(tmp_path / "data.json"), keep_text_only=True),
        global_batch_size=2,
        training_arguments=arguments | {"per_device_train_batch_size": 2},
    )
    if system != "ta_llava":
        recipe = replace(recipe, model=str(llava), train=["projector"])
    if system == "llava and its tower":
        recipe = replace(recipe, train=["projector", "vision_tower"])
    mixed = train(recipe)
    single = arguments | {"per_device_train_batch_size": 1}
    alone = train(replace(recipe, output_dir=str(tmp_path / "alone"), training_arguments=single))
    split = {"ddp_backend": "gloo"}
    if kind == "fsdp":
        split |= {"fsdp": True, "fsdp_config": str(ROOT / "recipes" / "distributed" / "fsdp2.json")}
    together = replace(recipe, output_dir=str(tmp_path / "together"), training_arguments=single | split)
    run_processes([together], tmp_path, kind, timeout=120)
    for folder in (alone, tmp_path / "together"):
        assert losses(folder) == pytest.approx(losses(mixed), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_vision_features": "features"}, "do not go with `cache_vision_features`"),
        ({"evaluation_data": True}, "set `evaluation_data.keep_text_only` to false"),
    ],
)
def test_shards_that_not_all_processes_would_gather_are_refused(recipe, data, changes, message):
    data = replace(data, keep_text_only=True)
    if "evaluation_data" in changes:
        changes = {"evaluation_data": data}
    fsdp = {"fsdp": True, "fsdp_config": str(ROOT / "recipes" / "distributed" / "fsdp2.json")}
    arguments = recipe.training_arguments | fsdp
    with pytest.raises(ValueError, match=message):
        train(replace(recipe, data=data, training_arguments=arguments, **changes))
