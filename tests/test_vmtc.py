"""VMTC: each function of the maths against loops written from the paper's equations, and the plan of its stages."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from ta_llava.vmtc import (
    TRAINING_FREE_VMTC,
    VmtcConfig,
    VmtcStage,
    choose_seeds,
    class_token_attention,
    compress_tokens,
    cosine_kmeans,
    count_visual_tokens,
    importance_scores,
    mean_received_attention,
    merge_clusters,
    plan_stages,
    spatial_downsample,
    split_by_importance,
    split_by_novelty,
)


# --- the maths -----------------------------------------------------------------------------------------------------


def slow_attention(query, key, scaling):
    """Attention weights `(B, heads, queries, keys)`, number by number."""
    weights = torch.zeros(*query.shape[:3], key.shape[2])
    for index in np.ndindex(*query.shape[:3]):
        scores = [float(query[index] @ key[index[0], index[1], k]) * scaling for k in range(key.shape[2])]
        total = sum(math.exp(score) for score in scores)
        weights[index] = torch.tensor([math.exp(score) / total for score in scores])
    return weights


@pytest.mark.parametrize("heads, tokens", [(1, 2), (3, 7), (4, 10)])
def test_importance_is_the_head_averaged_attention_of_the_class_token(heads, tokens):
    query, key = torch.randn(2, 2, heads, tokens, 5)
    row = class_token_attention(query, key, 0.5)
    expected = slow_attention(query, key, 0.5)[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(importance_scores(row, tokens - 1), expected)


def test_without_class_token_importance_is_the_mean_attention_received():
    query, key = torch.randn(2, 2, 3, 6, 5)
    row = mean_received_attention(query, key, 0.5)
    expected = slow_attention(query, key, 0.5).mean(dim=(1, 2))
    torch.testing.assert_close(importance_scores(row, 6), expected)


@pytest.mark.parametrize("num_tokens, num_kept", [(1, 1), (1, 0), (7, 3), (16, 16), (9, 0), (200, 90)])
def test_split_keeps_the_most_important_in_their_order(num_tokens, num_kept):
    importance = torch.randint(0, 4, (5, num_tokens)).float()  # many ties
    kept, redundant = split_by_importance(importance, num_kept)
    for row in range(5):
        ranked = sorted(range(num_tokens), key=lambda i: (-float(importance[row, i]), i))
        assert kept[row].tolist() == sorted(ranked[:num_kept])
        assert redundant[row].tolist() == ranked[num_kept:]


@pytest.mark.parametrize("num_tokens, num_kept", [(1, 1), (1, 0), (7, 3), (16, 16), (9, 0), (200, 90)])
def test_split_by_novelty_keeps_tokens_that_are_important_and_unlike(num_tokens, num_kept):
    tokens = torch.stack([blobs(num_tokens, 8, seed=seed) for seed in range(5)]).double()
    importance = torch.randint(1, 9, (5, num_tokens)).double()  # many ties
    scale = torch.rand(5, num_tokens, 1) + 0.1  # the length of a token does not count
    kept, redundant = split_by_novelty(tokens * scale, importance, num_kept)
    for row in range(5):
        novelty = slow_novelty(tokens[row], importance[row])
        scores = [float(importance[row, i]) * novelty[i] for i in range(num_tokens)]
        ranked = sorted(range(num_tokens), key=lambda i: (-scores[i], i))
        assert kept[row].tolist() == sorted(ranked[:num_kept])
        assert redundant[row].tolist() == ranked[num_kept:]


def test_of_equal_tokens_only_one_is_novel():
    tokens = torch.eye(4).repeat_interleave(3, dim=0)[None]
    importance = torch.tensor([[9.0, 8, 8, 2, 3, 2, 0.2, 0.1, 0.1, 5, 6, 7]])
    assert split_by_novelty(tokens, importance, 4)[0].tolist() == [[0, 4, 6, 11]]
    assert split_by_importance(importance, 4)[0].tolist() == [[0, 1, 2, 11]]


@pytest.mark.parametrize("merge_weights", ["raw", "normalized"])
def test_merge_is_equation_7(merge_weights):
    tokens, importance = torch.randn(3, 11, 4), torch.rand(3, 11)
    labels = torch.stack([torch.randperm(11) % 4 for _ in range(3)])
    merged = merge_clusters(tokens, importance, labels, 4, merge_weights)
    for row in range(3):
        for cluster in range(4):
            expected, total = torch.zeros(4), 0.0
            for j in range(11):
                if labels[row, j] == cluster:
                    expected += importance[row, j] * tokens[row, j]
                    total += float(importance[row, j])
            if merge_weights == "normalized":
                expected /= total
            torch.testing.assert_close(merged[row, cluster], expected)


def test_normalized_merge_of_tokens_without_importance_is_their_mean():
    tokens = torch.randn(1, 4, 3)
    merged = merge_clusters(tokens, torch.zeros(1, 4), torch.tensor([[0, 0, 1, 1]]), 2, "normalized")
    torch.testing.assert_close(merged[0], torch.stack([tokens[0, :2].mean(0), tokens[0, 2:].mean(0)]))


def blobs(num_tokens, width, num_blobs=6, seed=0):
    """Unit vectors in some bunches."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_blobs, width, generator=generator)
    which = torch.randint(num_blobs, (num_tokens,), generator=generator)
    tokens = centres[which] + 0.4 * torch.randn(num_tokens, width, generator=generator)
    return torch.nn.functional.normalize(tokens, dim=-1)


def inertia(points, labels, num_clusters):
    centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(num_clusters)])
    return float(((points - centres[labels]) ** 2).sum())


KMEANS_SHAPES = [(50, 16, 7), (100, 8, 2), (171, 48, 45), (234, 64, 63), (181, 64, 10), (37, 24, 36)]


def random_importance(num_tokens, seed=0):
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed))


def slow_novelty(points, importance):
    novelty = []
    for i in range(len(points)):
        cosines = [float(points[i] @ points[j]) for j in range(len(points)) if importance[j] > importance[i]]
        novelty.append(1 - max(cosines, default=-1.0))
    return novelty


def slow_seeds(points, importance, num_clusters):
    novelty = slow_novelty(points, importance)
    scores = [float(importance[i]) * novelty[i] for i in range(len(points))]
    return sorted(range(len(points)), key=lambda i: (-scores[i], i))[:num_clusters]


def slow_kmeans(points, importance, num_clusters, num_iterations):
    seeds = slow_seeds(points, importance, num_clusters)
    centres = [points[seed] for seed in seeds]
    for iteration in range(num_iterations + 1):
        labels = [
            min(range(num_clusters), key=lambda c: float((point - centres[c]).square().sum())) for point in points
        ]
        for cluster, seed in enumerate(seeds):
            labels[seed] = cluster
        if iteration < num_iterations:
            centres = [points[[label == c for label in labels]].mean(0) for c in range(num_clusters)]
    return labels


@pytest.mark.parametrize("num_tokens, width, num_clusters", KMEANS_SHAPES)
@pytest.mark.parametrize("num_iterations", [0, 1, 3])
def test_kmeans_is_lloyds_algorithm_from_important_and_novel_tokens(num_tokens, width, num_clusters, num_iterations):
    points, importance = blobs(num_tokens, width).double(), random_importance(num_tokens).double()
    seeds = choose_seeds((points @ points.mT)[None], importance[None], num_clusters)
    assert seeds[0].tolist() == slow_seeds(points, importance, num_clusters)
    scale = torch.rand(num_tokens, 1) + 0.1  # the length of a token does not count
    labels = cosine_kmeans((points * scale)[None], importance[None], num_clusters, num_iterations)
    assert labels[0].tolist() == slow_kmeans(points, importance, num_clusters, num_iterations)


@pytest.mark.parametrize("num_tokens, width, num_clusters", KMEANS_SHAPES[:-1])
def test_one_step_is_nearly_as_good_as_ten_rounds_of_scikit_learn(num_tokens, width, num_clusters):
    points = blobs(num_tokens, width, seed=1)
    labels = cosine_kmeans(points[None], random_importance(num_tokens)[None], num_clusters)[0]
    theirs = KMeans(num_clusters, n_init=10, random_state=0).fit(points.numpy())
    assert inertia(points, labels, num_clusters) <= 1.3 * theirs.inertia_


@pytest.mark.parametrize("tokens", ["equal", "two kinds", "zero", "random"])
@pytest.mark.parametrize("num_tokens, num_clusters", [(1, 1), (5, 5), (9, 4), (12, 11), (30, 1)])
def test_kmeans_has_no_empty_cluster(tokens, num_tokens, num_clusters):
    values = torch.randn(3, num_tokens, 6)
    if tokens == "equal":
        values[:] = values[:, :1]
    elif tokens == "two kinds":
        values[:, 1:] = values[:, :1]
        values[:, -1] *= -1
    elif tokens == "zero":
        values.zero_()
    labels = cosine_kmeans(values, random_importance(num_tokens).expand(3, -1), num_clusters)
    for row in labels.tolist():
        assert set(row) == set(range(num_clusters))


def test_kmeans_of_a_batch_is_that_of_its_images():
    batch = torch.stack([blobs(40, 8, seed=seed) for seed in range(6)])
    importance = torch.stack([random_importance(40, seed) for seed in range(6)])
    together = cosine_kmeans(batch, importance, 9)
    for i in range(6):
        assert torch.equal(together[i], cosine_kmeans(batch[i : i + 1], importance[i : i + 1], 9)[0])


def test_kmeans_can_be_compiled_without_a_graph_break():
    batch, importance = (
        torch.stack([blobs(20, 8, seed=seed) for seed in range(2)]),
        random_importance(20).expand(2, -1),
    )
    compiled = torch.compile(cosine_kmeans, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch, importance, 5), cosine_kmeans(batch, importance, 5))


def test_kmeans_runs_without_values():
    tokens, importance = torch.empty(2, 20, 8, device="meta"), torch.empty(2, 20, device="meta")
    assert cosine_kmeans(tokens, importance, 5).shape == (2, 20)


def test_more_clusters_than_tokens_are_refused():
    with pytest.raises(ValueError, match="3 tokens cannot make 4 clusters"):
        cosine_kmeans(torch.randn(1, 3, 4), torch.rand(1, 3), 4)


@pytest.mark.parametrize("num_kept, num_clusters", [(5, 3), (5, 1), (5, 0), (0, 1), (0, 4), (10, 1)])
@pytest.mark.parametrize("kept_tokens", ["importance", "importance_and_novelty"])
def test_a_stage_keeps_and_merges(num_kept, num_clusters, kept_tokens):
    tokens, importance = torch.randn(3, 12, 4), torch.rand(3, 12)
    output, becomes = compress_tokens(tokens, importance, num_kept, num_clusters, kept_tokens=kept_tokens)
    assert output.shape == (3, num_kept + num_clusters, 4)
    kept, redundant = split_by_importance(importance, num_kept)
    if kept_tokens == "importance_and_novelty":
        kept, redundant = split_by_novelty(tokens, importance, num_kept)
    for row in range(3):
        assert torch.equal(output[row, :num_kept], tokens[row, kept[row]])
        assert becomes[row, kept[row]].tolist() == list(range(num_kept))
        for cluster in range(num_clusters):
            members = [j for j in redundant[row].tolist() if becomes[row, j] == num_kept + cluster]
            expected = sum(importance[row, j] * tokens[row, j] for j in members)
            torch.testing.assert_close(output[row, num_kept + cluster], expected)
        if num_clusters == 0:
            assert (becomes[row, redundant[row]] == -1).all()


def test_gradients_reach_tokens_and_importance():
    tokens, importance = torch.randn(2, 12, 4, requires_grad=True), torch.rand(2, 12, requires_grad=True)
    output, becomes = compress_tokens(tokens, importance, 4, 3)
    output.square().sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()
    assert torch.equal(importance.grad != 0, becomes >= 4)  # importance weighs what is merged


def test_spatial_downsampling_averages_squares():
    features = torch.randn(2, 24, 3)
    output = spatial_downsample(features, (4, 6), 2)
    for row in range(2):
        for column in range(3):
            members = [features[:, y * 6 + x] for y in (2 * row, 2 * row + 1) for x in (2 * column, 2 * column + 1)]
            torch.testing.assert_close(output[:, row * 3 + column], sum(members) / 4)
    with pytest.raises(ValueError, match=r"`spd_factor` is 4, which does not divide the grid of 4 x 6"):
        spatial_downsample(features, (4, 6), 4)


# --- the plan ------------------------------------------------------------------------------------------------------


def settings(**kwargs):
    return VmtcConfig(**{"use_vmtc": True, **kwargs})


def test_stages_are_equally_spaced_and_remove_the_same_number():
    stages = plan_stages(settings(vmtc_num_visual_tokens=12), 48, 23)
    assert {layer: stage.num_kept + stage.num_clusters for layer, stage in stages.items()} == {5: 36, 11: 24, 17: 12}


@pytest.mark.parametrize("num_blocks, layers", [(23, [20, 21, 22]), (11, [8, 9, 10]), (3, [0, 1, 2])])
def test_the_last_blocks_that_run_compress(num_blocks, layers):
    stages = plan_stages(settings(vmtc_num_visual_tokens=12, **TRAINING_FREE_VMTC), 48, num_blocks)
    assert {layer: stage.num_kept + stage.num_clusters for layer, stage in stages.items()} == dict(
        zip(layers, (36, 24, 12), strict=True)
    )


def test_the_published_budgets():
    assert plan_stages(settings(), 576, 23) == {5: VmtcStage(405, 75), 11: VmtcStage(324, 60), 17: VmtcStage(243, 45)}
    stages = plan_stages(settings(vmtc_num_visual_tokens=64), 576, 23)
    assert list(stages.values())[-1] == VmtcStage(54, 10)  # the 10 of 64


@pytest.mark.parametrize(
    "method, expected",
    [
        ("last_layer_prune", {22: VmtcStage(64, 0)}),
        ("layerwise_prune", {5: VmtcStage(405, 0), 11: VmtcStage(235, 0), 17: VmtcStage(64, 0)}),
        ("merge", {5: VmtcStage(404, 1), 11: VmtcStage(234, 1), 17: VmtcStage(63, 1)}),
        ("cluster", {5: VmtcStage(342, 63), 11: VmtcStage(198, 37), 17: VmtcStage(54, 10)}),
    ],
)
def test_the_methods_of_table_4(method, expected):
    assert plan_stages(settings(vmtc_num_visual_tokens=64, vmtc_method=method), 576, 23) == expected


@pytest.mark.parametrize("num_patches, num_blocks", [(1, 1), (2, 3), (9, 2), (576, 23), (49, 12)])
@pytest.mark.parametrize("method", ["last_layer_prune", "layerwise_prune", "merge", "cluster"])
def test_every_budget_is_met_exactly(num_patches, num_blocks, method):
    for num_stages in range(1, min(num_blocks, 4) + 1):
        config = settings(vmtc_method=method, vmtc_num_stages=num_stages)
        for budget in range(1, min(num_patches, 60) + 1):
            num_tokens = num_patches
            for layer, stage in plan_stages(config, num_patches, num_blocks, budget).items():
                assert 0 <= layer < num_blocks
                assert stage.num_kept >= 0
                assert stage.num_kept + stage.num_clusters < num_tokens
                num_tokens = stage.num_kept + stage.num_clusters
            assert num_tokens == budget == count_visual_tokens(config, num_patches, budget)


def test_layers_can_be_named():
    stages = plan_stages(settings(vmtc_layers=[2, 3], vmtc_num_visual_tokens=10), 30, 6)
    assert {layer: stage.num_kept + stage.num_clusters for layer, stage in stages.items()} == {2: 20, 3: 10}


def test_the_processor_counts_from_its_own_settings():
    assert count_visual_tokens(settings(), 576) == 288
    assert count_visual_tokens(settings(vmtc_keep_ratio=0.001), 36) == 1
    assert count_visual_tokens(SimpleNamespace(use_vmtc=False, spd_factor=3), 576) == 64
    assert count_visual_tokens(SimpleNamespace(use_vmtc=False), 576) == 576


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"vmtc_keep_ratio": 0.0}, "vmtc_keep_ratio.*must be above 0 and at most 1, got 0.0"),
        ({"vmtc_keep_ratio": 1.5}, "vmtc_keep_ratio.*must be above 0 and at most 1, got 1.5"),
        ({"vmtc_cluster_ratio": -0.1}, "vmtc_cluster_ratio.*must be above 0 and at most 1, got -0.1"),
        ({"vmtc_num_visual_tokens": 0}, "vmtc_num_visual_tokens.*must be at least 1, got 0"),
        ({"vmtc_num_stages": 0}, "vmtc_num_stages.*must be at least 1, got 0"),
        ({"vmtc_layers": [3, 1]}, r"vmtc_layers.*must be indices of blocks from 0, in rising order, got \[3, 1\]"),
        ({"vmtc_layers": [-2]}, "vmtc_layers.*must be indices"),
        ({"vmtc_method": "prune"}, "vmtc_method"),
        ({"vmtc_merge_weights": "mean"}, "vmtc_merge_weights"),
        ({"vmtc_kept_tokens": "novelty"}, "vmtc_kept_tokens"),
        ({"vmtc_stage_placement": "first"}, "vmtc_stage_placement"),
        ({"use_vmtc": "yes"}, "use_vmtc"),
    ],
)
def test_wrong_fields_are_named(kwargs, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        settings(**kwargs)
    config = settings()
    for name, value in kwargs.items():
        with pytest.raises(Exception, match=f"(?s){message}"):
            setattr(config, name, value)


@pytest.mark.parametrize(
    "kwargs, budget, message",
    [
        ({}, 37, "The budget is 37 visual tokens, but an image has 36 patches"),
        ({}, 0, "The budget is 0 visual tokens, but an image has 36 patches"),
        ({"vmtc_layers": [4]}, 5, "`vmtc_layers` names block 4, .* blocks 0 to 3"),
        ({"vmtc_layers": []}, 5, "no block can compress"),
        ({"vmtc_num_stages": 5}, 5, "`vmtc_num_stages` is 5, .* only 4 blocks.* fewer stages"),
        ({"vmtc_num_stages": 5, "vmtc_stage_placement": "last"}, 5, "`vmtc_num_stages` is 5, .* only 4 blocks"),
        ({"use_vmtc": False}, 5, "`num_visual_tokens` is 5, but `use_vmtc` is off"),
    ],
)
def test_plans_that_are_not_possible_are_refused(kwargs, budget, message):
    with pytest.raises(ValueError, match=message):
        plan_stages(settings(**kwargs), 36, 4, budget)
