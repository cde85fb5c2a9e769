"""How good and how sure predictions are. N images, S draws of the weights, K classes; probs (N, K)."""
import torch
import torch.nn.functional as F

from data.corruptions import CORRUPTIONS


def calibration(probs, labels):
    """(3, 15): share of the images, mean confidence, accuracy, in each of 15 equal bins of the largest probability."""
    confidence, guess = probs.max(1)
    values = torch.stack([torch.ones_like(confidence), confidence, (guess == labels).float()])
    sums = torch.zeros(3, 15, device=probs.device).index_add(1, (15 * confidence).long().clamp(max=14), values)
    return torch.stack([sums[0] / len(probs), *(sums[1:] / sums[0].clamp(min=1))])


def measure(probs, labels):
    """Accuracy; NLL in nats; Brier score sum_k (p_k - y_k)^2, 0 to 2; ECE, the mean of |accuracy - confidence|, in 15
    bins of equal width and, adaptive, in 15 of equally many images."""
    share, confidence, accuracy = calibration(probs, labels)
    largest, guess = probs.max(1)
    gaps = ((guess == labels).float() - largest)[largest.argsort()].tensor_split(15)
    return dict(linear_acc=(share * accuracy).sum().item(), ece=(share * (accuracy - confidence).abs()).sum().item(),
                ece_adaptive=sum(gap.sum().abs() for gap in gaps).item() / len(probs),
                brier=(probs - F.one_hot(labels, probs.shape[1])).square().sum(1).mean().item(),
                nll=F.nll_loss(probs.clamp(min=1e-12).log(), labels).item())


def measure_all(predictions, labels):
    """The metrics of each condition and variant; each corruption's mean over its five severities, and the mean over all
    corruptions; of images of no class ("strange_"), how well a low confidence tells them from clean ones."""
    metrics = {f"{condition}{key}{variant}": value for (condition, variant), probs in predictions.items()
               if not condition.endswith("strange_") for key, value in measure(probs, labels).items()}
    for key in [key for key in metrics if "_5_" in key]:
        metrics[key.replace("_5_", "_")] = sum(metrics[key.replace("_5_", f"_{i}_")] for i in range(1, 6)) / 5
    for key in ("linear_acc", "brier", "ece"):
        found = [metrics[f"{name}_{key}"] for name in CORRUPTIONS if f"{name}_{key}" in metrics]
        metrics |= {f"corrupted_{key}": sum(found) / len(found)} if len(found) > 1 else {}
    for condition, variant in [key for key in predictions if key[0].endswith("strange_")]:
        clean, strange = (predictions[prefix, variant].amax(1) for prefix in (condition[:-8], condition))
        metrics[f"{condition}auroc{variant}"] = auroc(clean, strange)
    return metrics


def auroc(high, low):
    """The share of pairs, one of each, in which `high` has the higher value; a tie counts half."""
    low = low.sort().values
    below, upto = (torch.searchsorted(low, high, right=right).double() for right in (False, True))
    return ((below + upto).mean() / (2 * len(low))).item()


def predictive_std(draws):
    """{NAME: (N,)}: the std over draws (S, N, K) of the predicted class's probability, its log, the std of the logit,
    and the mean over all classes of the std."""
    guess = draws.mean(0).argmax(1)[None, :, None].expand(len(draws), -1, -1)
    p = draws.gather(2, guess)[..., 0]                                                          # (S, N)
    return dict(std=p.std(0), log_std=p.std(0).clamp(min=1e-7).log(), logit_std=p.logit(1e-6).std(0),
                classes_std=draws.std(0).mean(1))


def gaussianity(samples):
    """Of each {NAME: (N,)}: moments, and how near to the Gaussian of the same mean and std (sd): Kolmogorov-Smirnov
    distance (ks), R^2 of the Q-Q plot."""
    found = {}
    for name, x in samples.items():
        z = ((x - x.mean()) / x.std()).sort().values
        rank = (torch.arange(len(z), device=z.device) + 0.5) / len(z)
        shape = dict(mean=x.mean(), sd=x.std(), skewness=z.pow(3).mean(), kurtosis=z.pow(4).mean() - 3,
                     ks=(torch.special.ndtr(z) - rank).abs().max() + 0.5 / len(z),
                     qq_r2=correlation(z, torch.special.ndtri(rank)).square())
        found |= {f"predictive_{name}_{key}": float(value) for key, value in shape.items()}
    return found


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


def compare_stds(a, b):
    """gaussianity of a - b, both by predictive_std, image by image; Pearson's and Spearman's (of ranks) correlation."""
    stds = [one["std"] for one in (a, b)]
    ranks = [std.argsort().argsort().float() for std in stds]
    found = dict(predictive_std_pearson=correlation(*stds).item(), predictive_std_spearman=correlation(*ranks).item())
    return found | gaussianity({name: a[name] - b[name] for name in a})
