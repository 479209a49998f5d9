"""What VMTC does to each patch, and how the picture shows it."""

import numpy as np
import pytest
import torch
from PIL import Image

from ta_llava.analysis.drawing import (
    DROPPED,
    KEPT,
    LEGEND_HEIGHT,
    MARGIN,
    TITLE_HEIGHT,
    cluster_color,
    compose,
    panel_boxes,
)
from ta_llava.analysis.vmtc_stages import StageView, compose_trace, stage_panels
from ta_llava.vmtc import VmtcStage, compress_tokens


def slow_composition(trace, stages):
    """Tokens as sets of patches; of each stage, the tokens that are single patches and those that are clusters."""
    tokens = [({patch}, False) for patch in range(len(trace[0]))]
    composed = []
    for becomes, stage in zip(trace, stages):
        after = [(set(), False) for _ in range(stage.num_kept + stage.num_clusters)]
        for (patches, is_cluster), target in zip(tokens, becomes.tolist()):
            if target >= 0:
                merged = target >= stage.num_kept
                after[target] = (after[target][0] | patches, after[target][1] or is_cluster or merged)
        tokens = after
        singles = {patch for patches, is_cluster in tokens if not is_cluster for patch in patches}
        composed.append((singles, {frozenset(patches) for patches, is_cluster in tokens if is_cluster}))
    return composed


def random_trace(num_tokens: int, stages: list[VmtcStage], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, trace = torch.randn(1, num_tokens, 4, generator=generator), []
    for stage in stages:
        importance = torch.rand(1, tokens.shape[1], generator=generator)
        tokens, becomes = compress_tokens(tokens, importance, stage.num_kept, stage.num_clusters)
        trace.append(becomes[0])
    return trace


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "stages",
    [
        [(12, 3), (8, 3), (4, 2)],
        [(20, 4)],
        [(0, 5), (0, 2), (0, 1)],
        [(17, 1), (10, 1), (3, 1)],  # one token for all that are merged
        [(15, 0), (7, 0), (1, 0)],  # dropped
        [(15, 0), (7, 2), (1, 1)],
    ],
)
def test_the_composed_trace_is_that_of_sets_of_patches(stages, seed):
    stages = [VmtcStage(*stage) for stage in stages]
    trace = random_trace(25, stages, seed)
    views = compose_trace(trace, stages)
    num_before = 25
    for view, stage, (singles, clusters) in zip(views, stages, slow_composition(trace, stages), strict=True):
        by_number: dict = {}
        for patch, number in enumerate(view.clusters):
            by_number.setdefault(number, set()).add(patch)
        by_number.pop(DROPPED, None)
        assert by_number.pop(KEPT, set()) == singles
        assert set(map(frozenset, by_number.values())) == clusters
        assert (view.num_before, view.num_kept, view.num_merged) == (num_before, len(singles), len(clusters))
        assert view.num_dropped == (num_before - stage.num_kept if stage.num_clusters == 0 else 0)
        num_before = stage.num_kept + stage.num_clusters


def test_a_cluster_keeps_its_number_while_it_lives():
    stages = [VmtcStage(3, 2), VmtcStage(3, 1), VmtcStage(1, 1)]
    trace = [
        torch.tensor([0, 1, 2, 3, 3, 4, 4, 4]),  # clusters of 2 and 3 patches
        torch.tensor([3, 0, 3, 1, 2]),  # both clusters are kept, two single patches merged
        torch.tensor([0, 1, 1, 1]),  # all clusters become one
    ]
    first, second, third = compose_trace(trace, stages)
    assert first.clusters == [KEPT, KEPT, KEPT, 1, 1, 2, 2, 2]
    assert second.clusters == [3, KEPT, 3, 1, 1, 2, 2, 2]
    assert third.clusters == [2, KEPT, 2, 2, 2, 2, 2, 2]
    assert second.title == "5 -> 4 (1 kept, 3 merged)" and third.title == "4 -> 2 (1 kept, 1 merged)"


def test_a_cluster_of_one_patch_is_a_cluster_from_then_on():
    stages = [VmtcStage(1, 1), VmtcStage(1, 0)]
    views = compose_trace([torch.tensor([0, 1]), torch.tensor([-1, 0])], stages)
    assert [view.clusters for view in views] == [[KEPT, 1], [DROPPED, 1]]
    assert [view.title for view in views] == ["2 -> 2 (1 kept, 1 merged)", "2 -> 1 (0 kept, 1 merged, 1 dropped)"]


def test_no_stage_is_nothing():
    assert compose_trace([], []) == []


@pytest.mark.parametrize(("size", "patch_size"), [((24, 24), 4), ((320, 160), 16), ((27, 26), 4)])
def test_kept_patches_are_unchanged_merged_ones_tinted_and_dropped_ones_dark(size, patch_size):
    pixels = np.random.default_rng(0).integers(64, 256, (size[1], size[0], 3)).astype(np.uint8)
    columns, rows = size[0] // patch_size, size[1] // patch_size
    clusters = [(KEPT, 1, 2, DROPPED)[patch % 4] for patch in range(columns * rows)]
    view = StageView(clusters, columns * rows, 9, 2, 3)
    picture = np.array(compose(stage_panels(Image.fromarray(pixels), [view] * 5, patch_size)))

    factor = max(1, -(-300 // size[0]))
    width, height = size[0] * factor, size[1] * factor
    panels_height = 2 * (height + TITLE_HEIGHT + MARGIN)
    assert picture.shape == (panels_height + LEGEND_HEIGHT, 4 * (width + MARGIN) + MARGIN, 3)
    legend = picture[panels_height:]
    assert (legend < 128).any() and (legend[:, -MARGIN:] == 255).all()
    original, *panels = [
        picture[top:bottom, left:right] for left, top, right, bottom in panel_boxes(6, (width, height))
    ]
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    assert np.array_equal(original, large)
    side = patch_size * factor
    for panel in panels:
        for patch, number in enumerate(clusters):
            row, column = divmod(patch, columns)
            here = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            drawn, seen = panel[here].astype(int), large[here].astype(int)
            if number == KEPT:
                assert np.array_equal(drawn, seen)
            elif number == DROPPED:
                assert (drawn < 0.3 * seen).all()
            else:
                color = np.array(cluster_color(number))
                assert (np.abs(drawn - color) <= np.abs(seen - color)).all() and not np.array_equal(drawn, seen)
                assert (drawn[side // 2, 0] == color).all() and not (drawn[side // 2, side // 2] == color).all()
        # Pixels that are on no patch, where the size is no multiple of it.
        assert np.array_equal(panel[rows * side :], large[rows * side :])
    title = picture[:TITLE_HEIGHT]
    assert (title[:, MARGIN : MARGIN + width] < 128).any() and (title[:, -MARGIN:] == 255).all()


def test_the_titles_fit():
    view = StageView([KEPT] * 36, 576, 342, 63, 0)
    picture = np.array(compose(stage_panels(Image.new("RGB", (24, 24)), [view], 4)))
    gap = picture[:TITLE_HEIGHT, -2 * MARGIN :]
    assert view.title == "576 -> 405 (342 kept, 63 merged)" and (gap == 255).all()
