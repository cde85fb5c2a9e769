"""Densities to fit proposals to: functions z (..., d) -> log-density (...), not normalised."""
import torch


def ring(z, radius, width, *bumps):
    """A ring in the plane, times the sum of exp(-bump(x, y)^2 / 2)."""
    return (-0.5 * ((z.norm(dim=-1) - radius) / width) ** 2
            + torch.stack([-0.5 * bump(*z.unbind(-1)) ** 2 for bump in bumps]).logsumexp(0))


def waves(z, width, other):
    """Two ridges along a sine, one of them moved by other(x), within a Gaussian of width 2, which makes them finite."""
    x, y = z.unbind(-1)
    y = y - torch.sin(torch.pi * x / 2)
    return torch.logaddexp(-0.5 * (y / width) ** 2, -0.5 * ((y + other(x)) / width) ** 2) - x * x / 8


# u1, u3 and u4 after Rezende and Mohamed (arXiv 1505.05770, table 1); u2 is that of the authors of 1905.04866
TARGETS = {
    "u1": lambda z: ring(z, 2, 0.4, lambda x, y: (x - 2) / 0.6, lambda x, y: (x + 2) / 0.6),
    "u2": lambda z: ring(z, 8 ** 0.5, 0.5 ** 0.5, lambda x, y: (x - 2) / 0.6, lambda x, y: torch.sin(x) / 0.5,
                         lambda x, y: (x + y + 2.5) / 0.6),
    "u3": lambda z: waves(z, 0.35, lambda x: 3 * torch.exp(-0.5 * ((x - 1) / 0.6) ** 2)),
    "u4": lambda z: waves(z, 0.4, lambda x: 3 * torch.sigmoid((x - 1) / 0.3)),
    "loggamma": lambda z: (0.5 * z - z.exp()).sum(-1),  # of the logarithm of a Gamma(1/2) variable
}


def log_normaliser(target, d):
    """log of the integral of exp(target), by the trapezoid rule on [-10, 10]^2, or on [-60, 60]."""
    axis = torch.linspace(-10, 10, 1001).double() if d == 2 else torch.linspace(-60, 60, 100_001).double()
    return (target(torch.cartesian_prod(*[axis] * d).view(-1, d)).logsumexp(0) + d * (axis[1] - axis[0]).log()).item()
