"""
Other ways to give a language model fewer visual tokens, written from their papers, to compare VMTC with at equal tokens.

Each is a function of what a vision tower gives (`TowerOutput`) and a budget, and returns that many tokens per image. They
need no training. `RIVALS` has them by name. ToMe works inside the tower instead: `merge_most_similar` is one of its steps,
and `rival_towers.py` runs it. That file also makes the `vision_features` of a LLaVA with any of them.

Conventions of this file. B: images, n: patch tokens, k: budget, d: width of the tower. Ties are broken by index, and nothing
is shared between images. Tokens that are kept stay in their original order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize


@dataclass
class TowerOutput:
    """
    What a vision tower gives for images. Attention and keys are those of the block that made the tokens.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`): Patch tokens that the projector would get.
        attention (`torch.FloatTensor` of shape `(B, n)`): Attention weights of the class token to them, averaged over heads.
        keys (`torch.FloatTensor` of shape `(B, heads, n, head_dim)`): Their keys.
        grid (`tuple[int, int]`): Rows and columns of patches, with n = rows * columns.
        projected (`torch.FloatTensor` of shape `(B, n, D)`, *optional*): The tokens after the projector, for DivPrune.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    keys: torch.Tensor
    grid: tuple[int, int]
    projected: torch.Tensor | None = None


def check_budget(budget: int, num_tokens: int) -> None:
    if not 1 <= budget <= num_tokens:
        raise ValueError(
            f"The budget is {budget} tokens, but an image has {num_tokens}. Choose a number from 1 to {num_tokens}."
        )


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows at `index` `(B, m)` of `values` `(B, n, d)`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def most_important(attention: torch.Tensor, number: int) -> torch.Tensor:
    """Indices `(B, number)` of the highest values of `attention` `(B, n)`, the highest first."""
    return attention.sort(dim=-1, descending=True, stable=True).indices[:, :number]


def others(index: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Indices `(B, n - m)`, rising, of all tokens that are not in `index` `(B, m)`."""
    is_other = torch.ones(len(index), num_tokens, dtype=torch.bool, device=index.device).scatter(1, index, False)
    return is_other.nonzero()[:, 1].view(len(index), -1)


def evenly_spaced(number: int, length: int) -> torch.Tensor:
    """`number` indices from 0 to `length` - 1, each in the middle of one of as many equal parts."""
    return ((torch.arange(number) + 0.5) * length / number).long()


# --- baselines -----------------------------------------------------------------------------------------------------


def random_tokens(output: TowerOutput, budget: int, seed: int = 0) -> torch.Tensor:
    """Keeps tokens that are drawn for each image."""
    check_budget(budget, output.tokens.shape[1])
    draws = torch.rand(output.attention.shape, generator=torch.Generator().manual_seed(seed))
    index = most_important(draws.to(output.tokens.device), budget)
    return take(output.tokens, index.sort().values)


def uniform_tokens(output: TowerOutput, budget: int) -> torch.Tensor:
    """Keeps tokens that are evenly spaced in the grid: in evenly spaced rows, as evenly as possible in each row."""
    check_budget(budget, output.tokens.shape[1])
    height, width = output.grid
    num_rows = min(max(round((budget * height / width) ** 0.5), math.ceil(budget / width)), height, budget)
    index = []
    for number, row in enumerate(evenly_spaced(num_rows, height).tolist()):
        in_row = budget * (number + 1) // num_rows - budget * number // num_rows
        index += [row * width + column for column in evenly_spaced(in_row, width).tolist()]
    return output.tokens[:, index]


def downsampled_tokens(output: TowerOutput, budget: int) -> torch.Tensor:
    """
    SPD, the baseline of the VMTC paper: averages the grid over rectangles. The smaller grid has at most `budget` tokens: of
    the grids whose sides differ by a factor of at most 2, the largest, and of equally large ones the one with the squarest
    rectangles.
    """
    check_budget(budget, output.tokens.shape[1])
    height, width = output.grid
    shapes = [(rows, columns) for rows in range(1, height + 1) for columns in range(1, width + 1)]
    fitting = [(r, c) for r, c in shapes if r * c <= budget and max(r, c) <= 2 * min(r, c)]
    shape = max(fitting, key=lambda shape: (shape[0] * shape[1], -abs(math.log(height / shape[0] * shape[1] / width))))
    grid = output.tokens.mT.unflatten(2, output.grid)
    return torch.nn.functional.adaptive_avg_pool2d(grid, shape).flatten(2).mT


# --- methods -------------------------------------------------------------------------------------------------------


def visionzip(output: TowerOutput, budget: int) -> torch.Tensor:
    """
    VisionZip (Yang et al. 2024). Dominant tokens are those that the class token attends to most. Of the others, evenly
    spaced ones become contextual tokens: each other token joins the one with the most similar key, and is averaged with it.
    10 of 64 tokens are contextual, as in the paper. They come last.
    """
    num_tokens = output.tokens.shape[1]
    check_budget(budget, num_tokens)
    num_contextual = min(max(1, round(budget * 10 / 64)), budget - 1)
    dominant = most_important(output.attention, budget - num_contextual).sort().values
    kept = take(output.tokens, dominant)
    if num_contextual == 0:
        return kept
    rest = others(dominant, num_tokens)
    keys = normalize(take(output.keys.mean(dim=1), rest), dim=-1)
    targets = evenly_spaced(num_contextual, rest.shape[1]).to(rest.device)
    joins = (keys @ keys[:, targets].mT).argmax(dim=-1)
    joins[:, targets] = torch.arange(num_contextual, device=rest.device)
    membership = torch.nn.functional.one_hot(joins, num_contextual).to(output.tokens.dtype)
    sums = membership.mT @ take(output.tokens, rest)
    return torch.cat([kept, sums / membership.sum(dim=1)[..., None]], dim=1)


NUM_NEIGHBOURS = 32  # of a token in PruMerge


def prumerge_plus(output: TowerOutput, budget: int) -> torch.Tensor:
    """
    PruMerge+ (Shang et al. 2024). The tokens stay whose class attention is an outlier: above the third quartile by 1.5 times
    the interquartile range. Tokens that are evenly spaced among the others fill the budget. Each kept token becomes the
    average of itself and of the pruned tokens with the most similar keys, weighted by class attention.
    """
    num_tokens = output.tokens.shape[1]
    check_budget(budget, num_tokens)
    quartiles = output.attention.quantile(torch.tensor([0.25, 0.75]).to(output.attention), dim=1)
    limits = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
    num_outliers = (output.attention > limits[:, None]).sum(dim=1).clamp_max(budget)
    rows = []
    for order, number in zip(most_important(output.attention, budget), num_outliers.tolist()):
        outliers = order[None, :number]
        rest = others(outliers, num_tokens)
        spaced = rest[:, evenly_spaced(budget - number, rest.shape[1]).to(rest.device)]
        rows.append(torch.cat([outliers, spaced], dim=1))
    kept = torch.cat(rows).sort().values
    pruned = others(kept, num_tokens)
    if pruned.shape[1] == 0:
        return output.tokens
    keys = normalize(output.keys.transpose(1, 2).flatten(2), dim=-1)
    similarity = take(keys, kept) @ take(keys, pruned).mT
    nearest = similarity.topk(min(NUM_NEIGHBOURS, pruned.shape[1]), dim=-1).indices
    weights = torch.zeros_like(similarity).scatter(2, nearest, 1) * output.attention.gather(1, pruned)[:, None]
    own_weights = output.attention.gather(1, kept)[..., None]
    merged = own_weights * take(output.tokens, kept) + weights @ take(output.tokens, pruned)
    return merged / (own_weights + weights.sum(dim=-1, keepdim=True))


def divprune(output: TowerOutput, budget: int) -> torch.Tensor:
    """
    DivPrune (Alvar et al. 2025). Keeps the tokens whose smallest distance to each other is largest, by the greedy algorithm:
    each next token is the one farthest from the tokens kept so far. The first is farthest from its nearest neighbour. The
    distance is one minus the cosine of the tokens after the projector.
    """
    num_tokens = output.tokens.shape[1]
    check_budget(budget, num_tokens)
    compared = normalize((output.tokens if output.projected is None else output.projected).float(), dim=-1)
    distance = 1 - compared @ compared.mT
    to_itself = torch.eye(num_tokens, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(to_itself, torch.inf).amin(dim=-1)  # to any other token, for the first one
    kept = [nearest.argmax(dim=-1, keepdim=True)]
    nearest = torch.full_like(nearest, torch.inf)
    for _ in range(budget - 1):
        nearest = torch.minimum(nearest, take(distance, kept[-1])[:, 0])
        nearest = nearest.scatter(1, kept[-1], -torch.inf)
        kept.append(nearest.argmax(dim=-1, keepdim=True))
    return take(output.tokens, torch.cat(kept, dim=1).sort().values)


REMOVED_AT_ONCE = 8  # duplicates, in VisPruner


def vispruner(output: TowerOutput, budget: int) -> torch.Tensor:
    """
    VisPruner (Zhang et al. 2024). Half of the budget are the tokens that the class token attends to most. The others, from
    the most to the least attended, lose duplicates in rounds until the rest of the budget is left: they are dealt to two
    sets in turn, and those of the first that are most similar to one of the second are removed.
    """
    num_tokens = output.tokens.shape[1]
    check_budget(budget, num_tokens)
    num_important = math.ceil(budget / 2)
    order = most_important(output.attention, num_tokens)
    important, remaining = order[:, :num_important], order[:, num_important:]
    directions = normalize(output.tokens.float(), dim=-1)
    while (excess := remaining.shape[1] - (budget - num_important)) > 0:
        first, second = take(directions, remaining[:, ::2]), take(directions, remaining[:, 1::2])
        if second.shape[1] == 0:  # one token is left, and is one too many
            remaining = remaining[:, :0]
            break
        most_similar = (first @ second.mT).amax(dim=-1)
        removed = 2 * most_important(most_similar, min(REMOVED_AT_ONCE, excess, first.shape[1]))
        remaining = remaining.gather(1, others(removed, remaining.shape[1]))
    return take(output.tokens, torch.cat([important, remaining], dim=1).sort().values)


def merge_most_similar(
    tokens: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor, num_merged: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A step of ToMe (Bolya et al. 2022), bipartite soft matching. Tokens at even places look for the token at an odd place
    with the most similar key; the `num_merged` most similar pairs are averaged, weighted by the patches in each.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`): The tokens, without a class token.
        keys (`torch.FloatTensor` of shape `(B, n, head_dim)`): Their keys, averaged over heads.
        sizes (`torch.FloatTensor` of shape `(B, n)`): Patches that each token is made of.
        num_merged (`int`): At most half of n, rounded down.

    Returns:
        The tokens `(B, n - num_merged, d)`, in the order of the tokens that others were merged into, and their sizes.
    """
    num_tokens = tokens.shape[1]
    if not 0 <= num_merged <= num_tokens // 2:
        raise ValueError(f"A step merges at most {num_tokens // 2} of {num_tokens} tokens, not {num_merged}.")
    directions = normalize(keys.float(), dim=-1)
    similarity, partner = (directions[:, ::2] @ directions[:, 1::2].mT).max(dim=-1)
    merged = most_important(similarity, num_merged)
    index = torch.arange(num_tokens, device=tokens.device).expand(len(tokens), -1)
    becomes = index.scatter(1, 2 * merged, 2 * partner.gather(1, merged) + 1)
    sums = torch.zeros_like(tokens).scatter_add(
        1, becomes[..., None].expand_as(tokens), tokens * sizes[..., None].to(tokens.dtype)
    )
    new_sizes = torch.zeros_like(sizes).scatter_add(1, becomes, sizes)
    stays = others(2 * merged, num_tokens)
    new_sizes = new_sizes.gather(1, stays)
    return take(sums, stays) / new_sizes[..., None].to(tokens.dtype), new_sizes


def plan_merging(num_tokens: int, budget: int, num_blocks: int) -> list[int]:
    """
    How many tokens ToMe merges in each block: equally many, as in its paper. A block can merge half of its tokens at most,
    so that for small budgets earlier blocks merge more.

    Raises:
        `ValueError`: The blocks cannot reach the budget.
    """
    check_budget(budget, num_tokens)
    lengths = [round(num_tokens - (num_tokens - budget) * (i + 1) / num_blocks) for i in range(num_blocks)]
    for i in reversed(range(num_blocks - 1)):
        lengths[i] = min(lengths[i], 2 * lengths[i + 1])
    if num_tokens > 2 * lengths[0]:
        raise ValueError(f"{num_blocks} blocks cannot merge {num_tokens} tokens into {budget}.")
    return [before - after for before, after in zip([num_tokens, *lengths], lengths)]


RIVALS: dict[str, Callable[[TowerOutput, int], torch.Tensor]] = {
    "random": random_tokens,
    "uniform": uniform_tokens,
    "SPD": downsampled_tokens,
    "VisionZip": visionzip,
    "PruMerge+": prumerge_plus,
    "DivPrune": divprune,
    "VisPruner": vispruner,
}
