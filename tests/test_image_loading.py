"""One picture, one tensor: however it is given, to both processors, in training and in evaluation."""

import base64
import copy
import http.server
import io
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHIPPED_LLAVA
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ta_llava import VmtcCmaiLlavaProcessor
from ta_llava.analysis.asking import prompt_inputs
from ta_llava.image_loading import load_rgb_image, open_images, resize_first
from ta_llava.inference import answer
from ta_llava.training.dataset import Collator


@pytest.fixture(scope="module")
def llava():
    return VmtcCmaiLlavaProcessor.from_pretrained(SHIPPED_LLAVA)


@pytest.fixture(params=["ta_llava", "llava"])
def system(request, processor, llava):
    return processor if request.param == "ta_llava" else llava


def photograph(size: tuple[int, int] = (90, 70), seed: int = 0) -> Image.Image:
    """Of all frequencies, and another if it is turned or mirrored."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    noise = np.random.default_rng(seed).normal(0, 20, (size[1], size[0], 3))
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def see_through(mode: str = "RGBA") -> Image.Image:
    """Opaque at the left, transparent at the right, though a color is stored there."""
    image = photograph().convert(mode)
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    return exif


def grey_16_bit() -> Image.Image:
    grey = np.asarray(photograph().convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 257)


def turned_tiff(image: Image.Image) -> tuple[bytes, Image.Image]:
    """Uncompressed, in a mode in which Pillow maps such a file into memory."""
    return encoded(image, "TIFF", exif=turned_exif()), load_rgb_image(image.transpose(Image.Transpose.ROTATE_270))


ANIMATED = {"save_all": True, "append_images": [photograph(seed=1)]}
# What a file holds, and the picture that it is.
KINDS = {
    "rgb.png": (encoded(photograph(), "PNG"), photograph()),
    "rgba.png": (encoded(see_through(), "PNG"), None),
    "grey_alpha.png": (encoded(see_through("L"), "PNG"), None),
    "palette.gif": (encoded(photograph().quantize(16), "GIF", transparency=3), None),
    "one_color.png": (encoded(photograph().quantize(16).convert("RGB"), "PNG", transparency=(0, 0, 0)), None),
    "rgba.webp": (encoded(see_through(), "WEBP", lossless=True), None),
    "grey.png": (encoded(photograph().convert("L"), "PNG"), photograph().convert("L").convert("RGB")),
    "16_bit.png": (encoded(grey_16_bit(), "PNG"), photograph().convert("L").convert("RGB")),
    "16_bit.tiff": (encoded(grey_16_bit(), "TIFF"), photograph().convert("L").convert("RGB")),
    "cmyk.jpg": (encoded(photograph().convert("CMYK"), "JPEG"), None),
    "black_and_white.png": (encoded(photograph().convert("1"), "PNG"), photograph().convert("1").convert("RGB")),
    "turned.jpg": (encoded(photograph(), "JPEG", exif=turned_exif()), None),
    "turned.png": (encoded(photograph(), "PNG", exif=turned_exif()), photograph().transpose(Image.ROTATE_270)),
    "turned.tiff": (encoded(photograph(), "TIFF", exif=turned_exif()), photograph().transpose(Image.ROTATE_270)),
    "turned_grey.tiff": turned_tiff(photograph().convert("L")),
    "turned_rgba.tiff": turned_tiff(see_through()),
    "turned_cmyk.tiff": turned_tiff(photograph().convert("CMYK")),
    "turned_palette.tiff": turned_tiff(photograph().quantize(16)),
    "turned_16_bit.tiff": turned_tiff(grey_16_bit()),
    "animated.gif": (encoded(photograph(), "GIF", **ANIMATED), None),
    "animated.webp": (encoded(photograph(), "WEBP", lossless=True, **ANIMATED), photograph()),
    "animated.png": (encoded(photograph(), "PNG", **ANIMATED), photograph()),
    "large.jpg": (encoded(photograph((3000, 2000)), "JPEG"), None),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server of a folder with a file of each kind, and the folder."""
    folder = tmp_path_factory.mktemp("served")
    for name, (content, _) in KINDS.items():
        (folder / name).write_bytes(content)
    (folder / "page.html").write_text("<html>no image</html>")
    (folder / "cut.png").write_bytes(KINDS["rgb.png"][0][:3000])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def before_pillow_reads(path: Path) -> Path | io.BytesIO:
    """What a user opens who reads a picture before we do: some TIFFs that Pillow opens by path are broken by then."""
    return io.BytesIO(path.read_bytes()) if path.name.startswith("turned_") else path


def pixels_of(processor, images, **kwargs) -> torch.Tensor:
    return torch.as_tensor(processor(images=images, return_tensors="pt", **kwargs)["pixel_values"]).flatten(0, -4)


# --- one picture, one tensor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_is_the_same_however_it_is_given(system, server, name):
    address, folder = server
    path, content = folder / name, KINDS[name][0]
    text = base64.b64encode(content).decode()
    loaded = Image.open(before_pillow_reads(path))
    loaded.load()
    sources = {
        "path": str(path),
        "Path": path,
        "URL": f"{address}/{name}",
        "base64": text,
        "data URL": f"data:image/{path.suffix[1:]};base64,{text}",
        "lazy": Image.open(path),
        "of bytes": Image.open(io.BytesIO(content)),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "BytesIO": io.BytesIO(content),
        "open file": path.open("rb"),
        "dict with bytes": {"bytes": content, "path": None},
        "dict with a path": {"bytes": None, "path": str(path)},
        "loaded": loaded,
        "copy": loaded.copy(),
    }
    expected = pixels_of(system, load_rgb_image(path))
    assert expected.shape == (1, 3, 64, 64)
    for kind, source in sources.items():
        for _ in range(2):  # an open file is read from its beginning each time
            assert torch.equal(pixels_of(system, source), expected), kind
    nested = pixels_of(system, [[path, text], [Image.open(path), path]])
    assert torch.equal(nested, expected.expand(4, -1, -1, -1))

    collate = Collator(system)
    for image in (str(path), Image.open(path), {"bytes": content, "path": None}):
        batch = collate([{"input_ids": [1], "labels": [1], "images": [image], "id": "a"}])
        assert torch.equal(batch["pixel_values"].flatten(0, -4), expected)

    seen = []

    def generate(input_ids, pixel_values, **kwargs):
        seen.append(pixel_values)
        return input_ids

    model = SimpleNamespace(device="cpu", generate=generate)
    for image in (path, Image.open(path), content, io.BytesIO(content)):
        list(answer(model, system, [([image], "what?")]))
        seen.append(prompt_inputs(system, image, "what?")["pixel_values"])
    assert len(seen) == 8 and all(torch.equal(pixels.flatten(0, -4), expected) for pixels in seen)


@pytest.mark.parametrize("name", [name for name, (_, picture) in KINDS.items() if picture is not None])
def test_a_file_becomes_the_picture_that_it_holds(system, server, name):
    assert np.array_equal(load_rgb_image(server[1] / name), KINDS[name][1])
    assert torch.equal(pixels_of(system, server[1] / name), pixels_of(system, KINDS[name][1]))


@pytest.mark.parametrize("name", ["rgba.png", "grey_alpha.png", "rgba.webp"])
def test_transparency_is_laid_on_white_wherever_the_image_is_from(server, name):
    address, folder = server
    color = photograph().convert("L").convert("RGB") if name == "grey_alpha.png" else photograph()
    alpha = np.asarray(see_through().getchannel("A"))[..., None] / 255
    expected = np.asarray(color) * alpha + 255 * (1 - alpha)
    text = base64.b64encode(KINDS[name][0]).decode()
    for source in (folder / name, f"{address}/{name}", text, Image.open(folder / name)):
        assert np.abs(np.asarray(load_rgb_image(source)) - expected).max() <= 1


def test_a_photograph_that_lies_on_its_side_is_turned_once(server):
    """What is turned must not say any more that it is to be turned."""
    for name in ("turned.jpg", "turned.png", "turned.tiff"):
        image = load_rgb_image(server[1] / name)
        assert image.size == (70, 90) and load_rgb_image(image).size == (70, 90)


@pytest.mark.parametrize("system", ["ta_llava"], indirect=True)
def test_images_that_are_not_rescaled_are_read_in_the_same_way(system, server):
    for name in ("rgba.png", "16_bit.png", "turned.jpg"):
        plain, expected = server[1] / name, load_rgb_image(server[1] / name)
        for image in (plain, Image.open(plain)):
            pixels = pixels_of(system, image, do_rescale=False, do_normalize=False)
            assert torch.equal(pixels, pixels_of(system, expected, do_rescale=False, do_normalize=False))
            assert pixels.max() > 200


# --- images that were opened elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "large.jpg"])
def test_copies_and_pickles_of_images_are_read(system, server, name, duplicate):
    path = server[1] / name
    loaded = Image.open(before_pillow_reads(path))
    loaded.load()
    for image in (Image.open(before_pillow_reads(path)), loaded):
        image = duplicate(image)
        assert torch.equal(pixels_of(system, image), pixels_of(system, path))
        text = system.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        )
        assert torch.equal(pixels_of(system, [[image]], text=[text]), pixels_of(system, path))


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png"])
def test_of_an_animation_the_frame_counts_that_is_shown(system, server, name):
    first, second = Image.open(server[1] / name), Image.open(server[1] / name)
    second.seek(1)
    assert torch.equal(pixels_of(system, first), pixels_of(system, server[1] / name))
    assert not torch.equal(pixels_of(system, second), pixels_of(system, first))
    assert torch.equal(pixels_of(system, second), pixels_of(system, copy.deepcopy(second)))
    assert second.tell() == 1


def test_an_image_of_the_user_is_not_changed(system, server):
    image = Image.open(server[1] / "turned.jpg")
    before = np.asarray(image).copy()
    pixels_of(system, image)
    assert image.size == (90, 70) and image.getexif()[0x0112] == 6 and np.array_equal(image, before)
    assert load_rgb_image(before) is not before and load_rgb_image(image) is not image


# --- what LLaVA's own processor makes ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [{"height": 24, "width": 24}, {"shortest_edge": 24}])
@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil])
def test_plain_images_are_what_stock_llava_makes_of_them(llava, server, kind, size):
    """Bit for bit, large ones too."""
    image_processor = kind(size=size, crop_size={"height": 24, "width": 24}, do_center_crop=True)
    ours, stock = (
        each(
            image_processor,
            llava.tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        for each in (VmtcCmaiLlavaProcessor, LlavaProcessor)
    )
    array = np.asarray(photograph())
    images = [
        str(server[1] / "rgb.png"),
        str(server[1] / "large.jpg"),
        str(server[1] / "turned.jpg"),
        photograph(),
        photograph((3000, 2001)),
        photograph((5, 90)),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        np.stack([array, array]),
    ]
    for image in images:
        assert torch.equal(pixels_of(ours, image), pixels_of(stock, image))
    images = [photograph(), photograph((200, 70))]
    for settings in (
        {"do_rescale": False},
        {"do_resize": False},
        {"size": {"height": 48, "width": 36}, "do_center_crop": False},
        {"resample": Image.Resampling.NEAREST},
        {"do_normalize": False, "do_center_crop": False, "size": {"height": 24, "width": 24}},
    ):
        assert torch.equal(pixels_of(ours, images, **settings), pixels_of(stock, images, **settings)), settings
    floats = (array / 255).astype(np.float32)
    assert torch.equal(pixels_of(ours, floats, do_rescale=False), pixels_of(stock, floats, do_rescale=False))


# --- large photographs ---------------------------------------------------------------------------------------------

PREPROCESSING = [
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    CLIPImageProcessorPil(size={"height": 24, "width": 24}, crop_size={"height": 24, "width": 24}),
    CLIPImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 30}, crop_size={"height": 24, "width": 24}),
    CLIPImageProcessorPil(resample=Image.Resampling.LANCZOS),
    CLIPImageProcessorPil(do_resize=False, crop_size={"height": 24, "width": 24}),
    SiglipImageProcessorPil(),
    LlavaImageProcessorPil(do_pad=True),
]


@pytest.mark.parametrize("image_processor", PREPROCESSING)
@pytest.mark.parametrize("size", [(300, 201), (201, 300), (1999, 1333), (7, 5), (90, 24), (24, 24)])
def test_resizing_first_changes_nothing(image_processor, size):
    images = [photograph(size), np.asarray(photograph(size)), photograph(size[::-1])]
    expected = image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(
        image_processor(resize_first(images, image_processor), return_tensors="pt")["pixel_values"], expected
    )


def test_a_large_photograph_never_becomes_an_array(system, server, monkeypatch):
    """Which took longer than to decode and to resize it."""
    sizes = []
    process_image = CLIPImageProcessorPil.process_image
    monkeypatch.setattr(
        CLIPImageProcessorPil,
        "process_image",
        lambda self, image, *args, **kwargs: sizes.append(image.size) or process_image(self, image, *args, **kwargs),
    )
    pixels_of(system, [server[1] / "large.jpg", Image.open(server[1] / "large.jpg")])
    assert sizes == [(64, 64)] * 2


# --- messages ------------------------------------------------------------------------------------------------------


def test_what_a_server_answers_is_named(system, server):
    address = server[0]
    for source, message in [
        (f"{address}/none.png", r"/none\.png' could not be downloaded: 404 \w+"),
        (f"{address}/page.html", r"downloaded from .*/page\.html' is not a readable image"),
        (f"{address}/cut.png", r"downloaded from .*/cut\.png' is not a readable image, or truncated"),
        (base64.b64encode(KINDS["rgb.png"][0][:3000]).decode(), "base64-encoded image .*, or truncated"),
        ("bm90IGFuIGltYWdl", "no image file 'bm90IGFuIGltYWdl'"),
    ]:
        with pytest.raises(ValueError, match=message):
            system(images=source, return_tensors="pt")


def test_an_image_whose_file_was_closed_is_named(system, server):
    with Image.open(server[1] / "rgb.png") as image:
        pass
    with pytest.raises(ValueError, match=r"rgb\.png' cannot be read"):
        pixels_of(system, image)


def test_bytes_and_open_files_that_are_no_image_are_refused_in_one_short_line(system, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    closed = io.BytesIO(KINDS["rgb.png"][0])
    closed.close()
    for image, message in [
        (b"\x00" * 5000, "An image of 5000 bytes is not a readable image"),
        (io.BytesIO(b"\x00" * 5000), "An image of 5000 bytes is not a readable image"),
        (KINDS["rgb.png"][0][:3000], "An image of 3000 bytes is not a readable image, or truncated"),
        (b"", "An image of 0 bytes"),
        ((tmp_path / "text.png").open(), r"open\(path, 'rb'\)"),
        (closed, "open BytesIO: .*closed file"),
        ({"bytes": None, "path": None}, "has its file in `bytes` or `path`, but this one has 'bytes', 'path'"),
        ({"data": b"x" * 5000}, "but this one has 'data'"),
    ]:
        for images in (image, [image], [[image]]):
            with pytest.raises(ValueError, match=message) as error:
                system(images=images)
            assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_open_images_keeps_lists_and_arrays():
    array = np.zeros((4, 4, 3), dtype=np.uint8)
    opened = open_images([[photograph(), array], (), None])
    assert [type(row) for row in opened] == [list, list, type(None)]
    assert opened[0][0].mode == "RGB" and opened[0][1] is array
