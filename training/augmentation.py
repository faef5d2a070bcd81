"""tau(x): the other view of an image for the self-supervised term, drawn on the device, for a batch at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SIDE = 0.7  # of the crop, as a share of the image's
COLOR_STRENGTH = 0.4


def augment(pixel_values: Tensor) -> Tensor:
    """A random crop resized to the whole, a flip for half of the images, and a change of contrast and brightness.

    Args:
        pixel_values: (n, C, H, W), in [-1, 1]; so is the result. Draws from torch's generator of the device.
    """
    count, device = len(pixel_values), pixel_values.device
    side = torch.empty(count, 1, device=device).uniform_(SMALLEST_SIDE, 1)
    shift = torch.empty(count, 2, device=device).uniform_(-1, 1) * (1 - side)
    flip = torch.where(torch.rand(count, 1, device=device) < 0.5, -1.0, 1.0)
    transform = torch.zeros(count, 2, 3, device=device)
    transform[:, 0, :1], transform[:, 1, 1:2], transform[:, :, 2] = side * flip, side, shift
    grid = F.affine_grid(transform, list(pixel_values.shape), align_corners=False)
    cropped = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = torch.empty(2, count, 1, 1, 1, device=device).uniform_(-COLOR_STRENGTH, COLOR_STRENGTH)
    return (cropped * (1 + contrast) + brightness).clamp(-1, 1)
