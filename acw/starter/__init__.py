"""The model that acw predicts with where none is named, in this folder (pipeline/starter.py makes it)."""

from pathlib import Path

FOLDER = Path(__file__).parent
CHECKED = "checked.json"  # images by hash, and what the model scores on them
