# Copyright 2026 The TA-LLaVA Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Visual-Modality Token Compression (VMTC), of "Enhancing Instruction-Following Capability of Visual-Language Models by
Reducing Image Redundancy": inside some blocks of a vision tower, between attention and MLP, the patches that matter
most are kept and the others clustered and merged. Later blocks work on the short sequence.

Conventions of this file. B: images, n: patch tokens before a stage, k: kept, c: clusters, d: width of the tower. What
decides (importance, similarity) is computed in float32, ties are broken by index, and nothing is shared between images.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict, validated_field
from torch import nn
from transformers import PreTrainedConfig

from .library_versions import OUTPUTS_TO_IGNORE


# --- configuration -------------------------------------------------------------------------------------------------


def at_least_1(value: int | None) -> None:
    """Checks a field, as the two functions below; also when it is set later."""
    if value is not None and value < 1:
        raise ValueError(f"must be at least 1, got {value}.")


def share_above_0(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, got {value}.")


def rising_indices(value: list[int] | tuple[int, ...] | None) -> None:
    layers = list(value or ())
    if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
        raise ValueError(f"must be indices of blocks from 0, in rising order, got {value}.")


def one_layer(layers: Any) -> int | None:
    """The index that `vision_feature_layer` is, or that is all of its list; `None` if there are several."""
    if isinstance(layers, (list, tuple)) and len(layers) == 1:
        return layers[0]
    return layers if isinstance(layers, int) else None


@strict
class VmtcConfig(PreTrainedConfig):
    r"""
    The fields of a model whose vision tower may be compressed; [`VmtcCmaiLlavaConfig`] and [`TaLlavaConfig`] have them.

    Args:
        use_vmtc (`bool`, *optional*, defaults to `False`):
            Compress the visual tokens inside the vision tower.
        vmtc_num_visual_tokens (`int`, *optional*):
            Visual tokens that an image has in the end, class token not counted. The paper's: 288 (of 576), 64 and 36.
        vmtc_keep_ratio (`float`, *optional*, defaults to 0.5):
            The same as a share of the patches, in (0, 1]; used when `vmtc_num_visual_tokens` is `None`.
        vmtc_num_stages (`int`, *optional*, defaults to 3):
            Number of blocks that compress, equally spaced among those up to `vision_feature_layer`. Each removes the
            same number of tokens.
        vmtc_layers (`list[int]`, *optional*):
            Indices, from 0, of the blocks that compress, instead of equally spaced ones.
        vmtc_cluster_ratio (`float`, *optional*, defaults to 10/64):
            Share of a stage's output tokens that are merged clusters, in (0, 1]; there is at least one.
        vmtc_method (`str`, *optional*, defaults to `"cluster"`):
            What becomes of the redundant tokens (Table 4 of the paper): `"cluster"` merges each cluster into one token
            (the method), `"merge"` merges all of them into one (MG), `"layerwise_prune"` drops them (LWP),
            `"last_layer_prune"` drops them too, but in the last block only (LLP).
        vmtc_merge_weights (`str`, *optional*, defaults to `"raw"`):
            `"raw"`: a merged token is the sum of its members, weighted by importance (equation 7). `"normalized"`: the
            weights sum to 1 in a cluster, which a model needs that was not trained with VMTC.
    """

    keys_to_ignore_at_inference = OUTPUTS_TO_IGNORE

    use_vmtc: bool = False
    vmtc_num_visual_tokens: int | None = validated_field(at_least_1, default=None)
    vmtc_keep_ratio: float | int = validated_field(share_above_0, default=0.5)
    vmtc_num_stages: int = validated_field(at_least_1, default=3)
    vmtc_layers: list[int] | tuple[int, ...] | None = validated_field(rising_indices, default=None)
    vmtc_cluster_ratio: float | int = validated_field(share_above_0, default=10 / 64)
    vmtc_method: Literal["last_layer_prune", "layerwise_prune", "merge", "cluster"] = "cluster"
    vmtc_merge_weights: Literal["raw", "normalized"] = "raw"

    def validate_vmtc(self):
        """Part of `@strict` validation."""
        if self.use_vmtc and one_layer(getattr(self, "vision_feature_layer", -1)) is None:
            raise ValueError(
                f"VMTC works with one `vision_feature_layer`, but the config has {self.vision_feature_layer}: the hidden "
                "states of several layers have different lengths then. Set one layer, or `use_vmtc=False`."
            )


def count_visual_tokens(settings: Any, num_patches: int, num_visual_tokens: int | None = None) -> int:
    """
    Visual tokens that an image of `num_patches` patches has in the end, class token not counted. The model and the
    processor both ask here, each with its own `settings` (fields of [`VmtcConfig`], optionally `spd_factor`).

    Args:
        num_visual_tokens (`int`, *optional*): A budget for this call, instead of that of the settings.

    Raises:
        `ValueError`: A budget that is not in 1..`num_patches`, or one for a call without VMTC.
    """
    if not settings.use_vmtc:
        if num_visual_tokens is not None:
            raise ValueError(f"`num_visual_tokens` is {num_visual_tokens}, but `use_vmtc` is off. Turn it on first.")
        return num_patches // getattr(settings, "spd_factor", 1) ** 2
    if num_visual_tokens is None:
        num_visual_tokens = settings.vmtc_num_visual_tokens
    if num_visual_tokens is None:
        if not 0 < settings.vmtc_keep_ratio <= 1:  # of a processor; a config has found it before
            raise ValueError(f"`vmtc_keep_ratio` must be above 0 and at most 1, got {settings.vmtc_keep_ratio}.")
        return max(1, round(settings.vmtc_keep_ratio * num_patches))
    if not 1 <= num_visual_tokens <= num_patches:
        raise ValueError(
            f"The budget is {num_visual_tokens} visual tokens, but an image has {num_patches} patches here and at least "
            f"one token must be left. Choose a number from 1 to {num_patches}."
        )
    return num_visual_tokens


@dataclass(frozen=True)
class VmtcStage:
    """What one block does: of its patch tokens `num_kept` (k) stay, the others become `num_clusters` (c) tokens."""

    num_kept: int
    num_clusters: int


def plan_stages(
    config: Any, num_patches: int, num_blocks: int, num_visual_tokens: int | None = None
) -> dict[int, VmtcStage]:
    """
    Which blocks compress, and how far: 36 -> 24 -> 12, the same number of tokens is removed at each.

    Args:
        config ([`VmtcConfig`]): The fields that start with `vmtc_`.
        num_patches (`int`): Patch tokens of an image.
        num_blocks (`int`): Blocks up to the one whose output is used.
        num_visual_tokens (`int`, *optional*): A budget for this call, instead of that of the config.

    Returns:
        `dict[int, VmtcStage]`: By index of the block; empty if nothing is to be removed.
    """
    budget = count_visual_tokens(config, num_patches, num_visual_tokens)
    if config.vmtc_method == "last_layer_prune":
        layers = [num_blocks - 1]
    elif config.vmtc_layers is not None:
        layers = list(config.vmtc_layers)
        if layers and layers[-1] >= num_blocks:
            raise ValueError(
                f"`vmtc_layers` names block {layers[-1]}, but only blocks 0 to {num_blocks - 1} come before the output of "
                "the vision tower that is used (`vision_feature_layer`)."
            )
    else:
        if config.vmtc_num_stages > num_blocks:
            raise ValueError(
                f"`vmtc_num_stages` is {config.vmtc_num_stages}, but only {num_blocks} blocks come before the output of the "
                "vision tower that is used (`vision_feature_layer`). Ask for fewer stages."
            )
        layers = [num_blocks * (s + 1) // (config.vmtc_num_stages + 1) for s in range(config.vmtc_num_stages)]
    stages, num_tokens = {}, num_patches
    for s, layer in enumerate(layers):
        output = num_patches - round((num_patches - budget) * (s + 1) / len(layers))
        if output == num_tokens:
            continue
        num_clusters = {
            "cluster": min(output, max(1, round(output * config.vmtc_cluster_ratio))),
            "merge": 1,
        }.get(config.vmtc_method, 0)
        stages[layer] = VmtcStage(output - num_clusters, num_clusters)
        num_tokens = output
    if num_tokens != budget:
        raise ValueError("`vmtc_layers` is empty: no block may compress. Name at least one, or set it to None.")
    return stages


# --- the maths -----------------------------------------------------------------------------------------------------


def class_token_attention(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    The row of the class token, which is the first, of the attention weights: the only row that VMTC needs.

    Args:
        query, key (`torch.FloatTensor` of shape `(B, heads, 1 + n, head_dim)`): As in the attention.

    Returns:
        `torch.FloatTensor` of shape `(B, heads, 1, 1 + n)`, float32.
    """
    scores = query[:, :, :1].float() @ key.float().mT * scaling
    return scores.softmax(dim=-1)


def mean_received_attention(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    For towers without a class token: the attention that each patch receives, averaged over the patches that pay it.
    Shapes as in `class_token_attention`, with n for 1 + n; one head at a time, to keep the memory at B * n * n.
    """
    rows = [
        (query[:, head].float() @ key[:, head].float().mT * scaling).softmax(dim=-1).mean(dim=-2, keepdim=True)
        for head in range(query.shape[1])
    ]
    return torch.stack(rows, dim=1)


def importance_scores(attention_row: torch.Tensor, num_patches: int) -> torch.Tensor:
    """IPS `(B, n)` of the patches, which stand last: the mean over heads of an attention row `(B, heads, 1, 1 + n)`."""
    return attention_row[:, :, 0, -num_patches:].float().mean(dim=1)


def split_by_importance(importance: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Equations 5 and 6: indices of the k most important tokens `(B, k)` and of the redundant ones `(B, n - k)`, each in
    their original order. Of equally important tokens the first is kept.
    """
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :num_kept].sort(dim=-1).values, order[:, num_kept:].sort(dim=-1).values


@torch.no_grad()
def cosine_kmeans(tokens: torch.Tensor, num_clusters: int, max_iterations: int = 10) -> torch.Tensor:
    """
    K-means by cosine similarity: Lloyd's algorithm on tokens of length 1, whose squared distance is twice one minus
    their cosine. Deterministic: it starts from the tokens that, chosen one by one, reduce the inertia most. Every
    cluster has a member: an empty one is given the token that is farthest from its centre.

    All distances come from the Gram matrix of the tokens, since there are far fewer tokens than dimensions.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`).
        num_clusters (`int`): Number of clusters c, at most n.
        max_iterations (`int`): Lloyd steps. A few are enough from that start; where the host can see that nothing
            changes any more without waiting for a device, it stops before.

    Returns:
        `torch.LongTensor` of shape `(B, n)`: cluster of each token, from 0 to c - 1.

    Raises:
        `ValueError`: More clusters than tokens.
    """
    num_tokens = tokens.shape[1]
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"{num_tokens} tokens cannot make {num_clusters} clusters that are not empty.")
    directions = nn.functional.normalize(tokens.float(), dim=-1)
    gram = directions @ directions.mT
    seeds = _most_reducing_seeds(gram, num_clusters)
    similarity = gram.gather(2, seeds[:, None, :].expand(-1, num_tokens, -1))
    best, labels = similarity.max(dim=-1)
    labels = _fill_empty_clusters(labels, -best, num_clusters)
    for _ in range(max_iterations):
        membership = _membership(labels, num_clusters)
        centres = membership / membership.sum(dim=1, keepdim=True)  # as weights of the tokens
        similarity = gram @ centres
        # Half the squared distance to the centre, up to a constant of the token.
        distance = (centres * similarity).sum(dim=1, keepdim=True) / 2 - similarity
        best, nearest = distance.min(dim=-1)
        own = distance.gather(2, labels[..., None]).squeeze(2)
        stays = own <= best + 1e-6  # on ties, so that equal tokens do not change clusters for ever
        nearest = torch.where(stays, labels, nearest)
        if _host_can_see(labels) and torch.equal(nearest, labels):
            break
        labels = _fill_empty_clusters(nearest, best, num_clusters)
    return labels


def _most_reducing_seeds(gram: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Indices `(B, c)` of tokens; each makes the sum of squared distances to the nearest seed as small as it can."""
    # Of each token, its similarity to the candidate or to a seed, whichever is nearer: (B, candidate, token).
    nearest, seeds = gram.clone(), []
    for _ in range(num_clusters):
        seeds.append(nearest.sum(dim=-1).argmax(dim=-1, keepdim=True))
        torch.maximum(nearest, _take_tokens(nearest, seeds[-1]), out=nearest)
    return torch.cat(seeds, dim=1)


def _take_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of tokens `(B, n, d)` those at `index` `(B, m)`, `(B, m, d)`; on a CPU several times faster than indexing."""
    if len(tokens) == 1:
        return tokens[0].index_select(0, index[0])[None]
    starts = torch.arange(0, tokens.shape[0] * tokens.shape[1], tokens.shape[1], device=tokens.device)
    return (
        tokens.flatten(0, 1).index_select(0, (index + starts[:, None]).flatten()).view(*index.shape, tokens.shape[2])
    )


def _fill_empty_clusters(labels: torch.Tensor, distance: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """
    Gives each empty cluster one token, those with the largest `distance` `(B, n)` to their centres first. The nearest
    member of a cluster never leaves it, so that no cluster becomes empty by it.
    """
    membership = _membership(labels, num_clusters).bool()
    empty = ~membership.any(dim=1)
    if _host_can_see(labels) and not empty.any():
        return labels
    index = torch.arange(labels.shape[1], device=labels.device)
    nearest = torch.where(membership, distance[..., None], torch.inf).argmin(dim=1)
    is_nearest = (membership & (index[:, None] == nearest[:, None])).any(dim=-1)
    leaving = distance.masked_fill(is_nearest, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    leaving = leaving[:, :num_clusters]
    empty_first = empty.int().sort(dim=-1, descending=True, stable=True).indices
    moves = index[:num_clusters] < empty.sum(dim=-1, keepdim=True)
    return labels.scatter(1, leaving, torch.where(moves, empty_first, labels.gather(1, leaving)))


def _membership(labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """One column `(B, n, c)` per cluster, 1 for its members."""
    return (labels[..., None] == torch.arange(num_clusters, device=labels.device)).float()


def _host_can_see(values: torch.Tensor) -> bool:
    """Whether a branch on values costs no waiting: they are in the host's memory, and real."""
    return type(values) is torch.Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()


def merge_clusters(
    tokens: torch.Tensor, importance: torch.Tensor, labels: torch.Tensor, num_clusters: int, merge_weights: str
) -> torch.Tensor:
    """
    Equation 7: one token per cluster, the sum of its members weighted by their importance.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`), importance (`(B, n)`), labels (`(B, n)`).
        merge_weights (`str`): `"raw"` as printed, `"normalized"` with weights that sum to 1 in a cluster.

    Returns:
        `torch.FloatTensor` of shape `(B, c, d)`, in the dtype of `tokens`.
    """
    if merge_weights == "normalized":
        importance = importance.clamp_min(torch.finfo(importance.dtype).tiny)  # all zero: the plain mean
    weights = _membership(labels, num_clusters) * importance[..., None]
    if merge_weights == "normalized":
        weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights.mT @ tokens.float()).to(tokens.dtype)


def compress_tokens(
    tokens: torch.Tensor, importance: torch.Tensor, num_kept: int, num_clusters: int, merge_weights: str = "raw"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One stage, equations 5 to 8 without the class token: the k most important tokens in their order, then the c merged
    ones. With one cluster all redundant tokens are merged, with none they are dropped.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`).
        importance (`torch.FloatTensor` of shape `(B, n)`): IPS, not negative.

    Returns:
        The tokens `(B, k + c, d)`, and which of them each input token has become, `(B, n)`; -1 where it was dropped.
    """
    kept, redundant = split_by_importance(importance, num_kept)
    output = [_take_tokens(tokens, kept)]
    index = torch.arange(num_kept, device=tokens.device).expand(len(tokens), -1)
    becomes = torch.full_like(importance, -1, dtype=torch.long).scatter(1, kept, index)
    if num_clusters > 0:
        redundant_tokens = _take_tokens(tokens, redundant)
        several = num_clusters > 1
        labels = cosine_kmeans(redundant_tokens.detach(), num_clusters) if several else torch.zeros_like(redundant)
        weights = importance.gather(1, redundant)
        output.append(merge_clusters(redundant_tokens, weights, labels, num_clusters, merge_weights))
        becomes = becomes.scatter(1, redundant, num_kept + labels)
    return torch.cat(output, dim=1), becomes


def spatial_downsample(features: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """
    The baseline SPD of the paper: the grid of visual tokens `(B, n, d)`, averaged over squares of `factor` x `factor`.

    Raises:
        `ValueError`: The grid cannot be divided by the factor.
    """
    height, width = grid
    if height % factor or width % factor:
        raise ValueError(
            f"`spd_factor` is {factor}, which does not divide the grid of {height} x {width} visual tokens."
        )
    squares = features.unflatten(1, (height // factor, factor, width // factor, factor))
    return squares.mean(dim=(2, 4)).flatten(1, 2)


class VisualBudgetMixin:
    """For models and processors: `set_visual_budget`."""

    def set_visual_budget(self: Any, num_visual_tokens: int) -> None:
        """
        From now on an image has so many visual tokens; model and processor each have to be told. Turns VMTC on.

        Args:
            num_visual_tokens (`int`): From 1 to the number of patches.
        """
        settings = getattr(self, "config", self)
        if isinstance(num_visual_tokens, bool) or not isinstance(num_visual_tokens, int) or num_visual_tokens < 1:
            raise ValueError(f"The number of visual tokens must be a whole number from 1, got {num_visual_tokens!r}.")
        settings.use_vmtc, settings.vmtc_num_visual_tokens = True, num_visual_tokens
