"""The rows of a comparison of several arms over several seeds, and their tables."""
import torch

from data.calibration import compare_stds, measure_all
from data.corruptions import CORRUPTIONS

COLUMNS = [  # of the tables
    dict(knn_acc="kNN %", linear_acc="linear %", nll="NLL", brier="Brier %", ece="ECE %", ece_scaled="scaled ECE %"),
    {"salt_and_pepper_linear_acc": "salt & pepper: linear %", "salt_and_pepper_brier": "Brier %",
     "salt_and_pepper_ece": "ECE %", "400_labels_linear_acc": "400 labels: linear %", "400_labels_ece": "ECE %",
     "strange_auroc": "strange images: AUROC %"},
    {"corrupted_linear_acc": "all corruptions: linear %", "corrupted_brier": "Brier %", "corrupted_ece": "ECE %"} |
    {f"{name}_ece": f"{name.replace('_', ' ')}: ECE %" for name in CORRUPTIONS if name != "salt_and_pepper"},
    dict(predictive_std_mean="predictive std: mean %", predictive_std_sd="std %", predictive_std_skewness="skewness",
         predictive_std_ks="KS distance %", predictive_std_qq_r2="Q-Q R²", predictive_logit_std_ks="of logits: KS %",
         predictive_logit_std_qq_r2="Q-Q R²", predictive_std_pearson="Pearson")]
T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
       2.179, 2.160, 2.145, 2.131, 2.120)  # Student's t, 97.5 %, for 1 to 17 seeds


def summarise(runs, labels):
    """Rows, mean and std over seeds, of the metrics of each arm, of BYOV's paired differences, of BYOL's seeds as an
    ensemble, and of differences between predictive stds, image by image."""
    found = {name: [metrics for metrics, _, _ in some] for name, some in runs.items()}
    stds = {name: [spread for _, _, spread in some] for name, some in runs.items() if some[0][2]}
    for name in [name for name in ("BYOL", "BYOL+noise") if {name, "BYOV"} <= found.keys()]:
        pairs = zip(found["BYOV"], found[name])
        found |= {f"BYOV - {name}": [{key: a[key] - b[key] for key in a if key in b} for a, b in pairs]}
    if len(members := [predictions for _, predictions, _ in runs.get("BYOL", [])]) > 1:
        mean = {key: torch.stack([one[key] for one in members]).mean(0) for key in members[0]}
        found[f"ensemble of {len(members)} BYOL"] = [measure_all(mean, labels)]
    pairs = {f"{name} less its next seed": zip(some, some[1:]) for name, some in stds.items() if len(some) > 1}
    if {"BYOV", "supervised BBB"} <= stds.keys():
        pairs["BYOV less supervised BBB"] = zip(stds["BYOV"], stds["supervised BBB"])
    found |= {name: [compare_stds(a, b) for a, b in some] for name, some in pairs.items()}
    rows = []
    for name, some in found.items():
        values = {key: torch.tensor([metrics[key] for metrics in some], dtype=torch.float64) for key in some[0]}
        rows.append(dict(name=name, seeds=len(some)) | {key: x.mean().item() for key, x in values.items()})
        if len(some) > 1:
            rows[-1] |= {f"{key}_std": x.std().item() for key, x in values.items()}
    return rows


def table(rows, tables_columns=COLUMNS):
    """Markdown: mean ± std over seeds; of a paired difference, mean ± half of its 95 % interval (Student's t)."""
    tables = []
    for columns in tables_columns:
        heads = {key: head for key, head in columns.items() if any(key in row for row in rows)}
        lines = ["| | " + " | ".join(heads.values()) + " |", "|---" * (len(heads) + 1) + "|"]
        for row in [row for row in rows if heads.keys() & row.keys()]:
            spread = T95[row["seeds"] - 1] / row["seeds"] ** 0.5 if " - " in row["name"] else 1
            cells = [row["name"]]
            for key, head in heads.items():
                scale, digits = (100, 2) if "%" in head else (1, 3)
                numbers = [row[k] * scale * factor for k, factor in ((key, 1), (f"{key}_std", spread)) if k in row]
                cells.append(" ± ".join(f"{number:.{digits}f}" for number in numbers))
            lines.append(f"| {' | '.join(cells)} |")
        if heads:
            tables.append("\n".join(lines))
    return "\n\n".join(tables)
