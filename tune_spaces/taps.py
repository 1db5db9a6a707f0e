"""Which layers heads should read: DeepGaze IIE's own, with one of an earlier stage too, or only the last stage's.

acw search gaze_small --dataset FOLDER --space taps --samples 6 --heads-per-worker 3

Cost: features of every set of layers are extracted first, and kept: three times the bytes and the extraction. A
population has one set, and rates of its own, since more layers may want slower ones. Not run yet.
"""

from __future__ import annotations

from ray import tune

SPACE = {
    "taps": tune.choice(["own", "earlier", "deepest"]),
    "learning_rate": tune.loguniform(7e-4, 5e-3),
}
