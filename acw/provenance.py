"""What a result was made with: recipe, versions, commit, machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from acw.recipes import Recipe

PACKAGES = ("acw", "torch", "timm", "ray", "mlflow", "numpy", "pysaliency", "safetensors", "scikit-learn", "scipy")


def provenance(recipe: Recipe) -> dict[str, Any]:
    """The recipe with all its fields, the seed, versions of Python and packages, the git commit and the command."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "seed": recipe.seed,
        "command": " ".join(sys.argv),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The git commit of this code, with `+changes` where files differ from it; `unknown` outside a checkout.

    A job that was submitted to a cluster has no checkout there; ACW_COMMIT names its commit then.
    """
    if given := os.environ.get("ACW_COMMIT"):
        return given
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
