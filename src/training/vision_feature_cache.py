"""
Keeps features of a frozen vision tower on disk. They are computed once and read in all phases of training, by any number of
processes.

A cache is a folder. `manifest.json` says what the features depend on; a model that differs in it is refused. Shards
`features-*.safetensors` of about 256 MB hold one tensor per image, under the hash of its content, and a checksum of each. A
shard appears when it is complete, and never changes.
"""

import hashlib
import io
import json
import os
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import ExifTags, Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..common.files import atomic_file
from ..encoded_images import encoded_bytes, shorten
from ..image_loading import read_to_end


_MANIFEST = "manifest.json"
_SHARDS = "features-*.safetensors"
_SHARD_BYTES = 256 * 2**20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class VisionFeatureCache:
    """
    A cache of the features that `get_vision_features` of a TA-LLaVA or a LLaVA with VMTC and CMAI gives.

    An image is the path of a file, a PIL image, the bytes of a file, also in base64, or a dict of `datasets` with `bytes` or
    `path`. The cache knows images by their content: files by their bytes, which a hit does not decode, and PIL images by
    their pixels. A file and the PIL image made from it are two images; a file and its bytes are one.

    Any number of processes may read at once, the workers of a `DataLoader` included. Those get the cache without its model.
    Only one process fills the cache; another waits for it and then computes what is still missing.

    Args:
        folder (`str` or `Path`):
            Folder of this cache alone. A missing folder is made.
        model ([`TaLlavaForConditionalGeneration`] or [`VmtcCmaiLlavaForConditionalGeneration`]):
            The model. Its vision tower must not change while the features are in use.
        processor ([`TaLlavaProcessor`] or [`VmtcCmaiLlavaProcessor`]):
            Makes the pixels, as in training.
        dtype (`torch.dtype`, *optional*):
            Dtype of the features on disk: float32, float16 or bfloat16. Defaults to that of the tower.

    Raises:
        `ValueError`: The folder was filled with other weights or settings, or is no cache.
    """

    def __init__(self, folder: str | Path, model: Any, processor: Any, dtype: torch.dtype | None = None):
        self.folder = Path(folder)
        self.model, self.processor = model, processor
        self.dtype = model.base_model.vision_tower.dtype if dtype is None else dtype
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(map(str, _DTYPES))}, got {self.dtype}.")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a cache of features needs a folder.")
        self._index: dict[str, str] = {}  # from the hash of each image to the name of its shard
        self._shards: set[str] = set()
        self._damaged: set[Path] = set()
        self._open_shards: dict[str, tuple[Any, dict[str, int]]] = {}
        self._process_id = os.getpid()
        self._check_manifest(_fingerprint(model, processor, self.dtype))
        self._find_shards()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, image: Any) -> bool:
        return _hash_of(image) in self._index

    def get(self, image: Any) -> torch.Tensor:
        """
        The features of an image, in the dtype of the cache, on the CPU.

        Returns:
            `torch.Tensor` of shape `(M, vision width)`.

        Raises:
            `ValueError`: The image is not in the cache, or its shard was damaged after the cache was opened.
        """
        key = _hash_of(image)
        if key not in self._index:
            self._find_shards()  # another process may have written some
        if key not in self._index:
            raise ValueError(
                f"The cache {self.folder} has no features of {_name_of(image)}. Compute them with `fill`."
            )
        path = self.folder / self._index[key]
        try:
            tensors, checksums = self._open_shard(path)
            features = tensors.get_tensor(key).clone()  # not a view of the file
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read any more: {error}. Open the cache anew and call `fill`."
            ) from error
        if _checksum(features) != checksums.get(key):
            raise ValueError(
                f"{path} is damaged: it fails its checksum. Delete it, open the cache anew and call `fill`."
            )
        return features

    def fill(self, images: Iterable[Any], batch_size: int = 16, progress: bool = True) -> int:
        """
        Computes the features of images that the cache does not have yet. An interruption loses nothing; a process that is
        killed loses the shard that it has not written yet.

        The tower runs in evaluation mode, in its own dtype, on the device of the model. If the cache has the dtype of the
        tower, features equal `get_vision_features` of the same batch bit for bit. Another batch changes them by rounding
        (small towers in float32: less than 1e-5). With VMTC, rounding may decide between tokens that are nearly equally
        important.

        Args:
            images (iterable of images):
                Images. They are iterated over once.
            batch_size (`int`):
                Number of images that go through the tower together.
            progress (`bool`):
                Show a progress bar.

        Returns:
            `int`: Number of images whose features were computed.

        Raises:
            `ValueError`: An image cannot be read. The message names it.
        """
        if self.model is None:
            raise ValueError("A cache that was sent to another process can only be read. Fill it where its model is.")
        if isinstance(images, (str, os.PathLike, dict, Image.Image)):
            raise ValueError(f"`images` must be a list or another iterable of images, got {_name_of(images)} alone.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        tower = self.model.base_model.vision_tower
        was_training = tower.training
        with self._lock():
            self._damaged.clear()  # a shard that was being copied may be whole now
            self._find_shards()  # another process may have written some
            # This process has the lock, so no other one is writing the unfinished files.
            for path in [*self._damaged, *self.folder.glob(f".{_SHARDS}.tmp")]:
                path.unlink(missing_ok=True)
            num_before = len(self)
            try:
                tower.eval()
                self._compute(
                    tqdm(images, unit="image", desc="features", disable=None if progress else True), batch_size
                )
            finally:
                tower.train(was_training)
            return len(self) - num_before

    def _compute(self, images: Iterable[Any], batch_size: int) -> None:
        remaining = iter(images)
        waiting: dict[str, tuple[str, torch.Tensor]] = {}  # for the tower
        features: dict[str, torch.Tensor] = {}  # for the disk
        try:
            with ThreadPoolExecutor() as pool:  # reading and resizing images would take longer than the tower
                # Two threads must not read the same image object.
                while chunk := {id(image): image for image in islice(remaining, batch_size)}:
                    for key, name, pixels in pool.map(self._load, chunk.values()):
                        if pixels is None or key in waiting or key in features or key in self._index:
                            continue
                        waiting[key] = name, pixels
                        if len(waiting) < batch_size:
                            continue
                        features.update(self._run_tower(waiting))
                        waiting.clear()
                        if sum(tensor.nbytes for tensor in features.values()) >= _SHARD_BYTES:
                            self._write_shard(features)
                            features.clear()
            if waiting:
                features.update(self._run_tower(waiting))
        finally:  # an interruption loses nothing
            if features:
                self._write_shard(features)

    def _load(self, image: Any) -> tuple[str, str, torch.Tensor | None]:
        """Hash and name of an image and, if the cache does not have it yet, its pixels `(3, H, W)`."""
        name, content = _name_of(image), _content_of(image)
        key = _hash_of(image, content)
        if key in self._index:
            return key, name, None
        try:
            if isinstance(content, bytes):
                content = Image.open(io.BytesIO(content))
                content.load()
            pixel_values = self.processor(images=[content], return_tensors="pt")["pixel_values"]
        except Exception as error:  # Pillow's readers raise nearly anything on damaged files
            reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{name} is not a readable image, or not one for this processor: {reason}") from error
        return key, name, pixel_values.flatten(0, -4)[0]

    @torch.no_grad()
    def _run_tower(self, images: dict[str, tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Features of images, by hash, from their names and pixels."""
        tower = self.model.base_model.vision_tower
        pixel_values = torch.stack([pixels for _, pixels in images.values()]).to(tower.device, tower.dtype)
        with torch.autocast(tower.device.type, enabled=False):
            features = self.model.get_vision_features(pixel_values).to(self.dtype).cpu()
        for (name, _), row in zip(images.values(), features):
            if not row.isfinite().all():
                raise ValueError(
                    f"The features of {name} have values that are not finite in {self.dtype}. Pass "
                    "`dtype=torch.float32`, and if that does not help, check the weights of the vision tower."
                )
        return {key: row.clone() for key, row in zip(images, features)}

    # --- files -----------------------------------------------------------------------------------------------------

    def _check_manifest(self, fingerprint: dict[str, Any]) -> None:
        """Writes the manifest of a new cache. Raises `ValueError` if that of an old one differs."""
        path = self.folder / _MANIFEST
        if not path.exists():
            if any(self.folder.glob(_SHARDS)):
                raise ValueError(
                    f"{self.folder} has shards but no {_MANIFEST} that says what they depend on. Choose another folder."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if not path.exists():
                    with atomic_file(path) as unfinished:
                        unfinished.write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
        try:
            made_with = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of a cache: {error}. Choose another folder.") from error
        differences = []
        for name in sorted(made_with.keys() | fingerprint.keys()):
            old, new = made_with.get(name), fingerprint.get(name)
            vmtc_settings_of_one = name.startswith("vmtc_") and made_with.get("use_vmtc") != fingerprint["use_vmtc"]
            if old == new or vmtc_settings_of_one:
                continue
            if name != "vision_tower":
                owner = {"dtype": "this call", "image_processor": "the processor"}.get(name.split(".")[0], "the model")
                differences.append(f"{name}={old}, {owner} has {new}")
            elif made_with.get("vision_tower_dtype") == fingerprint["vision_tower_dtype"]:
                differences.append("another vision tower")
        if differences:
            raise ValueError(f"{self.folder} was made with {'; with '.join(differences)}. Choose another folder.")

    def _find_shards(self) -> None:
        """Adds new shards to the index. Warns about damaged ones."""
        for path in sorted(self.folder.glob(_SHARDS)):
            if path.name in self._shards or path in self._damaged:
                continue
            try:
                with safe_open(path, framework="pt") as tensors:
                    if "crc32" not in (tensors.metadata() or {}):
                        raise SafetensorError("it has no checksums")
                    self._index.update(dict.fromkeys(tensors.keys(), path.name))
            except FileNotFoundError:  # another process has deleted a damaged shard
                continue
            except SafetensorError as error:
                self._damaged.add(path)
                warnings.warn(
                    f"{path} is damaged or incomplete ({error}). `fill` computes its images anew.", stacklevel=3
                )
            else:
                self._shards.add(path.name)

    def _open_shard(self, path: Path) -> tuple[Any, dict[str, int]]:
        """The tensors of a shard, mapped into memory, and their checksums."""
        if self._process_id != os.getpid():  # a fork must not share open files with its parent
            self._open_shards, self._process_id = {}, os.getpid()
        if path.name not in self._open_shards:
            tensors = safe_open(path, framework="pt")
            self._open_shards[path.name] = tensors, json.loads(tensors.metadata()["crc32"])
        return self._open_shards[path.name]

    def _write_shard(self, features: dict[str, torch.Tensor]) -> None:
        checksums = {key: _checksum(tensor) for key, tensor in features.items()}
        path = self.folder / _SHARDS.replace("*", uuid.uuid4().hex)
        with atomic_file(path) as unfinished:
            save_file(features, unfinished, metadata={"crc32": json.dumps(checksums)})
        self._shards.add(path.name)
        self._index.update(dict.fromkeys(features, path.name))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"Another process is filling {self.folder}; waiting for it.", stacklevel=4)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None, "processor": None, "_open_shards": {}}


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bytes_of(tensor))


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a tensor, as an array of bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


# --- what features depend on ---------------------------------------------------------------------------------------


def _fingerprint(model: Any, processor: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What the features depend on, by name, in types of JSON."""
    config, tower = model.config, model.base_model.vision_tower
    # The kind of model matters: TA-LLaVA's processor crops the middle of long images, LLaVA's does not.
    names = ["model_type", "vision_feature_layer", "vision_feature_select_strategy", "use_vmtc", "spd_factor"]
    if config.use_vmtc:
        names += [name for name in config.to_dict() if name.startswith("vmtc_")]
    weights = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(_bytes_of(tensor))
    fingerprint = {name: getattr(config, name, None) for name in names}
    for part, settings in (
        ("vision_config", tower.config.to_json_string(use_diff=False)),
        ("image_processor", processor.image_processor.to_json_string()),
    ):
        fingerprint |= {
            f"{part}.{name}": value
            for name, value in json.loads(settings).items()
            if not name.startswith(("_", "output_")) and name not in _IRRELEVANT
        }
    # Processors with Pillow and with torchvision have the same settings, but resize a little differently.
    fingerprint["image_processor.image_processor_type"] = type(processor.image_processor).__name__
    fingerprint |= {"vision_tower": weights.hexdigest(), "vision_tower_dtype": str(tower.dtype), "dtype": str(dtype)}
    return json.loads(json.dumps(fingerprint))


# Fields that say where a config or processor came from, not what it does.
_IRRELEVANT = {"architectures", "auto_map", "dtype", "processor_class", "return_dict", "transformers_version"}


# --- images --------------------------------------------------------------------------------------------------------


def _name_of(image: Any) -> str:
    """The name of an image in error messages."""
    if isinstance(image, dict) and isinstance(image.get("path"), (str, os.PathLike)):
        image = image["path"]
    content = encoded_bytes(image)
    if content is not None:
        return f"an image of {len(content)} bytes"
    if isinstance(image, (str, os.PathLike)):
        return repr(shorten(os.fspath(image)))
    if isinstance(image, Image.Image):
        filename = getattr(image, "filename", "")
        return repr(str(filename)) if filename else f"a PIL image of size {image.width}x{image.height}"
    return f"an image of type {type(image).__name__}"


def _content_of(image: Any) -> bytes | Image.Image:
    """The bytes of an image file, or the PIL image that was given."""
    if isinstance(image, Image.Image):
        return image
    encoded = encoded_bytes(image)
    if encoded is not None:
        return encoded
    if isinstance(image, dict):
        image = image.get("path")
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(
            f"An image is the path of a file, a PIL image, or a dict with `bytes` or `path`, got {type(image).__name__}."
        )
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"The image file {shorten(os.fspath(image))!r} cannot be read: {error.strerror}.") from error


def _hash_of(image: Any, content: bytes | Image.Image | None = None) -> str:
    """The key of an image's features. With `content`, the image is not read a second time."""
    content = _content_of(image) if content is None else content
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    try:
        read_to_end(content)
        pixels = content.tobytes()
        orientation = content.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{_name_of(image)} cannot be read to its end; is it truncated? ({error})") from error
    # The pixels, and whatever else the processor looks at.
    looks = (content.mode, content.size, content.getpalette(), content.info.get("transparency"), orientation)
    return hashlib.sha256(repr(looks).encode() + pixels).hexdigest()


__all__ = ["VisionFeatureCache"]
