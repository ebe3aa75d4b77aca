"""Patch info mining (arXiv:2403.18814, section 3.2): every CLIP patch attends to its own square of the high view.

The original projects each of an image's 36,864 auxiliary positions to a key and a value. Each of the 576 patches has
one query, so both projections can be applied on the patches' side instead:

    query . (W_k norm(x) + b_k)   =  (W_k^T query) . norm(x) + b_k . query
    sum w (W_v norm(x) + b_v)     =  W_v (sum w norm(x)) + b_v              as the weights w add up to 1

The results are the original's up to rounding, with a sixtieth of the operations. Positions need only their normalized
features. With gradient checkpointing these are recomputed from the tower's stages, which are an eighth of their size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mgm.configuration_mgm import MGMConfig


# Elements of the auxiliary features that are processed together: 64 MiB in bf16, a third of an MGM-2B image's. The
# peak is about three times that, as in a layer's backward pass (layers/tiled_mlp.py).
CHUNK_ELEMENTS = 2**25


class MiningKey(nn.Sequential):
    """The key's LayerNorm and Linear, applied to the query."""

    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [..., C] to a factor [..., C_aux] for normalized features, and a constant [..., 1] to add."""
        norm, projection = self
        return norm(*projection(query))


class MiningKeyLayerNorm(nn.LayerNorm):
    """Scale and shift alone: the features are normalized elsewhere."""

    def forward(self, query: torch.Tensor, constant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query * self.weight, constant + (query * self.bias).sum(-1, keepdim=True)


class MiningKeyProjection(nn.Linear):
    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query @ self.weight, (query * self.bias).sum(-1, keepdim=True)


class MiningValueLayerNorm(nn.LayerNorm):
    """Scale and shift alone: the features have been normalized before they were mixed."""

    def forward(self, mixed: torch.Tensor) -> torch.Tensor:
        return mixed * self.weight + self.bias


class MGMPatchInfoMining(nn.Module):
    gradient_checkpointing = False  # transformers sets it to True, and _gradient_checkpointing_func with it

    def __init__(self, config: MGMConfig) -> None:
        super().__init__()
        dim, aux_dim = config.vision_config.hidden_size, sum(config.vision_config_aux.hidden_sizes)
        self.query_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.key_proj = MiningKey(MiningKeyLayerNorm(aux_dim), MiningKeyProjection(aux_dim, dim))
        self.value_proj = nn.Sequential(MiningValueLayerNorm(aux_dim), nn.Linear(aux_dim, dim))

    def forward(
        self,
        features: torch.Tensor,
        stages_aux: list[torch.Tensor],
        image_grid: int = 1,
        image_global: bool = False,
    ) -> torch.Tensor:
        """Add to CLIP's features the attention of each patch to its square of the auxiliary features.

        The modules run once, for all images: under ZeRO-3 every process must run them equally often. Only code without
        parameters runs chunk by chunk.

        Args:
            features: [N * K, P, C] of the K views of N images, beginning with the whole image where CLIP sees it.
            stages_aux: of the auxiliary tower, [N, C_i, H_i, W_i] each.
            image_grid, image_global: the config's.
        """
        query, constant = self.key_proj(self.query_proj(features))  # [N * K, P, C_aux], [N * K, P, 1]
        scale = features.shape[-1] ** -0.5
        by_image = (len(stages_aux[0]), -1)
        query, constant = (query * scale).unflatten(0, by_image), (constant * scale).unflatten(0, by_image)
        attend = self._attend
        if self.gradient_checkpointing and self.training:
            attend = partial(self._gradient_checkpointing_func, attend)

        num_images, num_views, num_patches, _ = query.shape
        patch_grid_size = math.isqrt(num_patches)
        image_chunks, row_chunks = chunks(num_images, patch_grid_size, _elements_of_view(stages_aux, image_grid))
        views = []
        for view in range(num_views):
            look = View(view, image_grid, image_global, patch_grid_size)
            by_chunk = []
            for images in image_chunks:
                stages = [stage[images] for stage in stages_aux]
                bands = []
                for rows in row_chunks:
                    part = (images, view, slice(rows.start * patch_grid_size, rows.stop * patch_grid_size))
                    bands.append(attend(query[part], constant[part], look, rows, *stages))
                by_chunk.append(torch.cat(bands, dim=1))
            views.append(torch.cat(by_chunk))
        mixed = torch.stack(views, dim=1).flatten(0, 1)  # [N * K, P, C_aux]
        return features + self.value_proj(mixed)

    def _attend(
        self, query: torch.Tensor, constant: torch.Tensor, view: "View", rows: slice, *stages: torch.Tensor
    ) -> torch.Tensor:
        """Attention of some rows of patches to their squares' normalized features: [n, p, C_aux], from queries
        [n, p, C_aux] and the constants [n, p, 1] that are added to their products."""
        squares = normalize(view.squares(stages, rows), self.key_proj[0].eps)  # [n, p, S, C_aux]
        products = (squares @ query.unsqueeze(3)).squeeze(3) + constant  # [n, p, S]
        return (products.softmax(dim=2).unsqueeze(2) @ squares).squeeze(2)


@dataclass(frozen=True)
class View:
    """The part of the auxiliary features that a view's patches attend to: the whole image's, or a crop's.

    The whole image is the first view where CLIP sees it beside crops. It attends to the features scaled down, not to
    features of a smaller image.
    """

    index: int
    image_grid: int
    image_global: bool
    patch_grid_size: int

    def squares(self, stages: Sequence[torch.Tensor], rows: slice) -> torch.Tensor:
        """Stages [n, C_i, H_i, W_i], upsampled to the first one's size, to [n, p, S, C_aux]: the S positions in the
        square of each patch in `rows` of the view."""
        height = stages[0].shape[2]
        is_whole = self.image_global and self.index == 0
        row, column = (0, 0) if is_whole else divmod(self.index - self.image_global, self.image_grid)
        side = height if is_whole else height // self.image_grid
        square_side = side // self.patch_grid_size
        top, bottom = (row * side + patch_row * square_side for patch_row in (rows.start, rows.stop))
        maps = [
            upsampled_rows(stage, height, top, bottom)[..., column * side : (column + 1) * side] for stage in stages
        ]
        if is_whole:
            maps = [scaled(x, 1 / self.image_grid) for x in maps]
        squares = torch.cat([split_into_squares(x, self.patch_grid_size) for x in maps], dim=-1)
        return squares.flatten(3, 4).flatten(1, 2)


def chunks(num_images: int, patch_grid_size: int, elements_of_view: int) -> tuple[list[slice], list[slice]]:
    """Slices of the images, and of the rows of patches, to process together: up to CHUNK_ELEMENTS, at least a row."""
    rows = min(patch_grid_size, max(1, CHUNK_ELEMENTS * patch_grid_size // elements_of_view))
    images = max(1, CHUNK_ELEMENTS // elements_of_view)
    return _slices(num_images, images), _slices(patch_grid_size, rows)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _elements_of_view(stages_aux: list[torch.Tensor], image_grid: int) -> int:
    height, width = stages_aux[0].shape[2:]
    return sum(stage.shape[1] for stage in stages_aux) * height * width // image_grid**2


def upsampled_rows(features: torch.Tensor, height: int, top: int, bottom: int) -> torch.Tensor:
    """Rows `top` to `bottom` of features [n, C, h, w] upsampled to `height`, with their neighbours as input."""
    scale = height // features.shape[2]
    if scale == 1:
        return features[:, :, top:bottom]
    first, last = max(0, top // scale - 1), -(-bottom // scale) + 1
    rows = scaled(features[:, :, first:last], scale)
    return rows[:, :, top - first * scale : bottom - first * scale]


def scaled(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Features [n, C, h, w] of another height and width, in their own dtype: under autocast they would become fp32."""
    with torch.autocast(features.device.type, enabled=False):
        return F.interpolate(features, scale_factor=factor, mode="bilinear")


def normalize(features: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without scale and shift, in the features' own dtype: under autocast it would return fp32."""
    with torch.autocast(features.device.type, enabled=False):
        return F.layer_norm(features, features.shape[-1:], eps=eps)


def split_into_squares(features: torch.Tensor, num_columns: int) -> torch.Tensor:
    """[n, C, H, W] to a view [n, rows, columns, h, w, C]: the positions of squares of W / num_columns."""
    side = features.shape[3] // num_columns
    squares = features.unflatten(3, (num_columns, side)).unflatten(2, (-1, side))  # [n, C, rows, h, columns, w]
    return squares.permute(0, 2, 4, 3, 5, 1)


def split_into_crops(features: torch.Tensor, image_grid: int) -> torch.Tensor:
    """[N, C, H, W] to [N, grid * grid, C, H / grid, W / grid], in reading order."""
    squares = features.unflatten(3, (image_grid, -1)).unflatten(2, (image_grid, -1))  # [N, C, grid, h, grid, w]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
