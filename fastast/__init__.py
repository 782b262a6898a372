"""FastAST: Audio Spectrogram Transformers made fast by merging redundant tokens.

Importing this package initialises no GPU, compiles nothing and needs no optional library.
"""

from __future__ import annotations

from fastast.adapters import patch, patched, unpatch
from fastast.distill import cmkd_loss
from fastast.features import Fbank
from fastast.inference import optimize
from fastast.model import AST, ASTConfig

__version__ = "0.1.0"

__all__ = [
    "AST",
    "ASTConfig",
    "Fbank",
    "__version__",
    "cmkd_loss",
    "optimize",
    "patch",
    "patched",
    "unpatch",
]
