"""Pictures in views: which patches are padding, how many tokens are left, how a total is shared, what the tower does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import PINPOINTS, VIEWS, build, pictures_of
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ta_llava import image_views
from ta_llava.image_views import (
    ViewLayout,
    count_packed_tokens,
    layout_of,
    pack_views,
    share_total,
    tile_coverage,
)
from ta_llava.vmtc import (
    class_token_attention,
    compress_tokens,
    importance_scores,
    mean_received_attention,
    plan_stages,
)


SIZES = [(24, 24), (30, 120), (120, 30), (15, 60), (7, 5), (10, 20000), (20000, 10), (48, 48), (100, 26), (33, 50)]
SIDE = 6


def views_of(size, pinpoints=PINPOINTS) -> torch.Tensor:
    """
    What the library's own functions leave of a picture: for each view, which of its patches are not padding,
    `(views, 36)`.
    """
    rows, columns = get_anyres_image_grid_shape(torch.tensor(size), pinpoints, 24)
    number = torch.arange(rows * columns * 36).view(1, rows * SIDE, columns * SIDE)
    kept = set(unpad_image(number, torch.tensor(size)).flatten().tolist())
    views = [torch.ones(36, dtype=torch.bool)]
    for row in range(rows):
        for column in range(columns):
            tile = number[0, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
            views.append(torch.tensor([patch in kept for patch in tile.flatten().tolist()]))
    return torch.stack(views)


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_what_the_library_takes_away(size):
    layout, expected = layout_of(size, PINPOINTS, 24, SIDE), views_of(size)
    assert layout.num_views == len(expected)
    masks = torch.zeros_like(expected)
    for mask, (top, bottom, left, right) in zip(masks, layout.regions(), strict=True):
        for row in range(top, bottom):
            for column in range(left, right):
                mask[row * SIDE + column] = True
    assert torch.equal(masks, expected)
    assert layout.count_patches() == expected.sum(1).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_counted_view_by_view(size):
    layout, views = layout_of(size, PINPOINTS, 24, SIDE), views_of(size)
    rows, _ = get_anyres_image_grid_shape(torch.tensor(size), PINPOINTS, 24)
    settings = SimpleNamespace(
        use_vmtc=True, vmtc_keep_ratio=0.5, vmtc_num_visual_tokens=9, vmtc_total_visual_tokens=None
    )
    assert count_packed_tokens(layout, settings) == sum(min(9, int(view.sum())) for view in views) + rows
    assert count_packed_tokens(layout, settings, 20) == sum(min(20, int(view.sum())) for view in views) + rows
    settings.vmtc_num_visual_tokens, settings.vmtc_total_visual_tokens = None, 60
    assert count_packed_tokens(layout, settings) == min(60, int(views.sum())) + rows
    assert count_packed_tokens(layout, settings, 20) == sum(min(20, int(view.sum())) for view in views) + rows


def test_a_single_view_is_padded_to_a_square():
    layout = layout_of((12, 24), None, 24, SIDE)
    assert (layout.num_views, layout.num_newlines, layout.regions()) == (1, 1, [(1, 5, 0, 6)])
    assert layout_of((24, 24), None, 24, SIDE).count_patches() == [36]


def test_a_total_that_is_too_small_is_named():
    settings = SimpleNamespace(use_vmtc=True, vmtc_num_visual_tokens=None, vmtc_total_visual_tokens=4)
    with pytest.raises(ValueError, match="`vmtc_total_visual_tokens` is 4, but a picture has 5 views with content"):
        count_packed_tokens(layout_of((48, 48), PINPOINTS, 24, SIDE), settings)
    assert count_packed_tokens(layout_of((10, 20000), PINPOINTS, 24, SIDE), settings) == 4 + 1  # no tile has content


def slow_share(total, patches, weights):
    """One token after the other, each to the view that has most weight for each token it already has."""
    shares = [min(1, count) for count in patches]
    while sum(shares) < min(total, sum(patches)):
        claims = [
            weight / (share + 0.5) if share < count else -1
            for share, count, weight in zip(shares, patches, weights, strict=True)
        ]
        shares[int(np.argmax(claims))] += 1
    return shares


@pytest.mark.parametrize("total", [5, 20, 60, 150, 500])
def test_a_total_is_shared_in_proportion(total):
    generator = np.random.default_rng(total)
    for _ in range(20):
        weights = (generator.random(5) ** 3).tolist()
        patches = [36, *generator.integers(0, 37, 4).tolist()]
        shares = share_total(total, patches, weights)
        assert shares == slow_share(total, patches, weights)
        assert sum(shares) == min(total, sum(patches))
        assert all(min(1, count) <= share <= count for share, count in zip(shares, patches, strict=True))
    assert share_total(100, [90] * 3, [0.5, 0.3, 0.2]) == [50, 30, 20]
    assert share_total(9, [36] * 3, [0.0, 1.0, 0.0]) == [1, 7, 1]  # empty tiles get few


@pytest.mark.parametrize("size", SIZES)
def test_tiles_cover_the_whole_picture_once(size):
    layout = layout_of(size, PINPOINTS, 24, SIDE)
    coverage = tile_coverage(layout)
    has_content = sum(layout.count_patches()[1:]) > 0
    if has_content:
        np.testing.assert_allclose(coverage.sum(0), 1)
    # Slowly: points on a fine grid of the whole picture, and the tile that each is on
    top, bottom, left, right = layout.content
    points = 40
    expected = np.zeros_like(coverage)
    for y in range(SIDE * points):
        for x in range(SIDE * points):
            row = (top + (y + 0.5) / (SIDE * points) * (bottom - top)) // SIDE
            column = (left + (x + 0.5) / (SIDE * points) * (right - left)) // SIDE
            expected[int(row) * layout.grid[1] + int(column), y // points * SIDE + x // points] += points**-2.0
    if has_content:
        np.testing.assert_allclose(coverage, expected, atol=0.03)


def test_views_are_packed_row_by_row():
    layouts = [ViewLayout(SIDE, (2, 2), (0, 12, 0, 12)), ViewLayout(SIDE, (0, 0), (0, 6, 0, 6))]
    features = torch.arange(6 * 3.0).view(6, 3, 1)
    packed = pack_views(features, [3, 1, 0, 2, 3, 2], layouts, torch.tensor([-1.0]))
    assert [picture.flatten().tolist() for picture in packed] == [
        [0, 1, 2, 3, -1, 9, 10, 12, 13, 14, -1],
        [15, 16, -1],
    ]


@torch.no_grad()
def slow_view(model, pixels, real, budget):
    """
    The features of one view, block by block. From the first stage on there are only the patches that are not padding, so
    nothing needs to be masked.
    """
    tower, config = model.model.vision_tower, model.config
    feature_layer, count = config.vision_feature_layer, int(real.sum())
    num_blocks = feature_layer if feature_layer >= 0 else len(tower.encoder.layers) + 1 + feature_layer
    first_layer = plan_stages(config, 36, num_blocks, 1)
    plan = plan_stages(config, count, num_blocks, budget) if count else {}
    states = tower.embeddings(pixels[None])
    states = tower.pre_layrnorm(states) if hasattr(tower, "pre_layrnorm") else states
    num_first = states.shape[1] - 36
    for index, block in enumerate(tower.encoder.layers[:num_blocks]):
        normed = block.layer_norm1(states)
        attended = states + block.self_attn(normed)[0]
        if index == min(first_layer):
            index_of_real = torch.cat([torch.arange(num_first), num_first + real.nonzero().flatten()])
            normed, attended = normed[:, index_of_real], attended[:, index_of_real]
        if index in plan:
            query, key = (
                project(normed).unflatten(-1, (3, -1)).transpose(1, 2)
                for project in (block.self_attn.q_proj, block.self_attn.k_proj)
            )
            pays = class_token_attention if num_first else mean_received_attention
            importance = importance_scores(pays(query, key, block.self_attn.scale), attended.shape[1] - num_first)
            stage = plan[index]
            patches, _ = compress_tokens(
                attended[:, num_first:], importance, stage.num_kept, stage.num_clusters, config.vmtc_merge_weights
            )
            attended = torch.cat([attended[:, :num_first], patches], dim=1)
        states = attended + block.mlp(block.layer_norm2(attended))
    return model.model.multi_modal_projector(states[0, num_first:])


@pytest.mark.parametrize("placement", ["spaced", "last"])
@pytest.mark.parametrize("method", ["cluster", "merge", "layerwise_prune", "last_layer_prune"])
@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_each_view_is_compressed_as_if_it_were_alone_and_had_no_padding(family, method, placement):
    model = build(family, vmtc_method=method, vmtc_stage_placement=placement)
    sizes = [size for size in SIZES if 0 not in layout_of(size, PINPOINTS, 24, SIDE).count_patches()]
    assert len(sizes) > 5
    pictures = pictures_of(model, [[size] for size in [*sizes, (10, 20000)]])
    features = model.get_image_features(**pictures).pooler_output
    newline = model.model.image_newline[None]
    for number, size in enumerate(sizes):
        rows, columns = get_anyres_image_grid_shape(torch.tensor(size), PINPOINTS, 24)
        views = [
            slow_view(model, pixels, real, min(9, int(real.sum())))
            for pixels, real in zip(pictures["pixel_values"][number], views_of(size))
        ]
        parts = [views[0]]
        for row in range(rows):
            parts += [*views[1 + row * columns : 1 + (row + 1) * columns], newline]
        torch.testing.assert_close(features[number], torch.cat(parts), atol=2e-4, rtol=2e-4)
    assert len(features[-1]) == 9 + 1


@pytest.mark.parametrize("family", VIEWS)
@torch.no_grad()
def test_with_a_total_the_important_tiles_keep_more(family):
    model = build(family, vmtc_total_visual_tokens=30)
    pictures = pictures_of(model, [[(48, 48)]])
    compressions = []
    tower = model.model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda module, args, kwargs: compressions.append(kwargs["compression"]), with_kwargs=True
    )
    [features] = model.get_image_features(**pictures).pooler_output
    hook.remove()
    [compression] = compressions
    lengths = compression.lengths()
    assert len(features) == sum(lengths) + 2 == 32 and lengths[0] == 6
    # Which tokens of the whole picture matter, slowly, in the first block that compresses
    states = tower.embeddings(pictures["pixel_values"][0, :1])
    states = tower.pre_layrnorm(states) if hasattr(tower, "pre_layrnorm") else states
    for block in tower.encoder.layers[: compression.layers[0]]:
        states = block(states, None)
    attention, normed = (block := tower.encoder.layers[compression.layers[0]]).self_attn, block.layer_norm1(states)
    query, key = (
        project(normed).unflatten(-1, (3, -1)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj)
    )
    pays = class_token_attention if states.shape[1] > 36 else mean_received_attention
    grid = importance_scores(pays(query, key, attention.scale), 36).view(6, 6)
    masses = [grid[y : y + 3, x : x + 3].sum().item() for y in (0, 3) for x in (0, 3)]
    weights = [0.2, *(0.8 * mass / sum(masses) for mass in masses)]
    assert lengths == slow_share(30, [36] * 5, weights)
    assert len(set(lengths[1:])) > 1


@torch.no_grad()
def test_a_mask_is_made_once_after_each_stage(monkeypatch):
    made = []
    make = image_views.create_bidirectional_mask
    monkeypatch.setattr(
        image_views, "create_bidirectional_mask", lambda *args, **kwargs: made.append(1) or make(*args, **kwargs)
    )
    model = build("llava_next", vmtc_layers=[0, 1], vmtc_total_visual_tokens=30)  # of 4 blocks
    pictures = pictures_of(model, [[(48, 48)]])
    model.get_image_features(**pictures)
    assert len(made) == 2
    model.get_image_features(**pictures_of(model, [[(30, 120)]]))  # another call has masks of its own
    assert len(made) == 4


def test_stages_need_a_block():
    model = build("llava_next", vmtc_layers=[])
    with pytest.raises(ValueError, match="`vmtc_layers` is empty, so no block can compress"):
        model.get_image_features(**pictures_of(model, [[(30, 120)]]))
