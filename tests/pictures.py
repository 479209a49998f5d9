"""The questions that pictures are drawn for, and the pixels that panels must have."""

import numpy as np
from PIL import Image

from ta_llava.analysis.drawing import HEAT_OPACITY, heat_colors, panel_boxes


SHAPE, TEAL = "what shape is in the image?", "is there a teal shape?"


def heat(pixels, values, side):
    """The image in grey under the colours of the values."""
    grey = np.array(Image.fromarray(pixels).convert("L").convert("RGB")).astype(float)
    colors = heat_colors(values).repeat(side, axis=0).repeat(side, axis=1)
    return (1 - HEAT_OPACITY) * grey + HEAT_OPACITY * colors


def pixels_of_panels(picture, num_panels, size, top):
    pixels = np.array(picture).astype(float)
    return [pixels[top + t : top + b, left:right] for left, t, right, b in panel_boxes(num_panels, size)]
