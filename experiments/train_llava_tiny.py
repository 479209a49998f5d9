"""
Trains the small LLaVA of `checkpoints/llava-tiny` on easy-VQA's official training split, with the recipes of LLaVA-1.5.

The vision tower is that of the shipped TA-LLaVA. First a small Llama is pretrained on the questions as text. Then both are
put together as `ta-llava init-llava` does, and trained with the two recipes. The result is a stock LLaVA. Rerun the same
command to resume.

    python experiments/train_llava_tiny.py --output-dir runs/llava-tiny
"""

from dataclasses import fields
from pathlib import Path

import torch
from train_ta_llava_tiny import ChatDataset, argument_parser, claim_folder, run_stage, text_items
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)

from ta_llava.building.assemble import assemble_llava
from ta_llava.common.shipped_models import DEFAULT_MODEL
from ta_llava.data.easy_vqa import load_easy_vqa, write_llava_format
from ta_llava.training.recipe import load_recipe
from ta_llava.training.run import run_curriculum


RECIPES = Path(__file__).parent.parent / "recipes" / "llava"
# A template for text: `init-llava` adds what images need.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ message.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build_parts(folder: Path, seed: int, steps: int) -> None:
    """Writes the vision tower to `folder/tower`, and a pretrained Llama to `folder/language-model`."""
    shipped, processor = (
        AutoModelForImageTextToText.from_pretrained(DEFAULT_MODEL),
        AutoProcessor.from_pretrained(DEFAULT_MODEL),
    )
    tokenizer = processor.tokenizer
    shipped.model.vision_tower.float().save_pretrained(folder / "tower")
    processor.image_processor.save_pretrained(folder / "tower")
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.09,  # about 1 / sqrt(128); with the default, for widths of thousands, it hardly learns
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<end_of_turn>"),
    )
    model = LlamaForCausalLM(config)
    text = ChatDataset(text_items(load_easy_vqa("train")), processor)
    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    run_stage("language-model-stage", model, text, folder, seed, steps, 64, groups)
    model.save_pretrained(folder / "language-model")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "language-model")


def train_llava_tiny(output_dir: Path, seed: int = 0, scale: float = 1.0) -> None:
    """
    Builds the parts, trains, and writes the trained model to `output_dir/model`.

    Args:
        output_dir (`Path`): Folder for the model and for the parts and phases to resume from.
        seed (`int`): Seed of every part.
        scale (`float`): Factor for the number of steps. Small values make a quick trial.
    """
    claim_folder(output_dir, seed, scale)
    data, start = output_dir / "easy-vqa", output_dir / "init"
    if not (data / "test.json").is_file():
        write_llava_format(data)
    if not start.is_dir():
        build_parts(output_dir, seed, max(int(1000 * scale), 1))
        assemble_llava(start, output_dir / "tower", output_dir / "language-model", seed=seed)
    settings = {
        "data.image_folder": data / "images",
        "training_arguments.seed": seed,
        "training_arguments.per_device_train_batch_size": 64,
        "training_arguments.bf16": "false",
        "training_arguments.gradient_checkpointing": "false",
        "training_arguments.dataloader_num_workers": 1,
        "global_batch_size": 64,
        "cache_vision_features": output_dir / "features",
    }
    phases = []
    for name, samples, steps, learning_rate in (
        ("pretrain", "captions", 300, 1e-3),
        ("finetune", "questions", 1500, 1e-3),
    ):
        of_phase = {
            "data.path": data / f"{samples}.json",
            "output_dir": output_dir / name,
            "model": start,
            "training_arguments.max_steps": max(int(steps * scale), 1),
            "training_arguments.learning_rate": learning_rate,
        }
        overrides = [f"{key}={value}" for key, value in (settings | of_phase).items()]
        phases.append(load_recipe(RECIPES / f"{name}.yaml", overrides))
    save_as_stock_llava(run_curriculum(phases), output_dir / "model")


def save_as_stock_llava(folder: Path, out: Path) -> None:
    """Writes the LLaVA in `folder`, whose VMTC and CMAI are off, as a stock LLaVA in float16."""
    model, processor = (
        auto_class.from_pretrained(folder) for auto_class in (AutoModelForImageTextToText, AutoProcessor)
    )
    config = LlavaConfig(**{entry.name: getattr(model.config, entry.name) for entry in fields(LlavaConfig)})
    stock = LlavaForConditionalGeneration(config).to(torch.float16)
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    for part in (stock.config.text_config, stock.config.vision_config):
        part.dtype = stock.dtype
    for part in (
        processor.image_processor,
        processor.tokenizer,
    ):  # they would name code that a stock LLaVA does not have
        part.__dict__.pop("auto_map", None)
        getattr(part, "init_kwargs", {}).pop("auto_map", None)
    stock.save_pretrained(out)
    LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    ).save_pretrained(out)


def main() -> None:
    arguments = argument_parser(__doc__, "runs/llava-tiny").parse_args()
    train_llava_tiny(arguments.output_dir, arguments.seed, arguments.scale)
    print(f"The model is in {arguments.output_dir / 'model'}.")


if __name__ == "__main__":
    main()
