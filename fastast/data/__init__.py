"""Labelled audio for training and evaluation.

A data set is *listed* (`list_clips`: which clips, which classes, which split), then *loaded*
(`AudioDataset.load`: decoded, mono, at one sample rate; kept in memory, on disk, or not at all).
Batches are gathered by index, so the order of the data is a pure function of a seed and a step,
which is what makes a resumed training exact.
"""

from .clips import Clip, Listing
from .dataset import AudioDataset, Batch
from .listing import list_clips
from .sampling import balanced_weights, epoch_order, missing_classes

__all__ = [
    "AudioDataset",
    "Batch",
    "Clip",
    "Listing",
    "balanced_weights",
    "epoch_order",
    "list_clips",
    "missing_classes",
]
