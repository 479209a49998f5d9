"""Sources of samples: JSON files, folders of `datasets`, repos on the Hub and dataset objects."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from ..common.errors import one_line


def load_records(
    source: Any, streaming: bool, split: str
) -> tuple[datasets.Dataset | datasets.IterableDataset, str, bool]:
    """
    Opens a source.

    Returns:
        The records, the name of the source, and whether each record is a text of JSON.

    Raises:
        `ValueError`: There is no such source, or it cannot be read.
    """
    name = str(source) if isinstance(source, (str, os.PathLike)) else ""
    path = Path(name)
    is_json = bool(name) and path.suffix in (".json", ".jsonl")
    is_parquet = bool(name) and path.suffix == ".parquet" and path.is_file()
    if is_json:
        if not path.is_file():
            raise ValueError(f"There is no file {name}.")
        # One text per record, since records may differ in their fields and types.
        status = path.stat()
        arguments: dict[str, Any] = {"path": str(path.resolve()), "stamp": (status.st_size, status.st_mtime_ns)}
        kind = datasets.IterableDataset if streaming else datasets.Dataset
        if streaming:
            next(_read_json(**arguments))  # finds what is wrong with the file before it is used
        try:
            records = kind.from_generator(
                _read_json, gen_kwargs=arguments, features=datasets.Features({"record": datasets.Value("string")})
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(one_line(error.__cause__ or error)) from error
    elif not name:
        records = source
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        records = datasets.load_from_disk(name)
    elif path.is_file() and not is_parquet:
        raise ValueError(f"{name} is neither a .json, nor a .jsonl, nor a .parquet file.")
    else:
        try:
            records = (
                datasets.load_dataset("parquet", data_files=name, split="train", streaming=streaming)
                if is_parquet
                else datasets.load_dataset(name, split=split, streaming=streaming)
            )
        except Exception as error:  # the network, the Hub, the data, or a name that no repo has
            raise ValueError(f"There is no dataset {name!r} that could be read: {one_line(error)}") from error
    if isinstance(records, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in records:
            raise ValueError(f"{name or 'The dataset'} has no split {split!r}, but {', '.join(records)}.")
        records = records[split]
    if not isinstance(records, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"A source of samples is a file, a folder, the name of a repo or a dataset, not a {type(source).__name__}."
        )
    if streaming and isinstance(records, datasets.Dataset):
        records = records.to_iterable_dataset()
    return records, name, is_json


def _read_json(path: str, stamp: Any) -> Iterator[dict[str, str]]:
    """
    Gives the records of a file, each as a text of JSON. `stamp` tells versions of the file apart in the cache.

    Raises:
        `ValueError`: The file is empty, or no array of records.
    """
    count = 0
    with open(path, encoding="utf-8-sig") as file:
        if path.endswith(".jsonl"):
            for line in file:
                if line.strip():
                    count += 1
                    yield {"record": line.strip()}
        else:
            try:
                records = json.load(file)
            except ValueError as error:
                raise ValueError(
                    f"{path} is not JSON: {one_line(error)}. One record per line? Call it .jsonl."
                ) from error
            if not isinstance(records, list):
                raise ValueError(f"{path} is not an array of records. One record per line? Call it .jsonl.")
            for record in records:
                count += 1
                yield {"record": json.dumps(record)}
    if count == 0:
        raise ValueError(f"There are no records in {path}.")
