"""The commands that make a model from a LLaVA, from a vision tower and a language model, or from original code."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.files import atomic_folder, check_new_folder
from .common import OutFolder, check_exists, check_sources, errors_as_messages, read_text


_VisualTokens = Annotated[
    int | None,
    typer.Option(
        help="Turn VMTC on and keep this many visual tokens per image, or per view if the model cuts images into views.",
        show_default=False,
    ),
]


def compress(
    llava: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub repo of a LLaVA, LLaVA-NeXT or LLaVA-OneVision, e.g. llava-hf/llava-1.5-7b-hf."
        ),
    ],
    out: OutFolder,
    visual_tokens: _VisualTokens = None,
    total_visual_tokens: Annotated[
        int | None,
        typer.Option(
            help="Turn VMTC on and keep this many visual tokens of a whole image that is cut into views: more of the "
            "important views.",
            show_default=False,
        ),
    ] = None,
    cmai: Annotated[
        float | None,
        typer.Option(
            help="Turn CMAI on and inhibit this share of the image tokens, in (0, 1], in the last layer; 0 turns CMAI off.",
            show_default=False,
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights, even if the file system can link to them.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Set how VMTC works: training-free, for weights that are used as they are, or paper, for weights that you "
            "will train with VMTC. Default: training-free for a LLaVA whose VMTC is off.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """
    Write a LLaVA with VMTC (fewer visual tokens) and CMAI (inhibited attention to them) turned on. The weights stay as they
    are. The new folder loads anywhere with trust_remote_code=True.

    Settings you don't pass are unchanged. If you pass no budget and no --cmai, and LLAVA has both off, this turns both on:
    half of the tokens, and 0.6.
    """
    with errors_as_messages():
        check_new_folder(out)
        check_sources(llava)

        from transformers.utils import logging

        from ..building.compress import compress_llava
        from ..common.families import has_views

        logging.set_verbosity_error()
        config = compress_llava(
            llava,
            out,
            visual_tokens,
            cmai,
            link=not copy,
            progress=True,
            preset=preset,
            total_visual_tokens=total_visual_tokens,
        )
    total = getattr(config, "vmtc_total_visual_tokens", None)
    budget = total or config.vmtc_num_visual_tokens or f"{config.vmtc_keep_ratio:.0%} of the"
    of_what = "" if not has_views(config) else " of each view" if total is None else " of a whole picture"
    settings = [f"VMTC with {budget} visual tokens{of_what}"] if config.use_vmtc else []
    settings += [f"CMAI up to {config.cmai_max_ratio}"] if config.use_cmai else []
    typer.echo(f"Wrote {out}: {', '.join(settings) or 'neither VMTC nor CMAI'}.")
    if settings:
        typer.echo(
            "Load it with AutoModelForImageTextToText and AutoProcessor, and trust_remote_code=True. "
            f"{config.stock_config.__name__.removesuffix('Config')}ForConditionalGeneration has neither VMTC nor CMAI, and "
            "refuses it."
        )


_VisionTower = Annotated[
    str,
    typer.Option(help="Folder or Hub repo of a CLIP, SigLIP or DINOv2 with its image processor.", show_default=False),
]
_LanguageModel = Annotated[
    str, typer.Option(help="Folder or Hub repo of a causal language model with its tokenizer.", show_default=False)
]
_GgufFile = Annotated[
    str | None, typer.Option(help="Read this GGUF file of the language model instead of safetensors.")
]
_ChatTemplate = Annotated[
    Path | None, typer.Option(help="File with a Jinja template, for a language model that has none.")
]
_Seed = Annotated[int, typer.Option(help="Seed of the new weights.")]


def init(
    out: OutFolder,
    vision_tower: _VisionTower,
    language_model: _LanguageModel,
    gguf_file: _GgufFile = None,
    chat_template: _ChatTemplate = None,
    num_prefix_tokens: Annotated[
        int, typer.Option(help="Number of learned prefix tokens, which read the question and the images.")
    ] = 32,
    adapter_interval: Annotated[int, typer.Option(help="Number of layers from one adapter to the next.")] = 4,
    projector: Annotated[str, typer.Option(help="Kind of projector: linear or mlp.")] = "linear",
    seed: _Seed = 0,
) -> None:
    """Make an untrained TA-LLaVA from a vision tower and a language model."""
    with errors_as_messages():
        check_new_folder(out)
        check_sources(vision_tower, language_model)
        template = None if chat_template is None else read_text(chat_template)

        from transformers.utils import logging

        from ..building.assemble import assemble_ta_llava

        logging.set_verbosity_error()
        notes = assemble_ta_llava(
            out,
            vision_tower,
            language_model,
            gguf_file=gguf_file,
            chat_template=template,
            num_prefix_tokens=num_prefix_tokens,
            adapter_interval=adapter_interval,
            projector_type=projector,
            seed=seed,
        )
    typer.echo("\n".join([*notes, f"Wrote {out}."]))


def init_llava(
    out: OutFolder,
    vision_tower: _VisionTower,
    language_model: _LanguageModel,
    gguf_file: _GgufFile = None,
    chat_template: _ChatTemplate = None,
    visual_tokens: _VisualTokens = None,
    cmai: Annotated[
        float | None,
        typer.Option(
            help="Turn CMAI on and inhibit this share of the image tokens in the last layer.", show_default=False
        ),
    ] = None,
    seed: _Seed = 0,
) -> None:
    """Make an untrained LLaVA from a vision tower and a language model, with VMTC and CMAI if you ask for them."""
    with errors_as_messages():
        check_new_folder(out)
        check_sources(vision_tower, language_model)
        template = None if chat_template is None else read_text(chat_template)

        from transformers.utils import logging

        from ..building.assemble import assemble_llava
        from ..building.compress import vmtc_cmai_flags

        logging.set_verbosity_error()
        notes = assemble_llava(
            out,
            vision_tower,
            language_model,
            gguf_file=gguf_file,
            chat_template=template,
            seed=seed,
            **vmtc_cmai_flags(visual_tokens, cmai),
        )
    typer.echo("\n".join([*notes, f"Wrote {out}."]))


def convert_original(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint as the authors' code saves it.")],
    out: OutFolder,
    vision_tower: Annotated[str, typer.Option(help="Folder or Hub repo of its vision tower.", show_default=False)],
) -> None:
    """Convert a checkpoint of the authors' code. If it has a tokenizer, this writes a processor too."""
    with errors_as_messages():
        check_new_folder(out)
        check_exists(folder)
        check_sources(vision_tower)

        from ..building.convert_original import build_processor
        from ..building.convert_original import convert_original as convert

        model = convert(folder, vision_tower)
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        processor = build_processor(folder, vision_tower, model.config) if has_tokenizer else None
        with atomic_folder(out) as unfinished:
            model.save_pretrained(unfinished)
            if processor is not None:
                processor.save_pretrained(unfinished)
    typer.echo(f"Wrote {out}.")
    if not has_tokenizer:
        typer.echo(f"{folder} has no tokenizer, so {out} has no processor.", err=True)
