"""Columns of a dataset that hold images, or the paths of images."""

from typing import Any

import datasets

from .samples import HOW_TO_CAST, as_list, is_path


IMAGE_COLUMNS = ("image", "images")
_TEXTS = ("string", "large_string", "string_view")
_FILES = ("binary", "large_binary", "binary_view")


def check_column(name: str, feature: Any, source: str) -> None:
    """
    Checks the type of a column.

    Raises:
        `ValueError`: The column can hold neither images nor paths of images.
    """
    element = _element(feature)
    is_struct = isinstance(element, dict) and not element.keys().isdisjoint(("bytes", "path"))
    if not is_struct and not isinstance(element, datasets.Image) and not _has_dtype(element, *_TEXTS, *_FILES, "null"):
        raise ValueError(
            f"The column `{name}` of {source or 'the dataset'} holds {element!s:.200}, no images. {HOW_TO_CAST}"
        )


def holds_images(records: datasets.Dataset, name: str, source: str) -> bool:
    """
    Whether a column holds images, not their paths. Images are those of `datasets`, and image files whose column no longer
    says so, as bytes, in structs, or as text in base64.
    """
    if name not in records.features:
        return False
    check_column(name, records.features[name], source)
    element = _element(records.features[name])
    if not _has_dtype(element, *_TEXTS):
        return not _has_dtype(element, "null")
    first = next((images[0] for row in records.select_columns([name]) if (images := as_list(row[name]))), None)
    return first is not None and not is_path(first)


def leave_encoded(records: datasets.IterableDataset, source: str) -> datasets.IterableDataset:
    """A stream whose images are not decoded by `datasets`, which would raise its own errors for damaged ones."""
    for name in IMAGE_COLUMNS:
        feature = (records.features or {}).get(name)
        if feature is not None:
            check_column(name, feature, source)
        if isinstance(_element(feature), datasets.Image):
            undecoded = datasets.Image(decode=False)
            is_one = isinstance(feature, datasets.Image)
            records = records.cast_column(name, undecoded if is_one else datasets.Sequence(undecoded))
    return records


def _element(feature: Any) -> Any:
    """The type of a column, or of the items of its lists."""
    if isinstance(feature, list):
        feature = feature[0]
    return getattr(feature, "feature", feature)


def _has_dtype(element: Any, *dtypes: str) -> bool:
    return isinstance(element, datasets.Value) and element.dtype in dtypes
