"""Pixels of easy-VQA's scenes, and where in them the shape is."""

import numpy as np
from PIL import Image

from ta_llava.data.easy_vqa import Scene


def load_pixels(scene: Scene) -> np.ndarray:
    """The image of a scene as uint8 `(64, 64, 3)`."""
    return np.asarray(Image.open(scene.path).convert("RGB"))


def shape_mask(pixels: np.ndarray) -> np.ndarray:
    """
    Boolean mask `(H, W)` of the pixels `(H, W, 3)` uint8 that are not background. The background has the most frequent
    colour of the border.
    """
    # A large shape may cover more than half of an image, but never of its border.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colors, counts = np.unique(border, axis=0, return_counts=True)
    background = colors[counts.argmax()]
    return (np.abs(pixels.astype(int) - background) > 24).any(axis=-1)
