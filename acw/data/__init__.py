"""Images with the fixations of people who looked at them: readers, the built-in displays, and the split into folds."""

from acw.data.dataset import Dataset, Stimulus
from acw.data.folds import Split, split
from acw.data.loading import load_dataset

__all__ = ["Dataset", "Split", "Stimulus", "load_dataset", "split"]
