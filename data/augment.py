"""BYOL's augmentations (arXiv 2006.07733, appendix B) of a batch at once, on its device, each image by its own numbers.

What happens in space is two matrices an image, rows and columns: x <- rows x columns^T. What happens to colour is one
matrix, since brightness, contrast, saturation and hue are all linear in a pixel and the mean pixel of its image.
Apart from the paper: hue turns around the axis of grey, values are clipped once, at the end, and views of images this
small are not blurred, though `augment` can do that."""
import math

import torch

from data.corruptions import blur

VIEWS = {"glyphs": dict(crop=0.4, flip=0.0, hue=0.0, grey=0.0), "cifar10": dict(crop=0.2, flip=0.5, hue=0.1, grey=0.2)}


def resize(start, length, size):
    """(B, 1, size, size) matrices that stretch, bilinearly, the pixels from start (B,) on, length (B,), over size."""
    i = torch.arange(size, device=start.device)
    source = start[:, None] + (i + 0.5) * length[:, None] / size - 0.5                      # (B, size)
    return (1 - (source.clamp(0, size - 1)[..., None] - i).abs()).clamp(min=0)[:, None]


def grey_matrix(device):
    """(3, 3): RGB to three times its luma; made on the device, since a CUDA graph cannot copy it there."""
    return torch.stack([torch.full((3,), weight, device=device) for weight in (0.299, 0.587, 0.114)], 1)


def jitter(factors, order):
    """(B, 6, 6): brightness, contrast, saturation, hue, by factors (B, 4), in the order (B, 4), on (pixel, mean pixel).

    Each is linear in the RGB of a pixel and, for contrast, the mean RGB of the image; hue turns colours around grey."""
    B, device = len(factors), factors.device
    one = torch.eye(3, device=device)
    grey = grey_matrix(device)
    axis = (one.roll(1, 0) - one.roll(-1, 0)) / 3 ** 0.5                                    # axis @ x: (1, 1, 1) x x
    f = factors[..., None, None]                                                            # (B, 4, 1, 1)
    angle = 2 * math.pi * f[:, 3]
    saturation = f[:, 2] * one + (1 - f[:, 2]) * grey
    hue = one + angle.sin() * axis + (1 - angle.cos()) * axis @ axis
    steps = torch.zeros(B, 4, 6, 6, device=device)
    for half in (slice(0, 3), slice(3, 6)):
        steps[:, :, half, half] = torch.stack([f[:, 0] * one, f[:, 1] * one, saturation, hue], 1)
        steps[:, 1, half, 3:] += (1 - f[:, 1]) * grey
    first, second, third, fourth = steps[torch.arange(B, device=device)[:, None], order].unbind(1)
    return fourth @ third @ second @ first


def normalise(x):
    """Images in [0, 1] to about mean 0 and std 1."""
    return ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


def two_views(images, data):
    """images (B, 3, S, S) uint8 -> (2B, 3, S, S), normalised: first views, then second; only these solarised."""
    return normalise(torch.cat([augment(images, **VIEWS[data], solarised=share) for share in (0.0, 0.2)]))


def augment(images, crop, flip, hue, grey, solarised, blurred=0.0):
    """A random view of images (B, 3, S, S) uint8: (B, 3, S, S) float32 in [0, 1].

    crop is the least share of the area; flip, grey, solarised and blurred (std 0.1 to 2 pixels) are probabilities;
    hue, up to 0.5, is the largest turn, of a whole one."""
    B, S, device = len(images), images.shape[-1], images.device

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape, device=device)

    area, ratio = S * S * uniform(crop, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=S), (area / ratio).sqrt().clamp(max=S)
    rows = resize(uniform(0, 1) * (S - height), height, S)
    columns = resize(uniform(0, 1) * (S - width), width, S)
    columns = torch.where(uniform(0, 1, 1, 1, 1) < flip, columns.flip(2), columns)
    x = rows @ (images.float() / 255) @ columns.mT                                          # (B, 3, S, S)
    kept = uniform(0, 1, 1) >= 0.8
    factors = torch.cat([uniform(0.6, 1.4, 2), uniform(0.8, 1.2, 1)], 1).masked_fill(kept, 1.0)
    factors = torch.cat([factors, uniform(-hue, hue, 1).masked_fill(kept, 0.0)], 1)
    colour = jitter(factors, uniform(0, 1, 4).argsort(1))[:, :3]                            # (B, 3, 6)
    colour = torch.where(uniform(0, 1, 1, 1) < grey, grey_matrix(device) @ colour, colour)
    x = x.flatten(2)                                                                        # (B, 3, S * S)
    x = (colour[..., :3] @ x + colour[..., 3:] @ x.mean(2, keepdim=True)).clamp(0, 1).view(B, 3, S, S)
    if blurred:
        x = torch.where(uniform(0, 1, 1, 1, 1) < blurred, blur(x, uniform(0.1, 2)), x)
    return torch.where((uniform(0, 1, 1, 1, 1) < solarised) & (x >= 0.5), 1 - x, x)
