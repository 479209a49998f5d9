"""Features of a frozen tower, kept on disk: found again, never of another image or model, and whole or not there."""

import base64
import io
import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    IMAGE,
    NUM_PREFIX_TOKENS,
    PAD,
    batch_of,
    build_llava,
    build_model,
    llava_prompt,
    make_lively,
    prompt_ids,
)
from filelock import FileLock
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ta_llava import TaLlavaProcessor, VmtcCmaiLlavaForConditionalGeneration, VmtcCmaiLlavaProcessor
from ta_llava.training import vision_feature_cache
from ta_llava.training.vision_feature_cache import VisionFeatureCache


def picture(seed: int, size: tuple[int, int] = (30, 26)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{index}.png" for index in range(10)]
    for index, path in enumerate(paths):
        picture(index).save(path)
    return paths


@pytest.fixture(scope="module")
def image_processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


@pytest.fixture(scope="module")
def llava(processor, image_processor):
    """Model and processor of LLaVA with VMTC."""
    return build_llava(), VmtcCmaiLlavaProcessor(
        image_processor,
        processor.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        use_vmtc=True,
        vmtc_num_visual_tokens=9,
    )


@pytest.fixture(scope="module")
def ta_llava(processor):
    size = {"height": 12, "width": 12}
    return build_model("llama"), TaLlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), processor.tokenizer, NUM_PREFIX_TOKENS, image_token_id=IMAGE
    )


@pytest.fixture(params=["ta_llava", "llava"])
def system(request):
    return request.getfixturevalue(request.param)


class CountedTower:
    """Counts the images that go through the tower of a model; fails at the call `fails_at`, from 1."""

    def __init__(self, model, fails_at: int = 0, error: type[BaseException] = RuntimeError):
        self.images, self.calls, self.training = 0, 0, set()
        self.fails_at, self.error = fails_at, error
        self.hook = model.base_model.vision_tower.register_forward_pre_hook(self)

    def __call__(self, tower, arguments):
        self.calls += 1
        self.training.add(tower.training)
        if self.calls == self.fails_at:
            raise self.error("out of memory")
        self.images += len(arguments[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def shards_of(cache: VisionFeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("features-*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch):
    """A shard for every batch."""
    monkeypatch.setattr(vision_feature_cache, "_SHARD_BYTES", 1)


# --- what is there -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_those_of_the_model(system, images, tmp_path):
    model, processor = system
    cache = VisionFeatureCache(tmp_path / "new" / "cache", model, processor)
    assert cache.fill(iter(images), batch_size=10) == len(cache) == 10
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    expected = model.get_vision_features(pixel_values)
    assert torch.equal(torch.stack([cache.get(path) for path in images]), expected)
    # Other batches change them by rounding only; what is opened again has the same.
    other = VisionFeatureCache(tmp_path / "other", model, processor)
    other.fill(images, batch_size=3, progress=False)
    other = VisionFeatureCache(tmp_path / "other", model, processor)
    assert len(other) == 10
    torch.testing.assert_close(torch.stack([other.get(path) for path in images]), expected, atol=1e-5, rtol=1e-5)


def test_what_is_there_is_not_computed_again(llava, images, tmp_path):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    with CountedTower(llava[0]) as tower:
        assert cache.fill(images[:6], batch_size=4) == 6
        assert (tower.calls, tower.images) == (2, 6)
        assert cache.fill(images) == 4
        assert cache.fill(images) == 0
        assert VisionFeatureCache(tmp_path / "cache", *llava).fill(images) == 0
        assert (tower.calls, tower.images) == (3, 10)


def test_an_image_is_its_content(llava, images, tmp_path):
    same = tmp_path / "same.jpeg"
    shutil.copyfile(images[0], same)
    data = images[0].read_bytes()
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    forms = [str(same), {"path": None, "bytes": data}, {"path": "gone.png", "bytes": data}, {"path": str(same)}]
    assert cache.fill([images[0], *forms]) == len(cache) == 1
    for form in [images[0], *forms]:
        assert form in cache
        assert torch.equal(cache.get(form), cache.get(images[0]))
    assert images[1] not in cache
    images[1].replace(images[0])  # another content under the old name
    assert images[0] not in cache
    with pytest.raises(ValueError, match=r"has no features of '.*0\.png'. Compute them with `fill`"):
        cache.get(images[0])


def test_pil_images_are_told_apart_by_all_that_the_processor_sees(llava, tmp_path):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    image = picture(0)
    palette = image.quantize(4)
    swapped = palette.copy()
    swapped.putpalette(palette.getpalette()[::-1])
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    transparent = palette.copy()
    transparent.info["transparency"] = 0
    different = [image, picture(1), palette, swapped, turned, transparent, image.convert("L"), image.transpose(4)]
    different.append(Image.frombytes("RGB", (26, 30), image.tobytes()))
    assert cache.fill(different) == len(different)
    assert cache.fill([image.copy(), palette.copy(), image, image]) == 0
    assert torch.equal(cache.get(image.copy()), cache.get(image))
    assert not torch.equal(cache.get(palette), cache.get(swapped))
    with pytest.raises(ValueError, match="no features of a PIL image of size 30x26"):
        cache.get(picture(2))


def test_files_are_read_as_the_processor_reads_them(system, tmp_path):
    model, processor = system
    turned, transparent, long = tmp_path / "turned.jpg", tmp_path / "transparent.png", tmp_path / "long.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(0, (40, 24)).save(turned, exif=exif)
    picture(1).convert("RGBA").resize((30, 26)).save(transparent)
    half = np.asarray(picture(2).convert("RGBA")).copy()
    half[:13, :, 3] = 0
    Image.fromarray(half).save(transparent)
    picture(3, (200, 24)).save(long)
    grey = tmp_path / "16_bit.png"
    Image.fromarray(np.asarray(picture(4).convert("L")).astype(np.uint16) * 257).save(grey)
    paths = [turned, transparent, long, grey]
    cache = VisionFeatureCache(tmp_path / "cache", model, processor)
    cache.fill(paths, batch_size=4)
    with torch.no_grad():
        expected = model.get_vision_features(processor(images=paths, return_tensors="pt")["pixel_values"])
    assert torch.equal(
        torch.stack([cache.get({"path": None, "bytes": path.read_bytes()}) for path in paths]), expected
    )


def test_a_hit_decodes_nothing(llava, images, tmp_path, monkeypatch):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    cache.fill(images)
    monkeypatch.setattr(Image, "open", None)
    cache.get(images[3])
    assert cache.fill(images) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_may_be_kept_in_half_precision(llava, images, tmp_path, dtype):
    full = VisionFeatureCache(tmp_path / "full", *llava)
    half = VisionFeatureCache(tmp_path / "half", *llava, dtype=dtype)
    full.fill(images[:2])
    half.fill(images[:2])
    assert torch.equal(half.get(images[0]), full.get(images[0]).to(dtype))
    with pytest.raises(ValueError, match="with dtype=torch.*16, this call has torch.float32. Choose another folder"):
        VisionFeatureCache(tmp_path / "half", *llava)
    with pytest.raises(ValueError, match=r"`dtype` must be one of torch.float32.*, got torch.int8"):
        VisionFeatureCache(tmp_path / "eighth", *llava, dtype=torch.int8)


def test_values_beyond_the_dtype_are_refused(processor, image_processor, llava, images, tmp_path):
    model = build_llava()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[-2].mlp.fc2.bias.fill_(1e5)
    cache = VisionFeatureCache(tmp_path / "cache", model, llava[1], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"'.*0\.png' have values that are not finite in torch.float16"):
        cache.fill(images[:1])


def test_the_tower_runs_in_evaluation_mode_and_is_left_as_it_was(images, tmp_path, llava):
    model = build_llava().train()
    cache = VisionFeatureCache(tmp_path / "cache", model, llava[1])
    with CountedTower(model) as tower, torch.autocast("cpu", dtype=torch.bfloat16):
        cache.fill(images)
    assert tower.training == {False}
    assert model.model.vision_tower.training
    assert not cache.get(images[0]).requires_grad
    reference = VisionFeatureCache(tmp_path / "reference", *llava)
    reference.fill(images)
    assert torch.equal(reference.get(images[0]), cache.get(images[0]))


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_ta_llava_has_the_same_loss(ta_llava, images, tmp_path, batch_size):
    model, processor = ta_llava
    cache = VisionFeatureCache(tmp_path / "cache", model, processor)
    cache.fill(images, batch_size=batch_size)
    batch = batch_of([prompt_ids(4, 1, response=3), prompt_ids(7, 2, response=2)], side="right")
    batch["labels"] = batch["input_ids"].masked_fill((batch["input_ids"] == PAD) | (batch["input_ids"] == IMAGE), -100)
    rows = [images[:2], images[2:3]]
    pixels = processor(images=rows, text=["<image><image> a", "<image> a"], return_tensors="pt", padding=True)
    features = torch.zeros(2, 2, *cache.get(images[0]).shape)
    for row, paths in enumerate(rows):
        for column, path in enumerate(paths):
            features[row, column] = cache.get(path)
    with torch.no_grad():
        mask = pixels["image_mask"]
        expected = model(**batch, pixel_values=pixels["pixel_values"], image_mask=mask)
        actual = model(**batch, vision_features=features, image_mask=mask)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_llava_has_the_same_loss(llava, images, tmp_path, batch_size):
    model, processor = llava
    cache = VisionFeatureCache(tmp_path / "cache", model, processor)
    cache.fill(images, batch_size=batch_size)
    batch = batch_of([llava_prompt(5, 1, images=2), llava_prompt(8, 2)], side="right")
    batch["labels"] = batch["input_ids"].masked_fill((batch["input_ids"] == PAD) | (batch["input_ids"] == IMAGE), -100)
    with torch.no_grad():
        pixel_values = processor(images=images[:3], return_tensors="pt")["pixel_values"]
        expected = model(**batch, pixel_values=pixel_values)
        actual = model(**batch, vision_features=torch.stack([cache.get(path) for path in images[:3]]))
    assert actual.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


class Features(torch.utils.data.Dataset):
    def __init__(self, cache, images):
        self.cache, self.images = cache, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.cache.get(self.images[index])


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_the_workers_of_a_data_loader_read(llava, images, tmp_path, small_shards, start_method):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    cache.fill(images, batch_size=4)
    assert len(shards_of(cache)) == 3
    expected = torch.stack([cache.get(path) for path in images])  # the shards are open
    assert len(pickle.dumps(cache)) < 10_000  # without the model
    loader = torch.utils.data.DataLoader(
        Features(cache, images), batch_size=5, num_workers=2, multiprocessing_context=start_method
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_copy_without_model_only_reads(llava, images, tmp_path):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    cache.fill(images[:1])
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(images[0]), cache.get(images[0]))
    with pytest.raises(ValueError, match="only be read"):
        copy.fill(images)
    cache.fill(images)  # what has come since is found
    assert torch.equal(copy.get(images[9]), cache.get(images[9]))


# --- interruptions and damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_fill_goes_on_where_it_was(llava, images, tmp_path, error):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    with CountedTower(llava[0], fails_at=3, error=error), pytest.raises(error):
        cache.fill(images, batch_size=2)
    assert not llava[0].model.vision_tower.training
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    assert [path in cache for path in images] == [True] * 4 + [False] * 6
    with CountedTower(llava[0]) as tower:
        assert cache.fill(images, batch_size=2) == 6
        assert tower.images == 6
    reference = VisionFeatureCache(tmp_path / "reference", *llava)
    reference.fill(images, batch_size=2)
    assert all(torch.equal(cache.get(path), reference.get(path)) for path in images)


def test_a_killed_fill_leaves_complete_shards(llava, images, tmp_path, small_shards, monkeypatch):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    save_file = vision_feature_cache.save_file

    def killed(features, path, **kwargs):  # the second shard is half written
        if len(shards_of(cache)) < 1:
            return save_file(features, path, **kwargs)
        path.write_bytes(b"half")
        monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # nobody tidies up after a kill
        raise KeyboardInterrupt

    monkeypatch.setattr(vision_feature_cache, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(images, batch_size=4)
    monkeypatch.undo()
    assert any(path.suffix == ".tmp" for path in cache.folder.iterdir())
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    assert len(cache) == 4
    assert cache.fill(images) == 6
    assert {path.suffix for path in cache.folder.iterdir()} <= {".safetensors", ".json", ""}
    assert len(VisionFeatureCache(tmp_path / "cache", *llava)) == 10


@pytest.mark.parametrize("damage", ["half", "empty", "header", "no checksums"])
def test_a_damaged_shard_is_computed_anew(llava, images, tmp_path, small_shards, damage):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    cache.fill(images, batch_size=5)
    expected = [cache.get(path) for path in images]
    shard = shards_of(cache)[0]
    data = shard.read_bytes()
    damaged = {"half": data[: len(data) // 2], "empty": b"", "header": b"\0" * len(data)}
    shard.write_bytes(damaged.get(damage, data.replace(b"crc32", b"crc33")))
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged or incomplete .*`fill` computes its images anew"):
        cache = VisionFeatureCache(tmp_path / "cache", *llava)
    assert len(cache) == 5
    missing = next(path for path in images if path not in cache)
    with pytest.raises(ValueError, match="has no features of"):
        cache.get(missing)
    with CountedTower(llava[0]) as tower, pytest.warns(UserWarning, match="is damaged or incomplete"):
        assert cache.fill(images, batch_size=5) == 5
        assert tower.images == 5
    assert not shard.exists()
    cache = VisionFeatureCache(tmp_path / "cache", *llava)  # warns no more
    for path, features in zip(images, expected):
        torch.testing.assert_close(cache.get(path), features)


def test_a_shard_that_was_being_copied_is_not_thrown_away(llava, images, tmp_path):
    VisionFeatureCache(tmp_path / "cache", *llava).fill(images)
    shard = next((tmp_path / "cache").glob("features-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.warns(UserWarning, match="is damaged or incomplete"):
        cache = VisionFeatureCache(tmp_path / "cache", *llava)
    assert len(cache) == 0
    shard.write_bytes(data)
    assert cache.fill(images) == 0
    assert shard.exists()


def test_a_changed_byte_is_never_a_silent_wrong_answer(llava, images, tmp_path):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    cache.fill(images[:1])
    shard = shards_of(cache)[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    with pytest.raises(
        ValueError, match=rf"{shard.name} is damaged: it fails its checksum. Delete it, open the cache anew"
    ):
        cache.get(images[0])
    shard.unlink()
    with pytest.raises(ValueError, match="cannot be read any more.*Open the cache anew"):
        pickle.loads(pickle.dumps(cache)).get(images[0])
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    assert cache.fill(images[:1]) == 1


@pytest.mark.parametrize("bad", ["text", "truncated", "empty"])
def test_a_bad_image_is_named_and_what_came_before_is_kept(system, images, tmp_path, bad):
    data = images[5].read_bytes()
    images[5].write_bytes({"text": b"no image", "truncated": data[:300], "empty": b""}[bad])
    cache = VisionFeatureCache(tmp_path / "cache", *system)
    with pytest.raises(ValueError, match=r"5\.png' is not a readable image, or not one for this processor"):
        cache.fill(images, batch_size=2)
    assert len(VisionFeatureCache(tmp_path / "cache", *system)) == 4
    images[5].write_bytes(data)
    assert cache.fill(images) == 6


def test_what_is_no_image_is_named(llava, images, tmp_path):
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    with pytest.raises(ValueError, match=r"The image file 'nowhere\.png' cannot be read: No such file or directory"):
        cache.fill(["nowhere.png"])
    with pytest.raises(ValueError, match="a PIL image, or a dict with `bytes` or `path`, got ndarray"):
        cache.fill([np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match="a PIL image, or a dict with `bytes` or `path`, got NoneType"):
        cache.get({"path": None, "bytes": None})
    with pytest.raises(ValueError, match=r"'.*0\.png' is not a readable image"):
        cache.fill([{"path": str(images[0]), "bytes": b"none"}])
    truncated = Image.open(io.BytesIO(images[0].read_bytes()[:300]))
    with pytest.raises(ValueError, match="a PIL image of size 30x26 cannot be read to its end"):
        cache.fill([truncated])
    with pytest.raises(ValueError, match=r"must be a list or another iterable of images, got '.*0\.png' alone"):
        cache.fill(images[0])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        cache.fill(images, batch_size=0)
    assert len(cache) == 0


def test_a_second_process_waits_and_computes_nothing_twice(llava, images, tmp_path):
    first = VisionFeatureCache(tmp_path / "cache", *llava)
    second = VisionFeatureCache(tmp_path / "cache", *llava)
    lock = FileLock(first.folder / ".lock")
    lock.acquire()  # as the first does while it fills
    counts = []
    thread = threading.Thread(target=lambda: counts.append(second.fill(images)))
    with pytest.warns(UserWarning, match="Another process is filling"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        lock.release()
        thread.join()
    assert counts == [10]
    assert first.fill(images) == 0


# --- other models and settings -------------------------------------------------------------------------------------


def test_the_same_model_saved_and_loaded_is_the_same(llava, images, tmp_path):
    model, processor = llava
    cache = VisionFeatureCache(tmp_path / "cache", model, processor)
    cache.fill(images)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = VmtcCmaiLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    make_lively(loaded.model.language_model, seed=5)  # trained since
    again = VmtcCmaiLlavaProcessor.from_pretrained(tmp_path / "model")
    assert VisionFeatureCache(tmp_path / "cache", loaded, again).fill(images) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_feature_layer": -3}, "vision_feature_layer=-2, the model has -3. Choose another folder"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy=default, the model has full"),
        ({"vmtc_num_visual_tokens": 4}, "vmtc_num_visual_tokens=9, the model has 4"),
        ({"vmtc_merge_weights": "raw"}, "vmtc_merge_weights=normalized, the model has raw"),
        ({"use_vmtc": False}, "use_vmtc=True, the model has False. Choose"),
        ({"use_vmtc": False, "spd_factor": 2}, "spd_factor=1, the model has 2"),
    ],
)
def test_other_settings_are_refused_by_name(llava, tmp_path, change, message):
    model, processor = llava
    VisionFeatureCache(tmp_path / "cache", model, processor)
    with pytest.raises(ValueError, match=f"{tmp_path / 'cache'} was made with (.* with )?{message}"):
        VisionFeatureCache(tmp_path / "cache", build_llava(**change), processor)


def test_settings_that_are_not_in_force_do_not_matter(tmp_path, llava):
    off = {"use_vmtc": False, "cmai_max_ratio": 0.1}
    VisionFeatureCache(tmp_path / "cache", build_llava(**off, vmtc_keep_ratio=0.1), llava[1])
    VisionFeatureCache(tmp_path / "cache", build_llava(**off, vmtc_keep_ratio=0.2, use_cmai=False), llava[1])


def test_another_tower_is_refused(llava, ta_llava, tmp_path):
    model, processor = llava
    VisionFeatureCache(tmp_path / "cache", model, processor)
    other = build_llava()
    with torch.no_grad():
        other.model.vision_tower.embeddings.class_embedding[0] += 1e-3
    with pytest.raises(ValueError, match="was made with another vision tower. Choose another folder"):
        VisionFeatureCache(tmp_path / "cache", other, processor)
    with pytest.raises(ValueError, match="made with vision_tower_dtype=torch.float32, the model has torch.bfloat16"):
        VisionFeatureCache(tmp_path / "cache", build_llava().bfloat16(), processor, dtype=torch.float32)
    with pytest.raises(ValueError, match="with model_type=vmtc_cmai_llava, the model has ta_llava"):
        VisionFeatureCache(tmp_path / "cache", *ta_llava)


def test_another_image_processor_is_refused(llava, processor, tmp_path):
    model, own = llava
    VisionFeatureCache(tmp_path / "cache", model, own)
    size = {"height": 24, "width": 24}
    other = TaLlavaProcessor(CLIPImageProcessorPil(size=size, crop_size=size), processor.tokenizer)
    with pytest.raises(ValueError, match=r"with image_processor.size=.*shortest_edge.*, the processor has .*height"):
        VisionFeatureCache(tmp_path / "cache", model, other)

    class OtherBackend(CLIPImageProcessorPil):
        pass

    settings = own.image_processor.to_dict()
    other = TaLlavaProcessor(OtherBackend(**settings), processor.tokenizer)
    with pytest.raises(ValueError, match="_type=CLIPImageProcessorPil, the processor has OtherBackend"):
        VisionFeatureCache(tmp_path / "cache", model, other)


def test_what_is_no_cache_is_refused(llava, images, tmp_path):
    with pytest.raises(ValueError, match="is a file; a cache of features needs a folder"):
        VisionFeatureCache(images[0], *llava)
    cache = VisionFeatureCache(tmp_path / "cache", *llava)
    cache.fill(images[:1])
    manifest = cache.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:20])
    with pytest.raises(ValueError, match=r"manifest\.json"):
        VisionFeatureCache(tmp_path / "cache", *llava)
    manifest.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        VisionFeatureCache(tmp_path / "cache", *llava)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"has shards but no manifest\.json"):
        VisionFeatureCache(tmp_path / "cache", *llava)


def test_reading_takes_no_lock(llava, images, tmp_path, monkeypatch):
    """Where nothing may be written, or another process fills."""
    VisionFeatureCache(tmp_path / "cache", *llava).fill(images[:1])
    monkeypatch.setattr(vision_feature_cache, "FileLock", None)
    assert VisionFeatureCache(tmp_path / "cache", *llava).get(images[0]).isfinite().all()


def test_a_file_its_bytes_and_its_text_in_base64_are_one_image(system, images, tmp_path):
    """As columns of datasets hold them that have lost what they are."""
    cache = VisionFeatureCache(tmp_path / "cache", *system)
    content = images[0].read_bytes()
    text = base64.b64encode(content).decode()
    others = [content, {"bytes": content, "path": None}, text, f"data:image/png;base64,{text}", str(images[0])]
    assert cache.fill(others, progress=False) == 1
    expected = cache.get(images[0])
    assert all(torch.equal(cache.get(image), expected) for image in others)
    with pytest.raises(ValueError, match=f"no features of an image of {len(images[1].read_bytes())} bytes"):
        cache.get(base64.b64encode(images[1].read_bytes()).decode())
