"""Loads the models that a user names, and says in one line what is wrong with those that cannot be loaded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, LlavaProcessor, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from .. import auto_classes  # noqa: F401 - registers the classes of the models that are loaded here
from ..safe_loading import check_image_size, load_config, read_safetensors
from .errors import one_line, why_not_loaded
from .sources import check_source


# --- configs -------------------------------------------------------------------------------------------------------


def config_of(source: str | Path) -> Any:
    """
    The config of a model.

    Args:
        source (`str` or `Path`): Folder, `config.json` or Hub repo.

    Raises:
        `ValueError`: There is no config or it cannot be read, see [`check_source`]; it is an adapter; or it is a checkpoint
            of original code, see [`check_format`].
    """
    folder = Path(source)
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{source} is an adapter, not a model. Merge it into its model: `ta-llava merge {source} OUT`."
        )
    with loading_from(source):
        check_format(PreTrainedConfig.get_config_dict(source)[0])
        return load_config(source)


def check_format(settings: dict[str, Any]) -> None:
    """
    Checks that a `config.json` was not written by the original code of LLaVA or TA-LLaVA. transformers knows none of the
    fields of LLaVA's code and would use sizes of its own.

    Raises:
        `ValueError`: Original code wrote it. The message says how to convert the checkpoint, but does not name it.
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


# --- processors ----------------------------------------------------------------------------------------------------


def check_processor(processor: Any, model: str | Path) -> None:
    """
    Checks that a processor can prepare a conversation with an image.

    Raises:
        `ValueError`: The processor of `model` has no chat template or padding token, its template fails, or it would make
            images larger than those of any model.
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


# --- weights -------------------------------------------------------------------------------------------------------


@contextmanager
def loading_from(source: str | Path, what: str = "model") -> Iterator[None]:
    """
    Turns any error of loading from a folder or Hub repo into a `ValueError` that names it. It first calls
    [`check_source`]; `what` is loaded, for the message.
    """
    check_source(source)
    try:
        yield
    except Exception as error:  # the network, the Hub, or files that are missing or damaged in any way
        taken_for = "" if Path(source).exists() else " (there is no such folder, so a repo on the Hub is meant)"
        raise ValueError(
            f"No {what} could be loaded from {str(source)!r}{taken_for}: {why_not_loaded(error)}"
        ) from error


def load_complete(
    source: str | Path,
    model_class: Any = AutoModelForImageTextToText,
    *,
    what: str = "model",
    needed: tuple[str, ...] = ("",),
    **kwargs: Any,
) -> Any:
    """
    Loads a model from safetensors and checks that it has all its weights. The library makes up missing weights, and only
    logs it.

    Args:
        source (`str` or `Path`): Folder or Hub repo.
        model_class: Class of the model, or an auto class.
        what (`str`): Names the model in messages.
        needed (`tuple[str, ...]`): Prefixes of the weights that must be there. By default, all must.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        `ValueError`: The model cannot be loaded, see [`loading_from`] and [`read_safetensors`], or lacks weights.
    """
    with loading_from(source, what):
        model, info = read_safetensors(
            model_class.from_pretrained, source, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    _check_complete(str(source) if what == "model" else f"The {what} in {source}", info["missing_keys"], needed)
    return model


def _check_complete(name: str, missing: Iterable[str], needed: tuple[str, ...]) -> None:
    if names := sorted(key for key in missing if key.startswith(needed)):
        raise ValueError(
            f"{name} lacks {len(names)} weights, such as {names[0]!r}, and would work with random ones. Are files missing, "
            "or is config.json that of another model?"
        )
