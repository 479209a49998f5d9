"""The rivals of VMTC, each against a slow reading of its paper with loops or its defining property."""

from itertools import combinations

import pytest
import torch
from conftest import make_lively, text_config
from rival_towers import read_tower, run_tome
from rivals import (
    NUM_NEIGHBOURS,
    RIVALS,
    TowerOutput,
    divprune,
    downsampled_tokens,
    evenly_spaced,
    merge_most_similar,
    plan_merging,
    prumerge_plus,
    random_tokens,
    uniform_tokens,
    visionzip,
    vispruner,
)
from transformers import Dinov2Config

from ta_llava import VmtcCmaiLlavaConfig, VmtcCmaiLlavaForConditionalGeneration


GRID = (6, 8)
NUM_TOKENS = 48


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


@pytest.fixture(scope="module")
def output():
    """Three images; the attention has a few outliers, as in a real tower, and differs between images."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, NUM_TOKENS, 12, generator=generator)
    attention = torch.rand(3, NUM_TOKENS, generator=generator) * torch.tensor([0.01, 0.02, 0.01])[:, None]
    for image, number in enumerate((2, 5, 9)):
        attention[image, torch.randperm(NUM_TOKENS, generator=generator)[:number]] += 0.1
    keys = torch.randn(3, 2, NUM_TOKENS, 4, generator=generator)
    return TowerOutput(tokens, attention, keys, GRID, torch.randn(3, NUM_TOKENS, 5, generator=generator))


def kept_by(function, output, budget):
    """Indices of the kept tokens, found by the tokens themselves."""
    kept = function(output, budget)
    return [[int((output.tokens[b] == token).all(-1).nonzero()) for token in kept[b]] for b in range(len(kept))]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("budget", [1, 2, 3, 12, 24, NUM_TOKENS])
def test_as_many_tokens_as_the_budget(output, name, budget):
    tokens = RIVALS[name](output, budget)
    assert tokens.isfinite().all() and tokens.dtype == output.tokens.dtype
    if name == "SPD":
        assert tokens.shape[1] <= budget
    else:
        assert tokens.shape == (3, budget, 12)


@pytest.mark.parametrize("name", RIVALS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(output, name):
    alone = TowerOutput(output.tokens[:1], output.attention[:1], output.keys[:1], GRID, output.projected[:1])
    torch.testing.assert_close(RIVALS[name](alone, 12), RIVALS[name](output, 12)[:1])


@pytest.mark.parametrize("name", RIVALS)
def test_budgets_that_are_not_possible(output, name):
    for budget in (0, NUM_TOKENS + 1):
        with pytest.raises(ValueError, match=f"{budget} tokens.* {NUM_TOKENS}"):
            RIVALS[name](output, budget)


@pytest.mark.parametrize("name", ["random", "uniform", "DivPrune", "VisPruner", "PruMerge+"])
def test_with_the_full_budget_nothing_changes(output, name):
    torch.testing.assert_close(RIVALS[name](output, NUM_TOKENS), output.tokens)


def test_random_tokens_differ_between_images_and_seeds(output):
    first, again = kept_by(random_tokens, output, 12), kept_by(random_tokens, output, 12)
    assert first == again and first[0] != first[1]
    assert all(index == sorted(set(index)) for index in first)
    assert kept_by(lambda o, k: random_tokens(o, k, seed=1), output, 12) != first


def test_uniform_tokens_cover_the_grid(output):
    for budget in (3, 6, 12, 20):
        (index, *_) = kept_by(uniform_tokens, output, budget)
        assert len(set(index)) == budget
        per_row = [sum(i // GRID[1] == row for i in index) for row in range(GRID[0])]
        in_use = [number for number in per_row if number]
        assert max(in_use) - min(in_use) <= 1
    assert kept_by(uniform_tokens, output, 12)[0] == [row * 8 + column for row in (1, 3, 5) for column in (1, 3, 5, 7)]


def test_evenly_spaced_are_the_middles_of_equal_parts():
    assert evenly_spaced(3, 12).tolist() == [2, 6, 10]
    assert evenly_spaced(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_down_sampling_is_the_mean_of_rectangles(output):
    tokens = downsampled_tokens(output, 12)  # 3 x 4
    grid = output.tokens.view(3, 6, 8, 12)
    for row in range(3):
        for column in range(4):
            square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1, 2)
            torch.testing.assert_close(tokens[:, row * 4 + column], square.mean(dim=1))
    square_grid = TowerOutput(torch.rand(1, 256, 3), torch.rand(1, 256), torch.rand(1, 1, 256, 2), (16, 16))
    assert [downsampled_tokens(square_grid, k).shape[1] for k in (128, 64, 28, 16)] == [128, 64, 28, 16]


def slow_visionzip(output, image, budget):
    importance = output.attention[image].tolist()
    num_contextual = round(budget * 10 / 64)
    order = sorted(range(NUM_TOKENS), key=lambda i: -importance[i])
    dominant = sorted(order[: budget - num_contextual])
    rest = [i for i in range(NUM_TOKENS) if i not in dominant]
    targets = [rest[int((j + 0.5) * len(rest) / num_contextual)] for j in range(num_contextual)]
    keys = output.keys[image].mean(dim=0)
    groups = {target: [target] for target in targets}
    for i in rest:
        if i not in targets:
            groups[max(targets, key=lambda target: cosine(keys[i], keys[target]))].append(i)
    tokens = output.tokens[image]
    return torch.stack([tokens[i] for i in dominant] + [tokens[group].mean(dim=0) for group in groups.values()])


def slow_prumerge_plus(output, image, budget):
    importance = output.attention[image].double()
    low, high = importance.quantile(0.25), importance.quantile(0.75)
    order = sorted(range(NUM_TOKENS), key=lambda i: -float(importance[i]))
    outliers = [i for i in order if importance[i] > high + 1.5 * (high - low)][:budget]
    rest = [i for i in range(NUM_TOKENS) if i not in outliers]
    more = budget - len(outliers)
    kept = sorted(outliers + [rest[int((j + 0.5) * len(rest) / more)] for j in range(more)])
    pruned = [i for i in range(NUM_TOKENS) if i not in kept]
    keys = output.keys[image].transpose(0, 1).flatten(1)
    merged = []
    for i in kept:
        cluster = [i, *sorted(pruned, key=lambda j: -cosine(keys[i], keys[j]))[:NUM_NEIGHBOURS]]
        weights = importance[cluster] / importance[cluster].sum()
        merged.append((weights[:, None] * output.tokens[image][cluster]).sum(dim=0))
    return torch.stack(merged).float()


def slow_vispruner(output, image, budget):
    importance = output.attention[image].tolist()
    order = sorted(range(NUM_TOKENS), key=lambda i: -importance[i])
    important, remaining = order[: (budget + 1) // 2], order[(budget + 1) // 2 :]
    tokens = output.tokens[image]
    while len(remaining) > budget // 2:
        first, second = remaining[::2], remaining[1::2]
        by_similarity = sorted(first, key=lambda i: -max(cosine(tokens[i], tokens[j]) for j in second))
        removed = by_similarity[: min(8, len(remaining) - budget // 2)]
        remaining = [i for i in remaining if i not in removed]
    return tokens[sorted(important + remaining)]


def slow_divprune(output, image, budget):
    vectors = output.projected[image]
    distance = [[1 - cosine(a, b) for b in vectors] for a in vectors]
    everyone = range(NUM_TOKENS)
    kept = [max(everyone, key=lambda i: min(distance[i][j] for j in everyone if j != i))]
    while len(kept) < budget:
        left = [i for i in everyone if i not in kept]
        kept.append(max(left, key=lambda i: min(distance[i][j] for j in kept)))
    return output.tokens[image][sorted(kept)]


@pytest.mark.parametrize("budget", [7, 12, 24])
@pytest.mark.parametrize(
    "fast, slow",
    [
        (visionzip, slow_visionzip),
        (prumerge_plus, slow_prumerge_plus),
        (vispruner, slow_vispruner),
        (divprune, slow_divprune),
    ],
    ids=["VisionZip", "PruMerge+", "VisPruner", "DivPrune"],
)
def test_against_a_slow_reading_of_the_paper(output, fast, slow, budget):
    expected = torch.stack([slow(output, image, budget) for image in range(3)])
    torch.testing.assert_close(fast(output, budget), expected)


def test_outliers_differ_between_images(output):
    """Otherwise the slow reading of PruMerge+ would not see how outliers and evenly spaced tokens share a budget."""
    numbers = []
    for attention in output.attention:
        low, high = attention.quantile(0.25), attention.quantile(0.75)
        numbers.append(int((attention > high + 1.5 * (high - low)).sum()))
    assert numbers == [2, 5, 9]


def test_divprune_keeps_distant_tokens(output):
    """Greedy is at least half as good as the best choice (Gonzalez 1985) where distances obey the triangle inequality."""
    few = TowerOutput(
        output.tokens[:, :9], output.attention[:, :9], output.keys[:, :, :9], (3, 3), output.projected[:, :9]
    )
    angles = torch.arccos(
        torch.nn.functional.cosine_similarity(
            few.projected[:, :, None].double(), few.projected[:, None].double(), dim=-1
        ).clamp(-1, 1)
    )
    for image, index in enumerate(kept_by(divprune, few, 4)):

        def spread(chosen, image=image):
            return min(float(angles[image, i, j]) for i, j in combinations(chosen, 2))

        assert spread(index) >= max(spread(chosen) for chosen in combinations(range(9), 4)) / 2


# --- ToMe ----------------------------------------------------------------------------------------------------------


def slow_merge(tokens, keys, sizes, num_merged):
    """One image, with lists."""
    number = len(tokens)
    pairs = [(max(range(1, number, 2), key=lambda j: cosine(keys[i], keys[j])), i) for i in range(0, number, 2)]
    pairs.sort(key=lambda pair: -cosine(keys[pair[0]], keys[pair[1]]))
    groups = {i: [i] for i in range(number)}
    for j, i in pairs[:num_merged]:
        groups[j] += groups.pop(i)
    rows = [groups[i] for i in sorted(groups)]
    merged = [(sizes[row, None] * tokens[row]).sum(dim=0) / sizes[row].sum() for row in rows]
    return torch.stack(merged), torch.stack([sizes[row].sum() for row in rows])


@pytest.mark.parametrize("number, num_merged", [(48, 0), (48, 10), (48, 24), (7, 3)])
def test_a_step_of_tome(output, number, num_merged):
    tokens, keys = output.tokens[:, :number], output.keys.mean(dim=1)[:, :number]
    sizes = torch.randint(1, 5, (3, number), generator=torch.Generator().manual_seed(1)).float()
    merged, new_sizes = merge_most_similar(tokens, keys, sizes, num_merged)
    for image in range(3):
        expected, expected_sizes = slow_merge(tokens[image], keys[image], sizes[image], num_merged)
        torch.testing.assert_close(merged[image], expected)
        torch.testing.assert_close(new_sizes[image], expected_sizes)


def test_tome_merges_equally_many_in_each_block_as_far_as_it_can():
    assert plan_merging(256, 146, 11) == [10] * 11
    plan = plan_merging(256, 16, 11)
    lengths = [256 - sum(plan[: i + 1]) for i in range(11)]
    assert lengths[-1] == 16 and lengths[-2] == 32
    assert all(2 * after >= before for before, after in zip([256, *lengths], lengths))
    assert lengths[3] == round(256 - 240 * 4 / 11)
    with pytest.raises(ValueError, match="2 blocks cannot merge 64 tokens into 8"):
        plan_merging(64, 8, 2)
    with pytest.raises(ValueError, match="at most 3 of 7 tokens, not 4"):
        merge_most_similar(torch.rand(1, 7, 2), torch.rand(1, 7, 2), torch.ones(1, 7), 4)


# --- the tower -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    vision = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=24, patch_size=4
    )
    config = VmtcCmaiLlavaConfig(
        vision_config=vision, text_config=text_config("llama", num_hidden_layers=1), image_token_index=7
    )
    return make_lively(VmtcCmaiLlavaForConditionalGeneration(config)).eval()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_is_read_from_the_tower(llava, pixel_values):
    output = read_tower(llava, pixel_values)
    torch.testing.assert_close(output.tokens, llava.get_vision_features(pixel_values))
    tower = llava.model.vision_tower
    tower.set_attn_implementation("eager")
    outputs = tower(pixel_values, output_attentions=True)
    tower.set_attn_implementation("sdpa")
    assert len(outputs.attentions) == 4
    expected = outputs.attentions[2]  # of the third of four blocks, whose output the projector gets
    torch.testing.assert_close(output.attention, expected[:, :, 0, 1:].mean(dim=1), rtol=1e-4, atol=1e-6)
    assert output.grid == (6, 6) and output.keys.shape == (2, 2, 36, 12)


@torch.no_grad()
def test_tome_that_merges_nothing_is_the_tower(llava, pixel_values):
    features = run_tome(llava, pixel_values, 36)
    torch.testing.assert_close(features, llava.get_vision_features(pixel_values), rtol=1e-4, atol=1e-5)
    assert run_tome(llava, pixel_values, 9).shape == (2, 9, 24)


@torch.no_grad()
def test_a_merged_token_counts_as_often_as_it_has_patches(llava, pixel_values):
    """An image of equal patches without places: their tokens are equal, so merging them must not change the others."""
    tower = llava.model.vision_tower
    places = tower.embeddings.position_embeddings.clone()
    tower.embeddings.position_embeddings.zero_()
    equal = pixel_values[:1, :, :4, :4].repeat(1, 1, 6, 6)
    all_tokens, merged = read_tower(llava, equal).tokens, run_tome(llava, equal, 9)
    tower.embeddings.position_embeddings.copy_(places)
    torch.testing.assert_close(merged, all_tokens[:, :9], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_features_go_into_the_llava(llava, pixel_values):
    features = RIVALS["VisionZip"](read_tower(llava, pixel_values), 6)
    ids = torch.tensor([[1] + [7] * 6 + [9, 10]] * 2)
    logits = llava(input_ids=ids, vision_features=features).logits
    assert logits.isfinite().all() and logits.shape[:2] == ids.shape
