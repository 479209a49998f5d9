"""Pictures made of panels: clusters in colours, heat over an image, titles and legends."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers.utils import logging


logger = logging.get_logger(__name__)

KEPT, DROPPED = 0, -1
MARGIN, TITLE_HEIGHT, FONT_SIZE = 8, 22, 14
HEADING_HEIGHT, HEADING_SIZE, LEGEND_HEIGHT, LEGEND_WIDTH = 30, 18, 26, 160
MAX_COLUMNS = 4
# Small images are enlarged to this width, by a whole factor, so that their patches can be seen and titles fit.
MIN_PANEL_WIDTH = 300
# System fonts for characters that Pillow's own font lacks.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc")
_TINT, _DARKENING = 150, 200  # of 255
HEAT_OPACITY = 0.65

# The colours of Okabe and Ito, which the colour-blind can tell apart. Further clusters get other hues.
_COLORS = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]
# From black through red to pale yellow, evenly rising in lightness, so that the colour-blind can read them.
_HEAT_COLORS = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ]
)


@dataclass
class Panels:
    """
    What a picture shows.

    Args:
        sections (`list`): Per section a heading, which may be empty, and a list of panels `(title, image)`.
        legend (`Sequence[str]`): One line, or two texts: the meanings of the darkest and the brightest heat colour.
    """

    sections: list[tuple[str, list[tuple[str, Image.Image]]]]
    legend: Sequence[str] = ()


def cluster_color(number: int) -> tuple[int, int, int]:
    """RGB colour of cluster `number`, from 1; neighbours in number differ in hue and lightness."""
    if number <= len(_COLORS):
        return _COLORS[number - 1]
    lightness = (0.35, 0.6, 0.78)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, lightness, 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def panel_boxes(num_panels: int, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of panels of `size`, in rows of at most `MAX_COLUMNS`, with room for titles."""
    width, height = size
    boxes = []
    for panel in range(num_panels):
        row, column = divmod(panel, MAX_COLUMNS)
        left = MARGIN + column * (width + MARGIN)
        top = TITLE_HEIGHT + row * (height + TITLE_HEIGHT + MARGIN)
        boxes.append((left, top, left + width, top + height))
    return boxes


# --- panels --------------------------------------------------------------------------------------------------------


def draw_panel(image: Image.Image, clusters: list[int], patch_size: int) -> Image.Image:
    """The image with each cluster in its colour and an outline, and dropped patches dark."""
    columns = image.width // patch_size
    colors, mask = Image.new("RGB", image.size), Image.new("L", image.size)
    draw, draw_mask = ImageDraw.Draw(colors), ImageDraw.Draw(mask)
    line = max(1, patch_size // 10)
    for patch, number in enumerate(clusters):
        if number == KEPT:
            continue
        row, column = divmod(patch, columns)
        left, top = column * patch_size, row * patch_size
        right, bottom = left + patch_size - 1, top + patch_size - 1
        draw_mask.rectangle((left, top, right, bottom), fill=_DARKENING if number == DROPPED else _TINT)
        if number == DROPPED:  # the colours are black there
            continue
        draw.rectangle((left, top, right, bottom), fill=cluster_color(number))
        # The outline runs inside the patches of the cluster, so that kept patches are unchanged.
        edges = {
            (left, top, left + line - 1, bottom): patch - 1 if column > 0 else None,
            (right - line + 1, top, right, bottom): patch + 1 if column < columns - 1 else None,
            (left, top, right, top + line - 1): patch - columns,
            (left, bottom - line + 1, right, bottom): patch + columns,
        }
        for edge, neighbour in edges.items():
            if neighbour is None or not 0 <= neighbour < len(clusters) or clusters[neighbour] != number:
                draw_mask.rectangle(edge, fill=255)
    return Image.composite(colors, image, mask)


def heat_colors(values: torch.Tensor) -> np.ndarray:
    """RGB colours `(..., 3)`, uint8, of values in [0, 1], from black to pale yellow; black for nan."""
    place = values.nan_to_num().clamp(0, 1).numpy() * (len(_HEAT_COLORS) - 1)
    below = np.minimum(place.astype(int), len(_HEAT_COLORS) - 2)
    fraction = (place - below)[..., None]
    colors = _HEAT_COLORS[below] * (1 - fraction) + _HEAT_COLORS[below + 1] * fraction
    colors[values.isnan().numpy()] = 0
    return colors.round().astype(np.uint8)


def draw_heat(image: Image.Image, values: torch.Tensor, patch_size: int) -> Image.Image:
    """The image in grey under the colours of `values` `(rows, columns)`. Pixels that are on no patch are unchanged."""
    rows, columns = values.shape
    size = (columns * patch_size, rows * patch_size)
    colors = Image.fromarray(heat_colors(values), "RGB").resize(size, Image.Resampling.NEAREST)
    grey = image.crop((0, 0, *size)).convert("L").convert("RGB")
    panel = image.copy()
    panel.paste(Image.blend(grey, colors, HEAT_OPACITY))
    return panel


def enlarge(image: Image.Image, patch_size: int) -> tuple[Image.Image, int]:
    """A small image enlarged by a whole factor, and the pixels of its patches then."""
    factor = max(1, math.ceil(MIN_PANEL_WIDTH / image.width))
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return large, patch_size * factor


def draw_heat_scale() -> Image.Image:
    """The heat colours, from the darkest on the left to the brightest."""
    colors = Image.fromarray(heat_colors(torch.linspace(0, 1, LEGEND_WIDTH)[None]), "RGB")
    return colors.resize((LEGEND_WIDTH, FONT_SIZE))


# --- the picture ---------------------------------------------------------------------------------------------------


def compose(contents: Panels) -> Image.Image:
    """One picture of all panels with their titles, section below section, the legend at the bottom."""
    sections, legend = contents.sections, contents.legend
    placed, bottom, right = [], 0, 0
    for heading, panels in sections:
        top = bottom + (HEADING_HEIGHT if heading else 0)
        boxes = [
            (left, top + upper, edge, top + lower)
            for left, upper, edge, lower in panel_boxes(len(panels), panels[0][1].size)
        ]
        placed.append((heading, bottom, panels, boxes))
        bottom = max(box[3] for box in boxes) + MARGIN
        right = max(right, *(box[2] for box in boxes), 0)
    picture = Image.new("RGB", (right + MARGIN, bottom + (LEGEND_HEIGHT if legend else 0)), "white")
    draw = ImageDraw.Draw(picture)
    texts = [text for heading, panels in sections for text in (heading, *(title for title, _ in panels))]
    font, heading_font = _load_fonts("".join(texts))
    for heading, top, panels, boxes in placed:
        if heading:
            heading = _shorten(heading, heading_font, right - MARGIN)
            draw.text((MARGIN, top + 6), heading, fill="black", font=heading_font)
        for (title, panel), (left, upper, edge, _) in zip(panels, boxes):
            picture.paste(panel, (left, upper))
            title = _shorten(title, font, edge - left)
            draw.text((left, upper - TITLE_HEIGHT + 3), title, fill="black", font=font)
    if legend:
        left = MARGIN
        text = legend[0] if len(legend) > 1 else _shorten(legend[0], font, right - MARGIN)
        draw.text((left, bottom), text, fill="black", font=font)
        left += round(font.getlength(text)) + MARGIN
    if len(legend) > 1:
        picture.paste(draw_heat_scale(), (left, bottom + 2))
        draw.text((left + LEGEND_WIDTH + MARGIN, bottom), legend[1], fill="black", font=font)
    return picture


def _load_fonts(text: str) -> list[Any]:
    """The first font that has all characters of a text, or else Pillow's, in both sizes."""
    default = [ImageFont.load_default(size) for size in (FONT_SIZE, HEADING_SIZE)]
    absent = _absent(text, default[0])
    if not absent:
        return default
    for name in FONTS:
        try:
            fonts = [ImageFont.truetype(name, size) for size in (FONT_SIZE, HEADING_SIZE)]
        except OSError:  # it is not installed
            continue
        if not _absent(text, fonts[0]):
            return fonts
    # An error, since warnings are off while models are loaded.
    logger.error(f"The picture has boxes for {absent}: no font has them. Install {' or '.join(FONTS)}.")
    return default


def _absent(text: str, font: Any) -> str:
    """The characters of a text that a font draws as the box for unknown ones."""
    box = bytes(font.getmask("\uffff"))
    return "".join(each for each in dict.fromkeys("".join(text.split())) if bytes(font.getmask(each)) == box)


def _shorten(text: str, font: Any, width: int) -> str:
    """A text on one line. Dots replace its end if it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
