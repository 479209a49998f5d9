"""Colours, fonts and panels."""

import numpy as np
import pytest
import torch
from PIL import Image

from ta_llava.analysis.drawing import _load_fonts, cluster_color, heat_colors


def test_clusters_have_colors_of_their_own():
    colors = [cluster_color(number) for number in range(1, 101)]
    assert len(set(colors)) == 100 and all(0 <= value <= 255 for color in colors for value in color)


def test_heat_colors_get_lighter_with_the_value():
    lightness = np.array(Image.fromarray(heat_colors(torch.linspace(0, 1, 50)[None])).convert("L"))[0].astype(int)
    assert (np.diff(lightness) >= 0).all() and lightness[0] == 0 and lightness[-1] > 240
    assert heat_colors(torch.tensor([torch.nan])).tolist() == [[0, 0, 0]]


def test_characters_that_no_font_has_are_named(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    messages: list[str] = []
    monkeypatch.setattr("ta_llava.analysis.drawing.logger.error", messages.append)
    monkeypatch.setattr(
        "ta_llava.analysis.drawing.FONTS", ("none.ttf", f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    )
    fonts = [_load_fonts(text) for text in ("a red square?", "a форма?", "a 图像?")]
    assert [font.getname()[0] for font, _ in fonts] == ["Aileron", "DejaVu Sans", "Aileron"]
    assert len(messages) == 1 and "boxes for 图像:" in messages[0]
