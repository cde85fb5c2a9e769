"""What is fitted to frozen features and to predictions. N images, S draws of the weights, D features, K classes."""
import torch
import torch.nn.functional as F


def knn_accuracy(bank, bank_labels, queries, labels):
    """A vote of the 200 nearest by cosine, weighted by exp(cosine / 0.1)."""
    cosine, nearest = (F.normalize(queries.float()) @ F.normalize(bank.float()).T).topk(200)    # (N, 200)
    votes = torch.zeros(len(queries), 10, device=bank.device).scatter_add(1, bank_labels[nearest], (cosine / 0.1).exp())
    return (votes.argmax(1) == labels).float().mean().item()


@torch.enable_grad()
def fit_probe(draws, labels):
    """Features -> logits, by the linear layer of least cross-entropy + 5e-5 |W|^2 on (S, N, D) draws, standardised."""
    mean, std = draws.float().mean((0, 1)), draws.float().std((0, 1)) + 1e-6
    x, y = ((draws.float() - mean) / std).flatten(0, 1), labels.repeat(len(draws))
    W = torch.zeros(10, x.shape[1], device=x.device, requires_grad=True)
    b = torch.zeros(10, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, W, b), y) + 5e-5 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda h: F.linear((h.float() - mean) / std, W, b)


def temperature_scale(probs, val_probs, val_labels):
    """probs at the temperature, of 141 from 0.2 to 5, with the least NLL on the validation images."""
    temperatures = torch.logspace(-0.7, 0.7, 141, device=probs.device)
    nll = [F.cross_entropy(val_probs.clamp(min=1e-12).log() / t, val_labels) for t in temperatures]
    return (probs.clamp(min=1e-12).log() / temperatures[torch.stack(nll).argmin()]).softmax(-1)
