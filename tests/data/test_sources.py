"""Sources of samples that cannot be read say so."""

import pytest

from ta_llava.data.sources import load_records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "There is no file"),
        ("empty.json", "[]", "no records in"),
        ("empty.jsonl", "\n", "no records in"),
        ("object.json", "{}", "is not an array of records"),
        ("lines.json", "{}\n{}", "is not JSON: Extra data.* Call it .jsonl"),
        ("data.csv", "a,b", "neither a .json, nor a .jsonl, nor a .parquet"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_cannot_be_read(tmp_path, name, content, message, streaming):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / name, streaming, "train")
