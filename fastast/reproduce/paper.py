"""The numbers that the FastAST paper (arXiv 2406.07676) prints, to be shown beside our own.

Hardware, batch and precision behind the speeds are not given there. What the tables disagree about
is copied as it stands: the accuracies of Table 2's FastAST are the mAPs of Table 1's FastAST (Inf).
"""

from __future__ import annotations

R = (0, 5, 10, 15, 20, 25, 30, 35, 40)

# Data set -> variant -> percent at each r, and "speed": samples a second at each r.
TABLE1: dict[str, dict[str, tuple[float, ...]]] = {
    "ESC-50": {
        "plain": (95.6, 95.2, 95.1, 94.9, 94.2, 93.1, 92.4, 91.8, 90.2),
        "merged": (94.7, 94.5, 94.4, 94.3, 94.3, 93.7, 93.4, 93.1, 92.9),
        "speed": (65, 75, 85, 95, 110, 120, 125, 140, 150),
    },
    "Speech Commands V2": {
        "plain": (98.1, 98.1, 97.9, 97.4, 97.2, 96.3, 95.2, 94.5, 93.3),
        "merged": (97.8, 97.7, 97.5, 97.5, 97.4, 97.1, 96.8, 96.6, 96.4),
        "speed": (340, 380, 410, 455, 475, 490, 512, 540, 580),
    },
    "balanced AudioSet": {
        "plain": (38.4, 38.2, 37.7, 37.7, 37.5, 37.9, 37.2, 38.1, 36.0),
        "merged": (38.2, 38.1, 37.9, 37.8, 37.6, 37.5, 37.3, 37.1, 36.9),
        "speed": (55, 59, 60, 62, 65, 68, 70, 74, 80),
    },
}

# Balanced AudioSet: variant -> mAP, and variant + "_accuracy".
TABLE2: dict[str, tuple[float, ...]] = {
    "merged": (37.3, 38.7, 37.2, 37.1, 38.4, 37.0, 36.4, 36.5, 37.1),
    "transformer": (42.8, 42.4, 40.1, 40.6, 42.2, 40.8, 40.3, 38.7, 37.4),
    "cnn": (43.2, 44.6, 43.1, 43.3, 43.7, 42.1, 41.3, 38.7, 39.4),
    "merged_accuracy": (38.4, 38.2, 37.7, 37.7, 37.5, 37.9, 37.2, 38.1, 36.0),
    "transformer_accuracy": (39.2, 38.3, 37.4, 37.1, 37.8, 34.8, 35.9, 35.6, 35.9),
    "cnn_accuracy": (41.4, 39.9, 38.6, 39.0, 40.8, 37.1, 36.7, 36.1, 36.9),
    "speed": (55, 59, 60, 62, 65, 68, 70, 74, 80),
}


def published(table: int, dataset: str, variant: str) -> dict[int, float]:
    """The paper's percentages by r; empty where it has none.

    Args:
        table: 1 or 2.
        dataset: As the paper calls it.
        variant: `"plain"` (merging at inference only), `"merged"` (in training too), or in Table 2
            `"transformer"` and `"cnn"` (the teacher); `"speed"` for samples a second.
    """
    if table == 2:
        return dict(zip(R, TABLE2.get(variant, ()), strict=False))
    return dict(zip(R, TABLE1.get(dataset, {}).get(variant, ()), strict=False))
