"""Loads the models that a user names, and says in one line what is wrong with those that cannot be loaded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, LlavaProcessor, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .. import auto_classes  # noqa: F401 - a process that loads models has their classes registered
from ..safe_loading import check_image_size, load_config, read_safetensors
from .errors import ADAPTER_CONFIG, one_line, why_not_loaded
from .sources import check_source


def check_complete(what: str, missing: Iterable[str]) -> None:
    """
    Checks that a model has all its weights: the library makes up those that are missing, and only logs it.

    Args:
        what (`str`): The model, for the message.
        missing (`Iterable[str]`): The `missing_keys` of `output_loading_info`.

    Raises:
        `ValueError`: It lacks some.
    """
    if names := sorted(missing):
        raise ValueError(
            f"{what} lacks {len(names)} weights, such as {names[0]!r}, and would work with random ones. Are files missing, "
            "or is config.json that of another model?"
        )


@contextmanager
def loading_from(source: str | Path) -> Iterator[None]:
    """
    What goes wrong while a model is loaded from a folder or Hub repo, as a `ValueError` that names it; see also
    [`check_source`].
    """
    check_source(source)
    try:
        yield
    except Exception as error:  # of the network, the Hub, or files that may be missing or damaged in any way
        taken_for = "" if Path(source).exists() else " (there is no such folder, so a repo on the Hub is meant)"
        raise ValueError(
            f"No model could be loaded from {str(source)!r}{taken_for}: {why_not_loaded(error)}"
        ) from error


def config_of(source: str | Path) -> Any:
    """
    The config of a model.

    Args:
        source (`str` or `Path`): Folder, `config.json` or Hub repo.

    Raises:
        `ValueError`: See [`check_source`]; none can be read there; or it is an adapter, or one of original code, see
            [`check_format`].
    """
    folder = Path(source)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{source} is an adapter, not a model. Merge it into its model: `ta-llava merge {source} OUT`."
        )
    with loading_from(source):
        check_format(PreTrainedConfig.get_config_dict(source)[0])
        return load_config(source)


def check_format(settings: dict[str, Any]) -> None:
    """
    Checks that a `config.json` is none of the original code of LLaVA or TA-LLaVA: of LLaVA's, transformers knows no field
    and would take sizes of its own.

    Raises:
        `ValueError`: It is; the message, which does not name it, says how to convert the checkpoint.
    """
    if settings.get("model_type") == "tallava_gemma":
        raise ValueError(
            "it is a checkpoint of the authors' TA-LLaVA code. Convert it with `ta-llava convert-original FOLDER OUT "
            "--vision-tower TOWER`."
        )
    field = next((key for key in settings if key.startswith("mm_")), None)
    if field is not None and "text_config" not in settings:
        raise ValueError(
            f"it is a checkpoint of the original LLaVA code (its config.json has `{field}`), not one of transformers. Take "
            "a converted one, such as llava-hf/llava-1.5-7b-hf, or convert it with convert_llava_weights_to_hf.py from "
            "the source of transformers (src/transformers/models/llava)."
        )


def check_processor(processor: Any, model: str | Path) -> None:
    """
    Checks that a conversation with an image can be prepared.

    Raises:
        `ValueError`: The processor of `model` has no chat template or padding token, the template fails, or images would
            become larger than any model's.
    """
    if isinstance(processor, LlavaProcessor):
        check_image_size(processor.image_processor)
    for what, value in (("chat template", processor.chat_template), ("padding token", processor.tokenizer.pad_token)):
        if value is None:
            raise ValueError(f"The processor in {str(model)!r} has no {what}; is a file of it missing?")
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        processor.apply_chat_template([{"role": "user", "content": content}])
    except Exception as error:  # a template is a program
        raise ValueError(f"The chat template in {str(model)!r} cannot be used: {one_line(error)}") from error


def load_complete(source: str | Path, **kwargs: Any) -> Any:
    model, info = read_safetensors(
        AutoModelForImageTextToText.from_pretrained,
        source,
        trust_remote_code=False,
        output_loading_info=True,
        **kwargs,
    )
    check_complete(str(source), info["missing_keys"])
    return model
