"""CIFAR-10-C (arXiv 1903.12261) made on the fly: corruptions of 32 x 32 images at five severities, on any device."""
import torch
import torch.nn.functional as F


def blur(x, sigma):
    """x (B, C, S, S) under a Gaussian of std sigma (B,) pixels, whole, renormalised at the borders."""
    i = torch.arange(x.shape[-1], device=x.device)
    kernel = (-(i - i[:, None]).square() / (2 * sigma.view(-1, 1, 1, 1).square())).softmax(-1)  # (B, 1, S, S)
    return kernel @ x @ kernel.mT


def salt_and_pepper(x, amount):
    """A share of the values, channels apart, becomes 0 or 1."""
    u = torch.rand_like(x)
    return x.masked_fill(u < amount / 2, 0.0).masked_fill(u > 1 - amount / 2, 1.0)


def brightness(x, more):
    """Raises the value of HSV, the largest of red, green and blue: hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, x / value * raised, raised)


CORRUPTIONS = {
    "salt_and_pepper": (salt_and_pepper, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_noise": (lambda x, std: x + std * torch.randn_like(x), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (lambda x, rate: torch.poisson(x * rate) / rate, (500, 250, 100, 75, 50)),
    "speckle_noise": (lambda x, std: x + std * x * torch.randn_like(x), (0.06, 0.10, 0.12, 0.16, 0.20)),
    "gaussian_blur": (lambda x, sigma: blur(x, x.new_full(x.shape[:1], sigma)), (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (lambda x, factor: torch.lerp(x.mean((2, 3), True), x, factor), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (lambda x, scale: F.interpolate(F.interpolate(x, size=int(32 * scale), mode="area"), size=32),
                 (0.95, 0.9, 0.85, 0.75, 0.65)),
}


def corrupt(images, name, severity):
    """images (N, 3, 32, 32) uint8 to uint8, as a corrupted data set would store them; the same for every call."""
    function, strengths = CORRUPTIONS[name]
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(severity)
        return (function(images.float() / 255, strengths[severity - 1]).clamp(0, 1) * 255).round().byte()


def conditions(images, names):
    """Yields ("", images), then ("NAME_SEVERITY_", corrupted images) for each name and severity."""
    yield "", images
    for name in names:
        for severity in range(1, 6):
            yield f"{name}_{severity}_", corrupt(images, name, severity)
