import pytest

from ta_llava.common.files import atomic_file, atomic_folder, write_text


def test_what_is_interrupted_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "scores.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as unfinished:
        unfinished.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "scores.json"
    write_text(path, "old")
    with atomic_file(path) as unfinished:
        unfinished.write_text("new, ü", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new, ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_interrupted_is_not_there(tmp_path):
    folder = tmp_path / "new" / "model"
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as unfinished:
        (unfinished / "config.json").touch()
        raise KeyboardInterrupt
    assert list(folder.parent.iterdir()) == []


def test_a_folder_is_there_when_it_is_complete(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("new", "empty"):
        folder = tmp_path / name
        if name == "empty":
            folder.mkdir()
        with atomic_folder(folder) as unfinished:
            (unfinished / "config.json").write_text("{}")
            assert not (folder / "config.json").exists()
        assert (folder / "config.json").read_text() == "{}"
        assert folder.stat().st_mode == other.stat().st_mode  # others may read it too
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty", "other"}
