"""
Turns samples in the format of LLaVA or TRL into the batches of a `Trainer`.

`prepare_dataset` reads the samples and leaves out those that cannot be trained on; its report says how many for which
reason. A prepared sample has token ids, labels and the places of its images. `Collator` opens the images batch by batch.

Samples come from JSON files, folders of `datasets`, repos on the Hub or dataset objects, with records in two formats:

- LLaVA: `{"id", "image", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", ...}]}`
- TRL: `{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...],
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

from .. import encoded_images
from ..common.errors import one_line
from ..data import samples
from ..data.image_columns import IMAGE_COLUMNS, holds_images, leave_encoded
from ..data.report import DataReport
from ..data.samples import (
    SampleError,
    as_list,
    find_damage,
    find_damaged_files,
    is_path,
    open_image,
    read_sample,
)
from ..data.sources import load_records
from . import encoding
from .encoding import IGNORED, SampleEncoder


logger = logging.get_logger(__name__)
COLUMNS = ["input_ids", "labels", "images", "id", "length"]

_PROBED = 16  # number of samples, evenly spaced, that are prepared before all others


# --- data sets -----------------------------------------------------------------------------------------------------


@dataclass
class _Preparation:
    """
    Turns a record into a row. A row has the `COLUMNS`, its `outcome` (a field of [`DataReport`]), the `reason` if it is
    bad, and whether it `began_with_answer`.
    """

    encoder: SampleEncoder
    max_length: int
    image_folder: str | None
    keep_text_only: bool
    source: str
    is_json: bool  # whether a record is one text, `record`
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
        """A hash of everything that the rows depend on, the code included."""
        processor = self.encoder.processor
        settings = [self.max_length, self.image_folder, self.keep_text_only, self.is_json]
        return Hasher.hash(
            [
                records._fingerprint,
                *(
                    Path(str(module.__file__)).read_text(encoding="utf-8")
                    for module in (samples, encoded_images, encoding)
                ),
                Path(__file__).read_text(encoding="utf-8"),
                processor.tokenizer.backend_tokenizer.to_str(),
                str(processor.tokenizer.special_tokens_map),
                str(processor.chat_template),
                str([processor.image_token_id, *self.encoder.settings, *settings]),
            ]
        )


@dataclass
class _BadSamples:
    """Raises for bad samples, or skips them and writes them down."""

    on_bad_sample: str
    file: Path | None
    source: str

    def handle(self, bad: list[tuple[str, int, str]]) -> None:
        """
        Raises the first of the `bad` samples (id, index, reason) as [`SampleError`], or writes each to the file as one line,
        unless the file has that line already.
        """
        if bad and self.on_bad_sample == "error":
            sample_id, index, reason = bad[0]
            if len(bad) > 1:
                reason += f" ({len(bad) - 1} more samples are bad.)"
            raise SampleError(
                sample_id, index, self.source, f'{reason} `on_bad_sample="skip"` leaves such samples out.'
            )
        if not bad or self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = set(self.file.read_text(encoding="utf-8").splitlines()) if self.file.is_file() else set()
        lines = [json.dumps({"id": name, "index": index, "reason": reason}) for name, index, reason in bad]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines if line not in known))


@dataclass
class _StreamedPreparation:
    """Prepares one record after the other, counts it, and handles it if it is bad."""

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
    Prepares samples for [`Collator`], and reports which were left out. The result is kept in the cache of `datasets`, so
    that a second call is quick.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`):
            A `.json` file of one array, a `.jsonl` or `.parquet` file, a folder of such files, a folder that `save_to_disk`
            has written, the name of a repo on the Hub, or a dataset. Records have the format of LLaVA or TRL. A column may
            hold images: as images of `datasets`, or as `bytes`, base64, or structs with `bytes` and `path`.
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`):
            Processor of the model.
        image_folder (`str` or `Path`, *optional*):
            Folder that relative paths of images start from. Defaults to the current folder.
        max_length (`int`):
            Longest sample in tokens, placeholders included. The tokenizer's `model_max_length` is a limit too. Longer
            samples are left out.
        keep_text_only (`bool`):
            Keep samples without an image.
        on_bad_sample (`str`):
            `"error"` raises an error if there is a bad sample; `"skip"` leaves bad samples out.
        bad_samples_file (`str` or `Path`, *optional*):
            File for the bad samples that were left out: a JSON line each, with `id`, `index` and `reason`.
        streaming (`bool`):
            Read the samples and open their images while they are used. Without streaming, all samples are read and all
            images opened beforehand. A `.json` file is always held in memory as a whole; `.jsonl` is read by lines.
        num_proc (`int`, *optional*):
            Processes that prepare a mapped dataset.
        split (`str`):
            Split to read, if the repo or folder has several.

    Returns:
        `tuple[Dataset | IterableDataset, DataReport]`: A dataset with the columns `input_ids`, `labels` (lists of `int`),
        `images` (paths, or the images if the source holds them; see [`iterate_images`]), `id` and `length`.

    Raises:
        [`SampleError`]: There is a bad sample, and `on_bad_sample` is "error".
        `ValueError`: The source cannot be read, or no sample is left to train on.
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
    # Images inside the dataset stay where they are, and are not copied with the tokens.
    held = [name for name in IMAGE_COLUMNS if holds_images(records, name, prepare.source)][:1]
    if not held:
        _probe(records, prepare, bad_samples)
    rows = records.map(
        _WithoutImages(prepare) if held else prepare,
        with_indices=True,
        remove_columns=records.column_names,
        features=_row_features(),
        num_proc=num_proc,
        new_fingerprint=prepare.fingerprint(records),
        desc="samples",
    )
    outcomes, reasons = list(rows["outcome"]), list(rows["reason"])
    if not held:
        for index, reason in _find_damaged_rows(rows, num_proc):
            if outcomes[index] == "kept":
                outcomes[index], reasons[index] = "bad", reason
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


def _row_features() -> datasets.Features:
    tokens, text = datasets.Sequence(datasets.Value("int32")), datasets.Value("string")
    return datasets.Features(
        {
            **dict.fromkeys(("input_ids", "labels"), tokens),
            "images": datasets.Sequence(text),
            **dict.fromkeys(("id", "outcome", "reason"), text),
            "length": datasets.Value("int32"),
            "began_with_answer": datasets.Value("bool"),
        }
    )


def _find_damaged_rows(rows: datasets.Dataset, num_proc: int | None) -> Iterator[tuple[int, str]]:
    """Index of each row with a damaged image file, and what is wrong with the first of them."""
    paths_of_rows = rows.select_columns(["images"])
    damaged = find_damaged_files(
        (path for row in paths_of_rows for path in row["images"] if is_path(path)),
        Path(datasets.config.HF_DATASETS_CACHE) / "ta_llava_checked_images.jsonl",
        num_threads=num_proc or os.cpu_count() or 1,
    )
    if not damaged:
        return
    for index, row in enumerate(paths_of_rows):
        for path in row["images"]:
            if path in damaged:
                yield index, damaged[path]
                break


def _probe(records: datasets.Dataset, prepare: _Preparation, bad_samples: _BadSamples) -> None:
    """Prepares a few samples first. They show what is wrong with all, such as a wrong `image_folder`."""
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
    """Prepares rows of a dataset whose images are in a column of their own."""

    prepare: _Preparation

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {**self.prepare(record, index), "images": []}


def _prepare_streamed(
    records: datasets.IterableDataset, prepare: _Preparation, bad_samples: _BadSamples
) -> tuple[datasets.IterableDataset, DataReport]:
    records = leave_encoded(records, prepare.source)

    def stream(report: DataReport, bad_samples: _BadSamples) -> datasets.IterableDataset:
        rows = records.map(_StreamedPreparation(prepare, report, bad_samples), with_indices=True)
        return rows.filter(_is_kept).select_columns(COLUMNS)

    # The first kept sample shows whether there is any.
    trial = DataReport(max_length=prepare.max_length)
    if next(iter(stream(trial, _BadSamples(bad_samples.on_bad_sample, None, prepare.source))), None) is None:
        raise _nothing_left(prepare.source, trial)
    report = DataReport(max_length=prepare.max_length)
    return stream(report, bad_samples), report


def _is_kept(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "kept"


def iterate_images(dataset: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Gives the images of all rows of [`prepare_dataset`] in order, as [`Collator`] asks for their features."""
    for row in dataset.select_columns(["images"]) if isinstance(dataset, datasets.Dataset) else dataset:
        yield from as_list(row["images"])


# --- batches -------------------------------------------------------------------------------------------------------


class VisionFeatures(Protocol):
    """Features of images that a vision tower has computed before."""

    def get(self, image: Any) -> torch.Tensor:
        """Features `(M, vision width)` of an image from the column `images`."""


class Collator:
    """
    Makes batches for the `Trainer` from rows of [`prepare_dataset`]. It pads them on the right and opens the images.

    Args:
        processor (`TaLlavaProcessor` or `VmtcCmaiLlavaProcessor`): Processor of the model.
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
            for LLaVA `(N, 3, H, W)` or `(N, M, d)`, the images of all rows one after the other; and for images in views what
            their processor makes of them.

        Raises:
            `ValueError`: An image cannot be read any more.
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
        if hasattr(self.processor, "view_size"):  # which images belong to one row may decide about their views
            opened = [[self._open(image, item) for image in row] for item, row in zip(items, rows)]
            return {**batch, **self.processor(images=opened, return_tensors="pt")}
        if self.vision_features is not None:
            name = "vision_features"
            images = torch.stack([self.vision_features.get(image) for row in rows for image in row])
        else:
            name = "pixel_values"
            one_by_one = [self._open(image, item) for item, row in zip(items, rows) for image in row]
            images = torch.as_tensor(self.processor(images=one_by_one, return_tensors="pt")["pixel_values"])
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
