"""An image of any size through a model of one size: overlapping tiles, blended."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_tiles(function: Callable[[Tensor], Tensor], image: Tensor, size: int) -> Tensor:
    """An image by a function of squares, which are laid over it evenly and overlap by a quarter of their side or more.

    There their weights rise linearly from their borders and sum to 1, so that no seam is steeper than the tiles'
    difference over a quarter of their side. Tiles are at their worst at their borders, so an image larger than one is
    continued by its outermost pixels, a quarter of a tile on each side, and cut out again. A side shorter than a tile
    is continued likewise.

    Args:
        function: tiles (m, C, size, size) -> of the same shape, row by row.
        image: (C, H, W).

    Returns:
        (C, H, W).
    """
    height, width = image.shape[1:]
    overlap = size // 4
    margin = overlap if max(height, width) > size else 0
    right, bottom = (margin + max(size - side - 2 * margin, 0) for side in (width, height))
    padded = F.pad(image[None], (margin, right, margin, bottom), mode="replicate")[0]
    corners = [
        (top, left)
        for top in _starts(padded.shape[1], size, overlap)
        for left in _starts(padded.shape[2], size, overlap)
    ]
    tiles = function(torch.stack([padded[:, top : top + size, left : left + size] for top, left in corners]))
    ramp = torch.arange(1, size + 1, device=image.device, dtype=torch.float32)
    ramp = torch.minimum(ramp, ramp.flip(0)).clamp(max=max(overlap, 1))
    weights = ramp[:, None] * ramp
    total = torch.zeros_like(padded, dtype=torch.float32)
    shares = torch.zeros_like(total[0])
    for (top, left), tile in zip(corners, tiles, strict=True):
        total[:, top : top + size, left : left + size] += weights * tile
        shares[top : top + size, left : left + size] += weights
    return (total / shares)[:, margin : margin + height, margin : margin + width].to(tiles.dtype)


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where the fewest tiles begin that cover a side with this overlap, evenly spread."""
    count = 1 + -(-(length - size) // (size - overlap))
    return [round(index * (length - size) / max(count - 1, 1)) for index in range(count)]
