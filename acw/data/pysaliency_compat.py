"""pysaliency on any NumPy: it is the field's reference, and older than NumPy 2."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import numpy as np

# What pysaliency 0.2.22 calls, and what NumPy 2 calls it: `to_hdf5`; AUC and sAUC; `create_subset` and folds.
_RENAMED = {"string_": "bytes_", "trapz": "trapezoid", "in1d": "isin"}


def load() -> ModuleType:
    """The module `pysaliency`, after giving NumPy back the names that it uses. The first call takes seconds."""
    for old, new in _RENAMED.items():
        if not hasattr(np, old):
            setattr(np, old, getattr(np, new))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        return importlib.import_module("pysaliency")
