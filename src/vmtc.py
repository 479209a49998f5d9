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
Reducing Image Redundancy". Some blocks of a vision tower keep their primary patch tokens, and cluster and merge the
redundant ones. Later blocks work on the shorter sequence.

A block that compresses (a stage, `plan_stages`) works on z' = MSA(z) + z, between attention and MLP:

1. The importance score (IPS) of a patch token is the attention weight that the class token pays it, averaged over heads
   (`class_token_attention`, `importance_scores`). Towers without a class token: `mean_received_attention`.
2. Equation 5: the k patch tokens with the highest IPS are the primary tokens, and stay (`split_by_importance`). Not in the
   paper, for towers that were not trained with VMTC: those that are important and novel stay (`split_by_novelty`).
3. Equation 6: all others are the redundant tokens (`split_by_importance`).
4. K-means clusters the redundant tokens into C_1 to C_c, by cosine similarity (`cosine_kmeans`, `choose_seeds`).
5. Equation 7: each cluster is merged into the sum of its tokens, weighted by their IPS (`merge_clusters`).
6. Equation 8: z' becomes the class token, the primary tokens and the merged ones (`compress_tokens`; the class token joins
   them in `TowerCompression`, `vision_towers.py`).

Conventions of this file. B: images, n: patch tokens before a stage, k: primary tokens, c: clusters, d: width of the tower.
Importance and similarity are computed in float32, ties are broken by index, and nothing is shared between images.
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
    """Validator of a config field, which also runs when the field is set later. So do the two below."""
    if value is not None and value < 1:
        raise ValueError(f"must be at least 1, got {value}.")


def share_above_0(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, got {value}.")


def rising_indices(value: list[int] | tuple[int, ...] | None) -> None:
    layers = list(value or ())
    if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
        raise ValueError(f"must be indices of blocks from 0, in rising order, got {value}.")


def single_feature_layer(layers: Any) -> int | None:
    """The index in `vision_feature_layer`, or `None` if it lists several layers."""
    if isinstance(layers, (list, tuple)) and len(layers) == 1:
        return layers[0]
    return layers if isinstance(layers, int) else None


@strict
class VmtcConfig(PreTrainedConfig):
    r"""
    The fields of VMTC, which [`VmtcCmaiLlavaConfig`] and [`TaLlavaConfig`] have.

    Args:
        use_vmtc (`bool`, *optional*, defaults to `False`):
            Compress the visual tokens inside the vision tower.
        vmtc_num_visual_tokens (`int`, *optional*):
            Visual tokens that an image has in the end, class token not counted. The paper uses 288 (of 576), 64 and 36.
        vmtc_keep_ratio (`float`, *optional*, defaults to 0.5):
            The same as a share of the patches, in (0, 1]. It is used if `vmtc_num_visual_tokens` is `None`.
        vmtc_num_stages (`int`, *optional*, defaults to 3):
            Number of blocks that compress. Each removes the same number of tokens.
        vmtc_stage_placement (`str`, *optional*, defaults to `"spaced"`):
            Which of the blocks up to `vision_feature_layer` compress: equally `"spaced"` ones, as in the paper, or the
            `"last"` ones. Use `"last"` for a tower that was not trained with VMTC, because the class token's attention in
            early blocks does not show yet what matters. It saves less time in the tower.
        vmtc_layers (`list[int]`, *optional*):
            Indices, from 0, of the blocks that compress. They replace those of the two fields above.
        vmtc_kept_tokens (`str`, *optional*, defaults to `"importance"`):
            Which tokens stay as they are. `"importance"`: the most important ones (equation 5). `"importance_and_novelty"`:
            those with the largest importance times novelty. The novelty of a token is one minus its cosine to the nearest
            more important token. It is not in the paper, and is meant for a model that was not trained with VMTC.
        vmtc_cluster_ratio (`float`, *optional*, defaults to 10/64):
            Share of a stage's output tokens that are merged clusters, in (0, 1]. There is at least one.
        vmtc_method (`str`, *optional*, defaults to `"cluster"`):
            What happens to the redundant tokens (Table 4 of the paper). `"cluster"`, the method, merges each cluster into
            one token. `"merge"` merges all of them into one (MG). `"layerwise_prune"` drops them (LWP).
            `"last_layer_prune"` drops them too, but only in the last block (LLP).
        vmtc_merge_weights (`str`, *optional*, defaults to `"raw"`):
            `"raw"`: a merged token is the sum of its members, weighted by importance (equation 7). `"normalized"`: the
            weights sum to 1 in a cluster. A model that was not trained with VMTC needs this.

    The defaults are the paper's, for a model that is trained with VMTC. For any other model, use `TRAINING_FREE_VMTC`:

    ```python
    >>> config = VmtcConfig(use_vmtc=True, vmtc_num_visual_tokens=64, **TRAINING_FREE_VMTC)
    ```
    """

    keys_to_ignore_at_inference = OUTPUTS_TO_IGNORE

    use_vmtc: bool = False
    vmtc_num_visual_tokens: int | None = validated_field(at_least_1, default=None)
    vmtc_keep_ratio: float | int = validated_field(share_above_0, default=0.5)
    vmtc_num_stages: int = validated_field(at_least_1, default=3)
    vmtc_stage_placement: Literal["spaced", "last"] = "spaced"
    vmtc_layers: list[int] | tuple[int, ...] | None = validated_field(rising_indices, default=None)
    vmtc_cluster_ratio: float | int = validated_field(share_above_0, default=10 / 64)
    vmtc_method: Literal["last_layer_prune", "layerwise_prune", "merge", "cluster"] = "cluster"
    vmtc_kept_tokens: Literal["importance", "importance_and_novelty"] = "importance"
    vmtc_merge_weights: Literal["raw", "normalized"] = "raw"

    def validate_vmtc(self):
        """Checks that VMTC has a single feature layer. `@strict` calls it."""
        if self.use_vmtc and single_feature_layer(getattr(self, "vision_feature_layer", -1)) is None:
            raise ValueError(
                f"VMTC works with one `vision_feature_layer`, but the config has {self.vision_feature_layer}: with VMTC the "
                "hidden states of several layers have different lengths. Set one layer, or `use_vmtc=False`."
            )


# Fields of a [`VmtcConfig`] for a model that was not trained with VMTC. `ta-llava compress` writes them.
TRAINING_FREE_VMTC = {
    "vmtc_stage_placement": "last",
    "vmtc_kept_tokens": "importance_and_novelty",
    "vmtc_merge_weights": "normalized",
}


def count_visual_tokens(settings: Any, num_patches: int, num_visual_tokens: int | None = None) -> int:
    """
    Visual tokens that an image has in the end, class token not counted. Model and processor both call this, so they agree.

    Args:
        settings: The model's config or the processor; it has fields of [`VmtcConfig`], and may have `spd_factor`.
        num_patches (`int`): Patches of the image.
        num_visual_tokens (`int`, *optional*): A budget for this call; it replaces that of the settings.

    Raises:
        `ValueError`: The budget is not in 1..`num_patches`, or the call has a budget but VMTC is off.
    """
    if not settings.use_vmtc:
        if num_visual_tokens is not None:
            raise ValueError(f"`num_visual_tokens` is {num_visual_tokens}, but `use_vmtc` is off. Turn it on first.")
        return num_patches // getattr(settings, "spd_factor", 1) ** 2
    if num_visual_tokens is None:
        num_visual_tokens = settings.vmtc_num_visual_tokens
    if num_visual_tokens is None:
        if not 0 < settings.vmtc_keep_ratio <= 1:  # in a processor; a config has checked it before
            raise ValueError(f"`vmtc_keep_ratio` must be above 0 and at most 1, got {settings.vmtc_keep_ratio}.")
        return max(1, round(settings.vmtc_keep_ratio * num_patches))
    if not 1 <= num_visual_tokens <= num_patches:
        raise ValueError(
            f"The budget is {num_visual_tokens} visual tokens, but an image has {num_patches} patches. Choose a number from "
            f"1 to {num_patches}."
        )
    return num_visual_tokens


@dataclass(frozen=True)
class VmtcStage:
    """What one block does: `num_kept` (k) of its patch tokens stay, the others become `num_clusters` (c) tokens."""

    num_kept: int
    num_clusters: int


def plan_stages(
    config: Any, num_patches: int, num_blocks: int, num_visual_tokens: int | None = None
) -> dict[int, VmtcStage]:
    """
    Which blocks compress, and how far. Each removes the same number of tokens, e.g. 48 -> 36 -> 24 -> 12 in three stages.

    Args:
        config ([`VmtcConfig`]): The fields that start with `vmtc_`.
        num_patches (`int`): Patch tokens of an image.
        num_blocks (`int`): Blocks up to the one whose output is used.
        num_visual_tokens (`int`, *optional*): A budget for this call; it replaces that of the config.

    Returns:
        `dict[int, VmtcStage]`: By index of the block; empty if nothing is to be removed.

    Raises:
        `ValueError`: The budget or the blocks of the config are not possible.
    """
    budget = count_visual_tokens(config, num_patches, num_visual_tokens)
    layers = stage_layers(config, num_blocks)
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
        raise ValueError(
            "`vmtc_layers` is empty, so no block can compress. Name at least one block, or set it to None."
        )
    return stages


def stage_layers(config: Any, num_blocks: int) -> list[int]:
    """Indices of the blocks that compress, among the first `num_blocks`."""
    if config.vmtc_method == "last_layer_prune":
        return [num_blocks - 1]
    if config.vmtc_layers is not None:
        layers = list(config.vmtc_layers)
        if layers and layers[-1] >= num_blocks:
            raise ValueError(
                f"`vmtc_layers` names block {layers[-1]}, but the output of the vision tower that is used "
                f"(`vision_feature_layer`) comes from blocks 0 to {num_blocks - 1}. Name only these."
            )
        return layers
    if config.vmtc_num_stages > num_blocks:
        raise ValueError(
            f"`vmtc_num_stages` is {config.vmtc_num_stages}, but the output of the vision tower that is used "
            f"(`vision_feature_layer`) comes from only {num_blocks} blocks. Ask for fewer stages."
        )
    if config.vmtc_stage_placement == "last":
        return list(range(num_blocks - config.vmtc_num_stages, num_blocks))
    return [num_blocks * (s + 1) // (config.vmtc_num_stages + 1) for s in range(config.vmtc_num_stages)]


# --- the maths -----------------------------------------------------------------------------------------------------


def class_token_attention(
    query: torch.Tensor, key: torch.Tensor, scaling: float, is_real: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The row of the class token, which is the first token, in the attention weights. VMTC needs no other row.

    Args:
        query, key (`torch.FloatTensor` of shape `(B, heads, 1 + n, head_dim)`): Those of the attention.
        is_real (`torch.BoolTensor` of shape `(B, n)`, *optional*): Which patches are not padding; by default all.

    Returns:
        `torch.FloatTensor` of shape `(B, heads, 1, 1 + n)`, float32. Padding has 0.
    """
    scores = query[:, :, :1].float() @ key.float().mT * scaling
    if is_real is not None:
        is_padding = nn.functional.pad(~is_real, (1, 0))
        scores = scores.masked_fill(is_padding[:, None, None], -torch.inf)
    return scores.softmax(dim=-1)


def mean_received_attention(
    query: torch.Tensor, key: torch.Tensor, scaling: float, is_real: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The attention that each patch receives, averaged over the patches that pay it; for towers without a class token. Shapes
    are those of `class_token_attention`, with n in place of 1 + n. One image at a time keeps the memory at heads * n * n.
    """
    rows = []
    for image, (one_query, one_key) in enumerate(zip(query, key, strict=True)):
        scores = one_query.float() @ one_key.float().mT * scaling
        if is_real is None:
            rows.append(scores.softmax(dim=-1).mean(dim=-2, keepdim=True))
        else:  # a view that is all padding gets zeros
            pays = is_real[image, :, None] & is_real[image]
            weights = scores.masked_fill(~is_real[image], torch.finfo(scores.dtype).min).softmax(dim=-1) * pays
            rows.append(weights.sum(dim=-2, keepdim=True) / is_real[image].sum().clamp(min=1))
    return torch.stack(rows)


def importance_scores(attention_row: torch.Tensor, num_patches: int) -> torch.Tensor:
    """IPS `(B, n)` of the patches, which are the last tokens: the mean over heads of a row `(B, heads, 1, 1 + n)`."""
    return attention_row[:, :, 0, -num_patches:].float().mean(dim=1)


def split_by_importance(importance: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Equations 5 and 6: the indices of the primary tokens `(B, k)`, which have the highest IPS, in their original order, and
    of the redundant tokens `(B, n - k)`, from the highest to the lowest IPS. Among equally important tokens the first is
    kept.
    """
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :num_kept].sort(dim=-1).values, order[:, num_kept:]


@torch.no_grad()
def split_by_novelty(
    tokens: torch.Tensor, importance: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As `split_by_importance`, but by IPS times `novelty`, so that of tokens `(B, n, d)` that are alike not all stay. This is
    not in the paper.
    """
    return split_by_importance(importance * novelty(_cosines(tokens), importance), num_kept)


def novelty(gram: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """
    One minus the cosine of each token to the nearest token that is more important, `(B, n)`. The most important token has 2,
    the largest there is. Equally important tokens do not count for each other.

    Args:
        gram (`torch.FloatTensor` of shape `(B, n, n)`): Cosines between tokens.
        importance (`torch.FloatTensor` of shape `(B, n)`): Their IPS.
    """
    return 1 - gram.masked_fill(importance[:, None, :] <= importance[:, :, None], -1).amax(dim=-1)


def _cosines(tokens: torch.Tensor) -> torch.Tensor:
    """Cosines between tokens `(B, n, d)`: `(B, n, n)`, float32."""
    directions = nn.functional.normalize(tokens.float(), dim=-1)
    return directions @ directions.mT


def choose_seeds(gram: torch.Tensor, importance: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """
    The tokens that clusters start from: those with the largest importance times `novelty`. All seeds are found at once,
    where K-means++ and its kin need a round for each.

    Args:
        gram (`torch.FloatTensor` of shape `(B, n, n)`): Cosines between tokens.
        importance (`torch.FloatTensor` of shape `(B, n)`): Their IPS.

    Returns:
        `torch.LongTensor` of shape `(B, c)`.
    """
    return (
        (importance * novelty(gram, importance)).sort(dim=-1, descending=True, stable=True).indices[:, :num_clusters]
    )


@torch.no_grad()
def cosine_kmeans(
    tokens: torch.Tensor, importance: torch.Tensor, num_clusters: int, num_iterations: int = 1
) -> torch.Tensor:
    """
    K-means by cosine similarity: Lloyd's algorithm on tokens scaled to length 1, whose squared distance is twice one minus
    their cosine. It starts from the tokens of `choose_seeds`. A seed always stays in its cluster, so no cluster is empty.

    All distances come from the Gram matrix of the tokens, since there are far fewer tokens than dimensions. The result does
    not depend on chance, and no step waits for values: a GPU gets about 25 kernels, whatever the number of clusters.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`).
        importance (`torch.FloatTensor` of shape `(B, n)`): Their IPS.
        num_clusters (`int`): Number of clusters c, at most n.
        num_iterations (`int`): Lloyd steps. One is enough from that start.

    Returns:
        `torch.LongTensor` of shape `(B, n)`: The cluster of each token, from 0 to c - 1.

    Raises:
        `ValueError`: There are more clusters than tokens.
    """
    num_tokens = tokens.shape[1]
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"{num_tokens} tokens cannot make {num_clusters} clusters that are not empty.")
    gram = _cosines(tokens)
    seeds = choose_seeds(gram, importance, num_clusters)
    clusters = torch.arange(num_clusters, device=tokens.device).expand_as(seeds)
    similarity = gram.gather(2, seeds[:, None, :].expand(-1, num_tokens, -1))
    labels = similarity.argmax(dim=-1).scatter(1, seeds, clusters)
    for _ in range(num_iterations):
        membership = _membership(labels, num_clusters)
        centres = membership / membership.sum(dim=1, keepdim=True)  # as weights of the tokens
        similarity = gram @ centres
        # The squared distance to the centre is, up to a constant of the token, -2 times this.
        nearness = similarity - (centres * similarity).sum(dim=1, keepdim=True) / 2
        labels = nearness.argmax(dim=-1).scatter(1, seeds, clusters)
    return labels


def _take_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens `(B, m, d)` at `index` `(B, m)` of `(B, n, d)`; on a CPU this is several times faster than indexing."""
    if len(tokens) == 1:
        return tokens[0].index_select(0, index[0])[None]
    starts = torch.arange(0, tokens.shape[0] * tokens.shape[1], tokens.shape[1], device=tokens.device)
    return (
        tokens.flatten(0, 1).index_select(0, (index + starts[:, None]).flatten()).view(*index.shape, tokens.shape[2])
    )


def _membership(labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """One column for each cluster, `(B, n, c)`: 1 for its members, 0 for others."""
    return (labels[..., None] == torch.arange(num_clusters, device=labels.device)).float()


def merge_clusters(
    tokens: torch.Tensor, importance: torch.Tensor, labels: torch.Tensor, num_clusters: int, merge_weights: str
) -> torch.Tensor:
    """
    Equation 7: one token for each cluster, the sum of its members weighted by their IPS.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`): The redundant tokens.
        importance (`torch.FloatTensor` of shape `(B, n)`): Their IPS.
        labels (`torch.LongTensor` of shape `(B, n)`): Their clusters.
        merge_weights (`str`): `"raw"` as the paper prints it; with `"normalized"` the weights sum to 1 in a cluster.

    Returns:
        `torch.FloatTensor` of shape `(B, c, d)`, in the dtype of `tokens`.
    """
    if merge_weights == "normalized":
        importance = importance.clamp_min(torch.finfo(importance.dtype).tiny)  # if all are 0: the plain mean
    weights = _membership(labels, num_clusters) * importance[..., None]
    if merge_weights == "normalized":
        weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights.mT @ tokens.float()).to(tokens.dtype)  # the sum of IPS_i z'_i over each cluster


def compress_tokens(
    tokens: torch.Tensor,
    importance: torch.Tensor,
    num_kept: int,
    num_clusters: int,
    merge_weights: str = "raw",
    kept_tokens: str = "importance",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One stage, equations 5 to 8 without the class token: the k primary tokens in their order, then the c merged ones. With
    one cluster all redundant tokens are merged, with none they are dropped.

    Args:
        tokens (`torch.FloatTensor` of shape `(B, n, d)`).
        importance (`torch.FloatTensor` of shape `(B, n)`): IPS, not negative.
        merge_weights, kept_tokens (`str`): See [`VmtcConfig`].

    Returns:
        The tokens `(B, k + c, d)`, and which of them each input token has become, `(B, n)`; -1 if it was dropped.
    """
    if kept_tokens == "importance":
        kept, redundant = split_by_importance(importance, num_kept)
    else:
        kept, redundant = split_by_novelty(tokens, importance, num_kept)
    output = [_take_tokens(tokens, kept)]
    index = torch.arange(num_kept, device=tokens.device).expand(len(tokens), -1)
    becomes = torch.full_like(importance, -1, dtype=torch.long).scatter(1, kept, index)
    if num_clusters > 0:
        redundant_tokens, weights = _take_tokens(tokens, redundant), importance.gather(1, redundant)
        labels = torch.zeros_like(redundant)
        if num_clusters > 1:
            labels = cosine_kmeans(redundant_tokens, weights, num_clusters)
        output.append(merge_clusters(redundant_tokens, weights, labels, num_clusters, merge_weights))
        becomes = becomes.scatter(1, redundant, num_kept + labels)
    return torch.cat(output, dim=1), becomes


def spatial_downsample(features: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """
    Spatial down-sampling (SPD), the paper's baseline: averages the visual tokens `(B, n, d)` of a `grid` (height, width)
    over squares of `factor` x `factor`.

    Raises:
        `ValueError`: The factor does not divide the grid.
    """
    height, width = grid
    if height % factor or width % factor:
        raise ValueError(
            f"`spd_factor` is {factor}, which does not divide the grid of {height} x {width} visual tokens."
        )
    squares = features.unflatten(1, (height // factor, factor, width // factor, factor))
    return squares.mean(dim=(2, 4)).flatten(1, 2)


class VisualBudgetMixin:
    """Gives models and processors `set_visual_budget`."""

    def set_visual_budget(self: Any, num_visual_tokens: int) -> None:
        """
        Turns VMTC on and keeps this many visual tokens per image, or per view of it, from now on. Call it on both model and
        processor.

        Args:
            num_visual_tokens (`int`): From 1 to the number of patches.

        Raises:
            `ValueError`: It is no such number, or `spd_factor` is on.
        """
        settings = getattr(self, "config", self)
        if isinstance(num_visual_tokens, bool) or not isinstance(num_visual_tokens, int) or num_visual_tokens < 1:
            raise ValueError(f"The number of visual tokens must be a whole number from 1, got {num_visual_tokens!r}.")
        spd_factor = getattr(settings, "spd_factor", 1)
        if spd_factor > 1:
            raise ValueError(
                f"`spd_factor` is {spd_factor}, but the tokens that VMTC leaves have no grid to down-sample. Set "
                "`spd_factor=1` first."
            )
        settings.use_vmtc, settings.vmtc_num_visual_tokens = True, num_visual_tokens
        if getattr(settings, "vmtc_total_visual_tokens", None) is not None:  # pictures in views
            settings.vmtc_total_visual_tokens = None
