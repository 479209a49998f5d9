"""Images in base64 are told from paths by what they hold."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, features

from ta_llava.data.samples import find_damage, is_path, open_image
from ta_llava.encoded_images import encoded_bytes
from ta_llava.image_loading import load_rgb_image


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8))


def file_of(kind: str) -> bytes:
    needs = {"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)
    if needs and not features.check(needs):
        pytest.skip(f"This Pillow is built without {needs}.")
    file = io.BytesIO()
    noise().save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["AVIF", "PPM", "JPEG2000", "ICO", "TGA", "PNG", "JPEG", "BMP"])
def test_every_format_that_pillow_knows_is_known_in_base64(kind):
    content = file_of(kind)
    expected = np.asarray(load_rgb_image(Image.open(io.BytesIO(content))))
    text, of_urls = base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()
    lines = base64.encodebytes(content).decode()
    for source in (
        text,
        of_urls,
        of_urls.rstrip("="),
        lines,
        f"data:image/x;base64,{text}",
        f"data:;base64,{of_urls}",
    ):
        assert encoded_bytes(source) == content and not is_path(source)
        assert np.array_equal(load_rgb_image(source), expected)
        assert np.array_equal(open_image(source), expected)


def test_both_alphabets_are_told_apart():
    content = next(content for seed in range(9) if {b"+", b"/"} <= set_of(content := ppm(seed)))
    assert encoded_bytes(base64.urlsafe_b64encode(content).decode()) == content


def ppm(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "PPM")
    return file.getvalue()


def set_of(content: bytes) -> set[bytes]:
    return {bytes([letter]) for letter in base64.b64encode(content)}


@pytest.mark.parametrize(
    "path",
    [
        "train2017/000000000009/with/a/long/name/of/many/letters/but/no/dot",
        "my_photographs-of-the-sea/0001_and_more_letters_without_a_dot",
        base64.b64encode(b"no image at all, only a text of some length").decode(),
        "a.png",
        "",
    ],
)
def test_paths_and_texts_that_are_no_image_are_paths(path):
    assert encoded_bytes(path) is None and is_path(path)


def test_what_is_damaged_is_said_in_one_short_line():
    content = file_of("PNG")
    cut = base64.b64encode(content[: len(content) // 2]).decode()
    assert encoded_bytes(cut) is not None and "truncated" in find_damage(cut)
    letters = "abcdefgh" * 1000
    assert find_damage(letters).startswith("There is no image file 'abcdefgh") and len(find_damage(letters)) < 200
    with pytest.raises(ValueError, match="There is no image file") as error:
        load_rgb_image(letters)
    assert len(str(error.value)) < 250
    for garbage in (b"\x00\x01" * 300, {"bytes": b"\x00\x01" * 300, "path": None}):
        damage = find_damage(garbage)
        assert "600 bytes" in damage and "cast_column" in damage and "BytesIO" not in damage
