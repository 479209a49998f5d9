import pytest

from ta_llava.complete_files import complete_or_not_at_all, write_text


def test_what_is_interrupted_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "scores.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), complete_or_not_at_all(path) as unfinished:
        unfinished.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "scores.json"
    write_text(path, "old")
    with complete_or_not_at_all(path) as unfinished:
        unfinished.write_text("new, ü", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new, ü"
    assert list(tmp_path.iterdir()) == [path]
