"""DeepGaze IIE with adaptive category weighting: predicts, as a probability density, where people look in an image."""

import os

# Before torch comes, whose OpenMP reads it once: for how long a thread that waits for another keeps its core. Its own
# choice, a millisecond and more, costs a prediction five times its time as soon as another program, or Ray's workers,
# have one of two cores; this costs nothing where they are free (docs/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from acw.tracking.load import load

__all__ = ["load"]
