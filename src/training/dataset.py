"""
From LLaVA's JSON, or from chat messages, to the batches of a `Trainer`.

`prepare_dataset` reads the samples, leaves out what cannot be trained on, and says how many for which reason. What it
keeps are token ids and labels, and where the images are; `Collator` opens the images, batch by batch.

Two formats of records are read, from JSON files, folders of `datasets`, repos on the Hub and dataset objects:

- LLaVA's: `{"id", "image", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", ...}]}`
- that of TRL: `{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...],
  "images": [...]}`, where the content may also be text with `<image>` in it
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import torch
from datasets.fingerprint import Hasher
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..common.errors import one_line
from ..data.report import DataReport
from ..data.samples import (
    HOW_TO_CAST,
    SampleError,
    as_list,
    find_damage,
    find_damaged_files,
    is_path,
    open_image,
    read_sample,
)
from ..data.sources import load_records
from .encoding import IGNORED, SampleEncoder


logger = logging.get_logger(__name__)
COLUMNS = ["input_ids", "labels", "images", "id", "length"]

_PROBED = 16  # at most so many samples, evenly spaced, are looked at before all are

_IMAGE_COLUMNS = ("image", "images")


# --- data sets -----------------------------------------------------------------------------------------------------


@dataclass
class _Preparation:
    """
    From a record to a row: `COLUMNS`, the `outcome` (a field of [`DataReport`]), of bad samples the `reason`, and whether
    it `began_with_answer`.
    """

    encoder: SampleEncoder
    max_length: int
    image_folder: str | None
    keep_text_only: bool
    source: str
    is_json: bool  # a record is one text, `record`
    opens_files: bool

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        row = {"input_ids": [], "labels": [], "images": [], "id": str(index), "length": 0, "outcome": "", "reason": ""}
        row["began_with_answer"] = False
        try:
            sample = read_sample(self._parse(record, index), index, self.image_folder, self.source)
            row["id"] = sample.id
            if not sample.images and not self.keep_text_only:
                return {**row, "outcome": "text_only"}
            item = self.encoder(sample)
            if item["length"] > self.max_length:
                return {**row, "length": item["length"], "outcome": "too_long"}
            for image in sample.images:
                if self.is_json and not isinstance(image, str):
                    reason = f"Its image is {image!r:.100}, but in JSON an image is its path, or its file in base64."
                    raise SampleError(sample.id, index, self.source, reason)
                damage = find_damage(image) if self.opens_files or not is_path(image) else ""
                if damage:
                    raise SampleError(sample.id, index, self.source, damage)
        except SampleError as error:
            return {**row, "id": error.sample_id, "outcome": "bad", "reason": error.reason}
        return {**row, **item, "outcome": "kept", "began_with_answer": sample.began_with_answer}

    def _parse(self, record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        if not self.is_json:
            return record
        try:
            parsed = json.loads(record["record"])
        except ValueError as error:
            raise SampleError(str(index), index, self.source, f"It is not JSON: {one_line(error)}") from error
        if not isinstance(parsed, dict):
            raise SampleError(str(index), index, self.source, f"It is not a JSON object, but {record['record']:.100}.")
        return parsed

    def fingerprint(self, records: datasets.Dataset) -> str:
        """Changes with all that the rows depend on, and with nothing else."""
        processor = self.encoder.processor
        settings = [self.max_length, self.image_folder, self.keep_text_only, self.is_json, self.encoder._placeholders]
        return Hasher.hash(
            [
                records._fingerprint,
                Path(__file__).read_text(encoding="utf-8"),
                processor.tokenizer.backend_tokenizer.to_str(),
                str(processor.tokenizer.special_tokens_map),
                str(processor.chat_template),
                str([processor.image_token_id, self.encoder.num_prefix_tokens, *settings]),
            ]
        )


@dataclass
class _BadSamples:
    """What becomes of bad samples."""

    on_bad_sample: str
    file: Path | None
    source: str

    def handle(self, samples: list[tuple[str, int, str]]) -> None:
        """
        Raises the first of the `samples` (id, index, reason) as [`SampleError`], or writes all to the file, one line each
        that is not in it yet.
        """
        if samples and self.on_bad_sample == "error":
            sample_id, index, reason = samples[0]
            if len(samples) > 1:
                reason += f" ({len(samples) - 1} more samples are bad.)"
            raise SampleError(
                sample_id, index, self.source, f'{reason} `on_bad_sample="skip"` leaves such samples out.'
            )
        if not samples or self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = set(self.file.read_text(encoding="utf-8").splitlines()) if self.file.is_file() else set()
        lines = [json.dumps({"id": name, "index": index, "reason": reason}) for name, index, reason in samples]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines if line not in known))


@dataclass
class _StreamedPreparation:
    """A preparation of one record after the other, with what is to be done about each."""

    prepare: _Preparation
    report: DataReport
    bad_samples: _BadSamples
    last_index: int = -1  # later epochs are not counted again

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        row = self.prepare(record, index)
        if row["outcome"] == "bad":
            self.bad_samples.handle([(row["id"], index, row["reason"])])
        if index > self.last_index:
            self.report.count(row)
            self.last_index = index
        return row


def prepare_dataset(
    source: Any,
    processor: Any,
    *,
    image_folder: str | Path | None = None,
    max_length: int = 1024,
    keep_text_only: bool = False,
    on_bad_sample: Literal["error", "skip"] = "error",
    bad_samples_file: str | Path | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    split: str = "train",
) -> tuple[datasets.Dataset | datasets.IterableDataset, DataReport]:
    """
    Samples as token ids and labels, ready for [`Collator`], and the report of what was left out. What was computed is
    kept in the cache of `datasets`, so that a second call is quick.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`):
            A `.json` file of one array, a `.jsonl` or `.parquet` file, a folder of such, or one that `save_to_disk` has
            written, the name of a repo on the Hub, or a dataset, with records in the format of LLaVA or TRL. Images may lie
            in a column: as images of `datasets`, or as `bytes`, base64, or structs with `bytes` and `path`.
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`):
            That of the model.
        image_folder (`str` or `Path`, *optional*):
            What relative paths of images start from. Defaults to the current folder.
        max_length (`int`):
            Samples with more tokens, placeholders included, are left out; so are those that the tokenizer's
            `model_max_length` does not allow.
        keep_text_only (`bool`):
            Keep samples without an image.
        on_bad_sample (`str`):
            `"error"` raises a bad sample, if there are any; `"skip"` leaves them out.
        bad_samples_file (`str` or `Path`, *optional*):
            Gets a JSON line with `id`, `index` and `reason` for each that was left out.
        streaming (`bool`):
            Read the samples while they are used, and open their images then. A mapped dataset is read, and every image
            opened, beforehand. Of a `.json` file, streamed or not, all is held in memory; `.jsonl` is read by lines.
        num_proc (`int`, *optional*):
            Processes that prepare a mapped dataset.
        split (`str`):
            Of a repo or folder with several.

    Returns:
        `tuple[Dataset | IterableDataset, DataReport]`: Columns `input_ids`, `labels` (lists of `int`), `images` (paths or,
        where the source holds them, the images; see [`iterate_images`]), `id`, `length`.

    Raises:
        [`SampleError`]: A bad sample, with `on_bad_sample="error"`.
        `ValueError`: A source that cannot be read, or nothing left to train on.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f'`on_bad_sample` is "error" or "skip", got {on_bad_sample!r}.')
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"`image_folder` is {str(image_folder)!r}, but there is no such folder.")
    encoder = SampleEncoder(processor)
    max_length = min(max_length, processor.tokenizer.model_max_length)
    if max_length <= encoder.num_prefix_tokens:
        raise ValueError(
            f"`max_length` is {max_length}, but a sample has {encoder.num_prefix_tokens} placeholders and some text."
        )
    records, name, is_json = load_records(source, streaming, split)
    is_streamed = isinstance(records, datasets.IterableDataset)
    folder = None if image_folder is None else os.path.abspath(image_folder)
    prepare = _Preparation(encoder, max_length, folder, keep_text_only, name, is_json, opens_files=is_streamed)
    bad_samples = _BadSamples(on_bad_sample, None if bad_samples_file is None else Path(bad_samples_file), name)
    if isinstance(records, datasets.IterableDataset):
        return _prepare_streamed(records, prepare, bad_samples)
    return _prepare_mapped(records, prepare, bad_samples, num_proc)


def _nothing_left(source: str, report: DataReport, bad: str = "") -> ValueError:
    bad = f" The first bad one: {bad}" if bad else ""
    return ValueError(f"There is nothing to train on in {source or 'the dataset'}: {report}.{bad}")


def _prepare_mapped(
    records: datasets.Dataset, prepare: _Preparation, bad_samples: _BadSamples, num_proc: int | None
) -> tuple[datasets.Dataset, DataReport]:
    # Images inside the dataset stay where they are: they are not copied with the tokens.
    held = [name for name in _IMAGE_COLUMNS if _holds_images(records, name, prepare.source)][:1]
    if not held:
        _probe(records, prepare, bad_samples)
    tokens = datasets.Sequence(datasets.Value("int32"))
    text = datasets.Value("string")
    features = {
        **dict.fromkeys(("input_ids", "labels"), tokens),
        "images": datasets.Sequence(text),
        **dict.fromkeys(("id", "outcome", "reason"), text),
        "length": datasets.Value("int32"),
        "began_with_answer": datasets.Value("bool"),
    }
    rows = records.map(
        _WithoutImages(prepare) if held else prepare,
        with_indices=True,
        remove_columns=records.column_names,
        features=datasets.Features(features),
        num_proc=num_proc,
        new_fingerprint=prepare.fingerprint(records),
        desc="samples",
    )
    outcomes, reasons = list(rows["outcome"]), list(rows["reason"])
    if not held:
        paths_of_rows = rows.select_columns(["images"])
        memory = Path(datasets.config.HF_DATASETS_CACHE) / "ta_llava_checked_images.jsonl"
        damaged = find_damaged_files(
            (path for row in paths_of_rows for path in row["images"] if is_path(path)),
            memory,
            num_threads=num_proc or os.cpu_count() or 1,
        )
        if damaged:
            for index, row in enumerate(paths_of_rows):
                for path in row["images"]:
                    if path in damaged and outcomes[index] == "kept":
                        outcomes[index], reasons[index] = "bad", damaged[path]
    ids = rows.select_columns(["id"])
    bad = [(ids[index]["id"], index, reasons[index]) for index, outcome in enumerate(outcomes) if outcome == "bad"]
    bad_samples.handle(bad)
    dropped = sum(began and outcome == "kept" for began, outcome in zip(rows["began_with_answer"], outcomes))
    report = DataReport(**Counter(outcomes), max_length=prepare.max_length, began_with_answer=dropped)
    if report.kept == 0:
        raise _nothing_left(prepare.source, report, bad[0][2] if bad else "")
    if held:
        images = records.select_columns(held).rename_columns(dict.fromkeys(held, "images"))
        rows = datasets.concatenate_datasets([rows.remove_columns("images"), images], axis=1)
    rows = rows.select([index for index, outcome in enumerate(outcomes) if outcome == "kept"])
    return rows.select_columns(COLUMNS), report


def _probe(records: datasets.Dataset, prepare: _Preparation, bad_samples: _BadSamples) -> None:
    """What is wrong with all samples, such as a wrong `image_folder`, shows in a few, before all are tokenised."""
    if bad_samples.on_bad_sample == "skip":
        return
    bad = []
    for index in range(0, len(records), max(math.ceil(len(records) / _PROBED), 1)):
        row = prepare(records[index], index)
        damages = (find_damage(image) for image in row["images"])
        if reason := row["reason"] or next(filter(None, damages), ""):
            bad.append((row["id"], index, reason))
    bad_samples.handle(bad)


@dataclass
class _WithoutImages:
    """Rows for a dataset whose images are in a column of their own."""

    prepare: _Preparation

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {**self.prepare(record, index), "images": []}


def _prepare_streamed(
    records: datasets.IterableDataset, prepare: _Preparation, bad_samples: _BadSamples
) -> tuple[datasets.IterableDataset, DataReport]:
    for name in _IMAGE_COLUMNS:  # `datasets` would decode them outside our reach
        feature = (records.features or {}).get(name)
        if feature is not None:
            _check_column(name, feature, prepare.source)
        if isinstance(_element(feature), datasets.Image):
            undecoded = datasets.Image(decode=False)
            is_one = isinstance(feature, datasets.Image)
            records = records.cast_column(name, undecoded if is_one else datasets.Sequence(undecoded))

    def stream(report: DataReport, bad_samples: _BadSamples) -> datasets.IterableDataset:
        rows = records.map(_StreamedPreparation(prepare, report, bad_samples), with_indices=True)
        return rows.filter(_is_kept).select_columns(COLUMNS)

    # A look at the beginning finds what is wrong with all of it.
    trial = DataReport(max_length=prepare.max_length)
    if next(iter(stream(trial, _BadSamples(bad_samples.on_bad_sample, None, prepare.source))), None) is None:
        raise _nothing_left(prepare.source, trial)
    report = DataReport(max_length=prepare.max_length)
    return stream(report, bad_samples), report


def _is_kept(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "kept"


def _element(feature: Any) -> Any:
    """What a column holds, or the lists in it."""
    if isinstance(feature, list):
        feature = feature[0]
    return getattr(feature, "feature", feature)


def _is_of(element: Any, *dtypes: str) -> bool:
    return isinstance(element, datasets.Value) and element.dtype in dtypes


def _check_column(name: str, feature: Any, source: str) -> None:
    """Raises `ValueError` for a column that can hold neither images nor their paths."""
    element = _element(feature)
    is_struct = isinstance(element, dict) and not element.keys().isdisjoint(("bytes", "path"))
    texts, contents = ("string", "large_string", "string_view", "null"), ("binary", "large_binary", "binary_view")
    if not is_struct and not isinstance(element, datasets.Image) and not _is_of(element, *texts, *contents):
        raise ValueError(
            f"The column `{name}` of {source or 'the dataset'} holds {element!s:.200}, no images. {HOW_TO_CAST}"
        )


def _holds_images(records: datasets.Dataset, name: str, source: str) -> bool:
    """
    Whether a column holds images, not their paths: those of `datasets`, or files that it no longer says to be images, as
    bytes, in structs, or as text in base64.
    """
    if name not in records.features:
        return False
    _check_column(name, records.features[name], source)
    element = _element(records.features[name])
    if not _is_of(element, "string", "large_string", "string_view"):
        return not _is_of(element, "null")
    first = next((images[0] for row in records.select_columns([name]) if (images := as_list(row[name]))), None)
    return first is not None and not is_path(first)


def iterate_images(dataset: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The images of all rows of [`prepare_dataset`], one after the other, as [`Collator`] asks for their features."""
    for row in dataset.select_columns(["images"]) if isinstance(dataset, datasets.Dataset) else dataset:
        yield from as_list(row["images"])


# --- batches -------------------------------------------------------------------------------------------------------


class VisionFeatures(Protocol):
    """What the vision tower made of images before."""

    def get(self, image: Any) -> torch.Tensor:
        """Features `(M, vision width)` of an image, given as in the column `images`."""


class Collator:
    """
    Batches for the `Trainer`, of rows of [`prepare_dataset`]: padded on the right, with the images opened.

    Args:
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`): That of the model.
        vision_features ([`VisionFeatures`], *optional*): Use these instead of opening the images.

    Raises:
        `ValueError`: The tokenizer has no padding token.
    """

    def __init__(self, processor: Any, vision_features: VisionFeatures | None = None):
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token. Set `processor.tokenizer.pad_token`.")
        self.processor = processor
        self.vision_features = vision_features
        self.images_by_row = hasattr(processor, "num_prefix_tokens")  # TA-LLaVA

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `labels` `(B, S)`. For TA-LLaVA with images also `image_mask` `(B, I)`
            and `pixel_values` `(B, I, 3, H, W)` or `vision_features` `(B, I, M, d)`, zeros where a row has fewer images;
            for LLaVA `(N, 3, H, W)` or `(N, M, d)`, the images of all rows one after the other.

        Raises:
            `ValueError`: An image that cannot be read any more.
        """
        input_ids = [torch.tensor(item["input_ids"]) for item in items]
        labels = [torch.tensor(item["labels"]) for item in items]
        batch = {
            "input_ids": pad_sequence(input_ids, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
        }
        rows = [as_list(item["images"]) for item in items]
        if not any(rows):
            return batch
        if self.vision_features is not None:
            name = "vision_features"
            images = torch.stack([self.vision_features.get(image) for row in rows for image in row])
        else:
            name = "pixel_values"
            opened = [self._open(image, item) for item, row in zip(items, rows) for image in row]
            images = torch.as_tensor(self.processor(images=opened, return_tensors="pt")["pixel_values"])
            images = images.flatten(0, -4)  # (N, 3, H, W)
        if not self.images_by_row:
            return {**batch, name: images}
        counts = torch.tensor([len(row) for row in rows])
        image_mask = torch.arange(int(counts.max())) < counts[:, None]
        by_row = images.new_zeros(*image_mask.shape, *images.shape[1:])
        by_row[image_mask] = images
        return {**batch, name: by_row, "image_mask": image_mask.long()}

    @staticmethod
    def _open(image: Any, item: Mapping[str, Any]) -> Image.Image:
        try:
            return open_image(image)
        except ValueError as error:
            raise ValueError(f"Sample {item.get('id')}: {error}") from error
