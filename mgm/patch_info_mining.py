"""Patch info mining (arXiv:2403.18814, section 3.2): every CLIP patch attends to its own square of the high view.

The original projects each of an image's 36,864 auxiliary positions to a key and a value. A patch has one query, so
both projections can be moved to its side of the attention, where there are 576 of them:

    query . (W_k norm(x) + b_k)   =  (W_k^T query) . norm(x) + b_k . query
    sum w (W_v norm(x) + b_v)     =  W_v (sum w norm(x)) + b_v              as the weights w add up to 1

The numbers are the original's up to rounding, at a sixtieth of the operations, and no position needs more than its
normalized features. Those are made again in the backward pass from the tower's stages, an eighth of their size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mgm.configuration_mgm import MGMConfig


# Elements of the auxiliary features that are looked at together: 32 MiB in bf16, of MGM-2B's an image's sixth part.
# About three times that is in use for a moment.
CHUNK_ELEMENTS = 2**24


class MiningKey(nn.Sequential):
    """LayerNorm and Linear whose product with the query is taken from the query's side."""

    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [..., C] to what normalized features are multiplied by [..., C_aux] and what is added [..., 1]."""
        norm, projection = self
        return norm(*projection(query))


class MiningKeyLayerNorm(nn.LayerNorm):
    """Scale and shift; the normalization itself is the features' part."""

    def forward(self, query: torch.Tensor, constant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query * self.weight, constant + (query * self.bias).sum(-1, keepdim=True)


class MiningKeyProjection(nn.Linear):
    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query @ self.weight, (query * self.bias).sum(-1, keepdim=True)


class MiningValueLayerNorm(nn.LayerNorm):
    """Scale and shift of features that have been normalized already."""

    def forward(self, mixed: torch.Tensor) -> torch.Tensor:
        return mixed * self.weight + self.bias


class MGMPatchInfoMining(nn.Module):
    gradient_checkpointing = False  # transformers switches it on, and sets _gradient_checkpointing_func

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
        """Add to CLIP's features what each patch finds in its square.

        The modules run once, for all images: under ZeRO-3 they have to run equally often on every process. What is
        done chunk by chunk has no parameters.

        Args:
            features: [N * K, P, C] of the K views of N images, the whole image's first where there is one.
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
        """Queries [n, p, C_aux] of some rows of patches, and what is added to their products [n, p, 1], to mixtures
        [n, p, C_aux] of their squares' normalized features."""
        squares = normalize(view.squares(stages, rows), self.key_proj[0].eps)  # [n, p, S, C_aux]
        products = (squares @ query.unsqueeze(3)).squeeze(3) + constant  # [n, p, S]
        return (products.softmax(dim=2).unsqueeze(2) @ squares).squeeze(2)


@dataclass(frozen=True)
class View:
    """Which part of the auxiliary features CLIP's patches of a view look at: with one view the image, else a crop.

    The whole image, where there is one, is the first view. Its share are the features scaled down, not those of a
    smaller image.
    """

    index: int
    image_grid: int
    image_global: bool
    patch_grid_size: int

    def squares(self, stages: Sequence[torch.Tensor], rows: slice) -> torch.Tensor:
        """Stages [n, C_i, H_i, W_i] to [n, p, S, C_aux], all brought to the first one's size: the S positions in the
        square of each of the patches in `rows` of the view."""
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
            maps = [F.interpolate(x, scale_factor=1 / self.image_grid, mode="bilinear") for x in maps]
        squares = torch.cat([split_into_squares(x, self.patch_grid_size) for x in maps], dim=-1)
        return squares.flatten(3, 4).flatten(1, 2)


def chunks(num_images: int, patch_grid_size: int, elements_of_view: int) -> tuple[list[slice], list[slice]]:
    """Slices of the images, and of the rows of patches, that are looked at together: CHUNK_ELEMENTS or a row."""
    rows = min(patch_grid_size, max(1, CHUNK_ELEMENTS * patch_grid_size // elements_of_view))
    images = max(1, CHUNK_ELEMENTS // elements_of_view)
    return _slices(num_images, images), _slices(patch_grid_size, rows)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _elements_of_view(stages_aux: list[torch.Tensor], image_grid: int) -> int:
    height, width = stages_aux[0].shape[2:]
    return sum(stage.shape[1] for stage in stages_aux) * height * width // image_grid**2


def upsampled_rows(features: torch.Tensor, height: int, top: int, bottom: int) -> torch.Tensor:
    """Rows `top` to `bottom` of features [n, C, h, w] brought to `height`. The rows around them are looked at too."""
    scale = height // features.shape[2]
    if scale == 1:
        return features[:, :, top:bottom]
    first, last = max(0, top // scale - 1), -(-bottom // scale) + 1
    rows = F.interpolate(features[:, :, first:last], scale_factor=scale, mode="bilinear")
    return rows[:, :, top - first * scale : bottom - first * scale]


def normalize(features: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without scale and shift, in the features' own dtype: autocast would make a copy in fp32."""
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
