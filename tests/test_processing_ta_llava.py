import base64
import copy
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from conftest import EXAMPLE_IMAGE
from PIL import Image
from transformers import AutoProcessor

from ta_llava import TaLlavaProcessor, image_loading
from ta_llava.image_loading import load_rgb_image, sample_frames


QUESTION = "what color is the shape?"
L = 4  # placeholders of the shipped processor


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    """A teal left half and a yellow right half."""
    image = Image.new("RGB", size, (0, 128, 128))
    image.paste((255, 255, 0), (size[0] // 2, 0, *size))
    return image.convert(mode)


def user(*content) -> list[dict]:
    """A conversation of one turn of the user: texts, images, and whatever is an item already."""
    items = [
        item
        if isinstance(item, dict)
        else {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "image", "image": item}
        for item in content
    ]
    return [{"role": "user", "content": items}]


def chat(processor, conversations, **kwargs):
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


# --- images --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_server(tmp_path_factory):
    """Serves a folder with an image and a text file on loopback."""
    folder = tmp_path_factory.mktemp("served")
    picture().save(folder / "picture.png")
    (folder / "page.html").write_text("<html>no image</html>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_kind_of_source_gives_the_same_image(tmp_path, image_server):
    expected = np.asarray(picture())
    path = tmp_path / "picture.png"
    picture().save(path)
    sources = [
        path,
        str(path),
        f"{image_server}/picture.png",
        base64.b64encode(path.read_bytes()).decode(),
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        picture(),
        expected,
        expected.transpose(2, 0, 1),
        expected / 255,
        torch.from_numpy(expected.copy()),
        torch.from_numpy(expected.copy()).permute(2, 0, 1).to(torch.bfloat16) / 255,
        expected.astype(np.uint16) * 257,
        expected / 255 * 1.004 - 0.002,  # what resizing does to floats
        expected * 1.004 - 0.5,
    ]
    for source in sources:
        actual = np.asarray(load_rgb_image(source)).astype(int)
        assert np.abs(actual - expected).max() <= 1, source  # bfloat16 holds 8 bits


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA", "I;16", "I", "F", "HSV", "RGBa", "La"])
def test_every_mode_of_image_is_converted(mode):
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "RGBa":
        image = picture("RGBA").convert("RGBa")
    elif mode in ("LA", "La"):
        image = picture("L").convert("LA").convert(mode)
    elif mode == "P":
        image = picture().quantize()
    else:
        image = picture(mode)
    assert image.mode == mode
    expected = picture(
        "1" if mode == "1" else "RGB" if mode not in ("L", "LA", "La", "I;16", "I", "F") else "L"
    ).convert("RGB")
    converted = load_rgb_image(image)
    assert converted.mode == "RGB" and converted.size == (20, 12)
    assert np.abs(np.asarray(converted).astype(int) - np.asarray(expected).astype(int)).max() <= 3


def test_transparency_is_laid_on_white(tmp_path):
    image = picture("RGBA")
    image.putalpha(0)
    assert load_rgb_image(image).getextrema() == ((255, 255),) * 3
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert load_rgb_image(tmp_path / "palette.png").getextrema() == ((255, 255),) * 3


def test_of_an_animated_image_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert load_rgb_image(tmp_path / "animated.gif").getpixel((0, 0)) == (255, 0, 0)


def test_the_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture().save(tmp_path / "turned.png", exif=exif)
    assert load_rgb_image(tmp_path / "turned.png").size == (12, 20)


def test_unreadable_images_are_named(tmp_path, image_server):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    buffer = io.BytesIO()
    picture(size=(400, 400)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:600])
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:700])
    for source, message in [
        (tmp_path / "empty.png", "empty.png.*0 bytes"),
        (tmp_path / "text.png", "text.png.*not a readable image"),
        (tmp_path / "cut.jpg", "cut.jpg.*truncated"),
        (tmp_path / "cut.png", "cut.png.*truncated"),
        (tmp_path / "none.png", "no image file.*none.png"),
        (tmp_path, "folder"),
        (f"{image_server}/page.html", "page.html.*not a readable image"),
        (f"{image_server}/none.png", "none.png.*404"),
        ("http://127.0.0.1:1/a.png", "127.0.0.1:1/a.png.*could not be downloaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_rgb_image(source)
    with Image.open(tmp_path / "cut.png") as lazy, pytest.raises(ValueError, match="cut.png.*truncated"):
        load_rgb_image(lazy)


def test_arrays_that_are_no_images_are_refused():
    for array, message in [
        (np.zeros((2, 3, 4, 5)), r"\(2, 3, 4, 5\)"),
        (np.zeros((7, 7, 7)), r"\(7, 7, 7\)"),
        (np.random.default_rng(0).normal(size=(4, 4, 3)), "normalised already"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (np.full((4, 4, 3), 70_000), "70000"),
        (np.full((4, 4, 3), -1), "-1"),
        (object(), "cannot be made"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_rgb_image(array)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (20_000, 1)])
def test_images_of_extreme_sizes(processor, size):
    inputs = chat(processor, user(picture(size=size), QUESTION))
    assert inputs["pixel_values"].shape == (1, 1, 3, 64, 64)
    assert torch.isfinite(inputs["pixel_values"]).all()


def test_an_image_of_too_many_pixels_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    picture(size=(20_000, 9)).save(path)
    assert load_rgb_image(path).size == (20_000, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # it takes gigabytes to show with Pillow's own limit
    with pytest.raises(ValueError, match="large.png.*too large.*180000 pixels"):
        load_rgb_image(path)


def test_what_a_centre_crop_discards_is_not_resized(processor):
    """With CLIP's usual preprocessing a strip of 20,000 x 4 pixels would become 1,120,000 x 224 first."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    cropping = TaLlavaProcessor(CLIPImageProcessorPil(), processor.tokenizer, num_prefix_tokens=L)
    pixels = cropping(images=picture(size=(20_000, 4)), text="<image> what?", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 3, 224, 224)
    # An image of ordinary proportions is what the image processor alone makes of it.
    usual = cropping(images=picture(size=(90, 60)), text="<image> what?", return_tensors="pt")["pixel_values"]
    expected = CLIPImageProcessorPil()(picture(size=(90, 60)), return_tensors="pt")["pixel_values"]
    assert torch.equal(usual[0], expected)


# --- text ----------------------------------------------------------------------------------------------------------


def test_placeholders_stand_before_all_text_and_bos_comes_once(processor):
    tokenizer = processor.tokenizer
    inputs = chat(processor, user(picture(), QUESTION))
    ids = inputs["input_ids"][0].tolist()
    assert ids[:L] == [processor.image_token_id] * L
    assert ids[L] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(processor.image_token_id) == L
    turns = "<start_of_turn> user \n what ▁color ▁is ▁the ▁shape ? <end_of_turn> \n <start_of_turn> model \n"
    assert tokenizer.convert_ids_to_tokens(ids[L + 1 :]) == turns.split(" ")
    assert inputs["attention_mask"].all() and inputs["attention_mask"].shape == inputs["input_ids"].shape


def test_a_row_without_images_is_what_the_tokenizer_makes_of_it(processor):
    text = processor.apply_chat_template(user(QUESTION), add_generation_prompt=True)
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat(processor, user(QUESTION))["input_ids"][0].tolist() == expected
    assert processor(text=QUESTION)["input_ids"] == [processor.tokenizer(QUESTION)["input_ids"]]
    assert "pixel_values" not in processor(text=QUESTION)
    for no_images in ([], [[]], [None]):
        inputs = processor(images=no_images, text=QUESTION)
        assert inputs["input_ids"] == processor(text=QUESTION)["input_ids"] and "pixel_values" not in inputs


def test_the_place_of_an_image_in_the_text_does_not_matter(processor):
    texts = ["<image>\nwhat color is the shape?", "what color <image>is the shape?", "what color is the shape?<image>"]
    rows = [processor(images=picture(), text=text)["input_ids"][0] for text in texts]
    assert rows[0] == rows[1] == rows[2] == [processor.image_token_id] * L + processor.tokenizer(QUESTION)["input_ids"]


def test_a_bos_token_that_the_tokenizer_adds_comes_after_the_placeholders(processor):
    """Tokenizers of Gemma and Llama add it by themselves; a template that writes it must not double it."""
    from tokenizers.processors import TemplateProcessing

    processor = copy.deepcopy(processor)
    bos, image = processor.tokenizer.bos_token_id, processor.image_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    for text in ("<image>the shape", "<bos><image>the shape", "<image><bos>the shape"):
        ids = processor(images=picture(), text=text)["input_ids"][0]
        assert ids[: L + 1] == [image] * L + [bos] and ids.count(bos) == 1 and len(ids) == L + 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_mix_rows_with_no_one_and_several_images(processor, side):
    conversations = [
        user(QUESTION),
        user(picture(), QUESTION),
        user(picture("L"), picture(), "is there a red shape in the image?"),
    ]
    inputs = chat(processor, conversations, processor_kwargs={"padding": True, "padding_side": side})
    assert inputs["image_mask"].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert inputs["pixel_values"].shape == (3, 2, 3, 64, 64)
    for index, conversation in enumerate(conversations):
        alone = chat(processor, conversation)
        ids = inputs["input_ids"][index]
        kept = inputs["attention_mask"][index].bool()
        assert torch.equal(ids[kept], alone["input_ids"][0])
        padding = ids[~kept]
        assert (padding == processor.tokenizer.pad_token_id).all()
        if len(padding):
            assert kept[-1 if side == "left" else 0]
        count = int(inputs["image_mask"][index].sum())
        if count:
            assert torch.equal(inputs["pixel_values"][index, :count], alone["pixel_values"][0])


def test_flat_lists_of_images_are_dealt_out_by_the_text(processor):
    texts = ["<image><image> two", "none", "<image> one"]
    images = [picture(), picture("L"), picture("1")]
    flat = processor(images=images, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[images[:2], [], images[2:]], text=texts, padding=True, return_tensors="pt")
    assert flat["image_mask"].tolist() == [[1, 1], [0, 0], [1, 0]]
    for key in flat:
        assert torch.equal(flat[key], nested[key])
    stacked = np.stack([np.asarray(picture())] * 2)
    assert processor(images=stacked, text=["<image> a", "<image> b"])["pixel_values"].shape == (2, 1, 3, 64, 64)


def test_images_alone(processor):
    inputs = processor(images=[picture(), picture()], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 1, 3, 64, 64) and "input_ids" not in inputs


def test_mm_token_type_ids_mark_the_placeholders(processor):
    inputs = chat(processor, user(picture(), QUESTION), processor_kwargs={"return_mm_token_type_ids": True})
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)
    assert processor._get_num_multimodal_tokens(image_sizes=[(9, 9), (8, 7)])["num_image_tokens"] == [L, 0]


def test_assistant_masks_mark_what_the_model_says(processor):
    conversation = [*user(picture(), QUESTION), {"role": "assistant", "content": "teal"}]
    longer = [*user(picture(), QUESTION), {"role": "assistant", "content": "blue shape"}]
    inputs = processor.apply_chat_template(
        [conversation, longer],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    for row, expected in enumerate(["teal <end_of_turn>", "blue ▁shape <end_of_turn>"]):
        said = inputs["input_ids"][row][inputs["assistant_masks"][row].bool()]
        assert processor.tokenizer.convert_ids_to_tokens(said.tolist()) == expected.split()


def test_truncation_keeps_the_placeholders(processor):
    ids = processor(images=picture(), text="<image>" + QUESTION, truncation=True, max_length=7)["input_ids"][0]
    assert ids[:L] == [processor.image_token_id] * L and len(ids) == 7


def test_truncation_without_a_length_to_truncate_to(processor):
    """Some tokenizers know no limit; then nothing is cut, as with the tokenizer alone."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.model_max_length = int(1e30)
    expected = processor(images=picture(), text="<image>" + QUESTION)["input_ids"]
    for truncation in (True, "do_not_truncate", False):
        assert processor(images=picture(), text="<image>" + QUESTION, truncation=truncation)["input_ids"] == expected
    with pytest.raises(ValueError, match="is 4, but a row with images needs 4 placeholders"):
        processor(images=picture(), text="<image>" + QUESTION, truncation=True, max_length=4)


def test_what_is_returned(processor):
    assert set(processor(text=QUESTION, return_attention_mask=False)) == {"input_ids"}
    inputs = processor(images=picture(), text="<image>" + QUESTION, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())
    with pytest.raises(ValueError, match="return_overflowing_tokens"):
        processor(text=QUESTION, return_overflowing_tokens=True)


def test_padding_to_a_length(processor):
    inputs = processor(
        images=picture(), text="<image>" + QUESTION, padding="max_length", max_length=20, return_tensors="pt"
    )
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (1, 20)


def test_output_is_decoded(processor):
    ids = processor.tokenizer("teal")["input_ids"] + [processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert processor.post_process_image_text_to_text(torch.tensor([ids])) == ["teal"]
    assert processor.batch_decode([ids], skip_special_tokens=True) == ["teal"]


def test_saved_is_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert "processor_config.json" in files and "preprocessor_config.json" not in files
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TaLlavaProcessor and loaded.chat_template == processor.chat_template
    for name in ("num_prefix_tokens", "image_token", "image_token_id"):
        assert getattr(loaded, name) == getattr(processor, name)
    first, second = (chat(each, user(picture(), QUESTION)) for each in (processor, loaded))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_processor_with_a_placeholder_of_another_name(processor, tmp_path):
    """Gemma has unused tokens: one of them can be the placeholder while the text says `<image>`."""
    unused = processor.tokenizer.convert_tokens_to_ids("brown")
    other = TaLlavaProcessor(
        processor.image_processor, processor.tokenizer, num_prefix_tokens=2, image_token_id=unused
    )
    other.save_pretrained(tmp_path)
    for each in (other, AutoProcessor.from_pretrained(tmp_path)):
        assert each(images=picture(), text="<image>the shape")["input_ids"][0][:3] == [
            unused,
            unused,
            processor.tokenizer.convert_tokens_to_ids("the"),
        ]
    with pytest.raises(ValueError, match="no token '<picture>'"):
        TaLlavaProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")


# --- bad input -----------------------------------------------------------------------------------------------------


def test_numbers_of_images_and_prompts_must_agree(processor):
    image = picture()
    with pytest.raises(ValueError, match="have 1 <image>, but got 2 images"):
        processor(images=[image, image], text="<image> what?")
    with pytest.raises(ValueError, match="have 2 <image>, but got 1 images"):
        processor(images=image, text=["<image> a", "<image> b"])
    with pytest.raises(ValueError, match="have 0 <image>, but got 1 images"):
        processor(images=image, text="what?")
    with pytest.raises(ValueError, match="have 1 <image>, but got 0 images"):
        processor(text="<image> what?")
    with pytest.raises(ValueError, match="cannot be made from NoneType"):
        processor(images=[image, None], text="<image><image> what?")
    with pytest.raises(ValueError, match="images for 2 rows, but 1 prompts"):
        processor(images=[[image], [image]], text=["<image> a"])
    with pytest.raises(ValueError, match="Prompt 1 has 0 <image> but 1 images"):
        processor(images=[[image], [image]], text=["<image> a", "b"])


def test_text_must_be_text(processor):
    for text in ("", "   ", ["what?", ""]):
        with pytest.raises(ValueError, match="Prompt [01] is empty"):
            processor(text=text)
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        processor(images=picture(), text="<image>\n")
    for text in ([1, 2], [], 3):
        with pytest.raises(ValueError, match="string or a list of strings"):
            processor(text=text)
    with pytest.raises(ValueError, match="Give `text`, `images`, `videos`"):
        processor()


def test_a_prompt_longer_than_the_context(processor):
    with pytest.raises(
        ValueError, match=r"Prompt 0 has 604 tokens, 4 of them placeholders, but the context holds 512"
    ):
        processor(images=picture(), text="<image>" + "shape " * 600)


# --- videos --------------------------------------------------------------------------------------------------------


def film(num_frames: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 12, 20, 3), dtype=np.uint8)


def assert_same(inputs, expected):
    assert inputs.keys() == expected.keys()
    assert all(np.array_equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "num_frames, chosen", [(None, [0, 1, 2, 3, 5, 6, 7, 8]), (4, [0, 2, 5, 7]), (1, [0]), (20, range(10))]
)
def test_a_video_is_frames_at_equal_distances(processor, num_frames, chosen):
    video = film()
    inputs = processor(text=f"<video>\n{QUESTION}", videos=video, num_frames=num_frames)
    images = [video[index] for index in chosen]
    assert_same(inputs, processor(text="<image>" * len(images) + QUESTION, images=images))


def test_a_video_without_text(processor):
    video = film(2)
    inputs, expected = processor(videos=video), processor(text="<video>a", videos=video)
    assert_same(inputs, {key: expected[key] for key in ("pixel_values", "image_mask")})


def test_every_form_of_a_video_gives_the_same(processor):
    video = film(3)
    frames = [Image.fromarray(frame) for frame in video]
    expected = processor(text="<video>a", videos=video)
    forms = [frames, list(video), [video], video[None], [[video]], [frames], torch.tensor(video)]
    for form in [*forms, torch.tensor(video).permute(0, 3, 1, 2)]:
        assert_same(processor(text="<video>a", videos=form), expected)


def test_rows_have_images_and_videos_in_the_order_of_their_text(processor):
    first, second = film(2), film(1, seed=1)
    inputs = processor(
        text=["a<video>b<image>", "c", "<image><video>d"],
        images=[[picture()], [], [picture("L")]],
        videos=[first, second],
        padding=True,
    )
    expected = processor(
        text=["a<image><image>b<image>", "c", "<image><image>d"],
        images=[[*first, picture()], [], [picture("L"), *second]],
        padding=True,
    )
    assert_same(inputs, expected)
    assert inputs["image_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]


def test_a_video_of_a_conversation(processor, tmp_path):
    frames = film(3)
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for path, frame in zip(paths, frames):
        Image.fromarray(frame).save(path)
    expected = chat(processor, user(*map(Image.fromarray, frames[:2]), QUESTION))
    for video in (frames, paths):
        conversation = [user({"type": "video", "video": video}, QUESTION)]
        assert_same(chat(processor, conversation, processor_kwargs={"num_frames": 2}), expected)


def test_a_video_file(processor, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        for index in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = sample_frames(path, 5)
    assert np.allclose([frame.mean() for frame in frames], [0, 40, 80, 120, 160], atol=2)
    assert_same(
        processor(text="<video>a", videos=path, num_frames=5), processor(text="<image>" * 5 + "a", images=frames)
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"text": "a", "videos": film()}, "The prompts have 0 <video>, but got 1 videos"),
        ({"text": ["<video>a", "b<video>"], "videos": film()}, "The prompts have 2 <video>, but got 1 videos"),
        ({"text": "<video>a"}, "The prompts have 1 <video>, but got 0 videos"),
        ({"text": "<video>a", "videos": film(), "num_frames": 0}, "`num_frames` must be at least 1, got 0"),
        ({"text": "<video>a", "videos": film(), "fps": 2}, "pass `num_frames` instead of `fps`"),
        ({"text": "<video>a", "videos": film(0)}, "A video has no frames"),
        ({"text": "<video>a", "videos": 3}, "<class 'int'>"),
        ({"text": "<video>a", "videos": "nowhere.mp4"}, "The video 'nowhere.mp4' could not be read"),
        ({"text": "<video>a", "videos": __file__}, "could not be read"),
    ],
)
def test_videos_that_cannot_be_read(processor, kwargs, message):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        processor(**kwargs)


def test_a_video_file_without_a_decoder(processor, monkeypatch):
    monkeypatch.setattr(image_loading, "_VIDEO_DECODERS", {"pyav": lambda: False})
    with pytest.raises(ImportError, match="decodes the video 'a.mp4'.*`pip install av`"):
        processor(text="<video>a", videos="a.mp4")


def test_sound_is_refused(processor):
    with pytest.raises(ValueError, match="does not support `audio`"):
        processor(text="what?", audio=np.zeros(8))


def test_the_example_image_is_readable():
    assert load_rgb_image(EXAMPLE_IMAGE).size == (224, 224)
