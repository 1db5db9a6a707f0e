"""The paper's first questions: how wide to smooth, whether to learn the width, and how fast to learn.

python jobs/tune.py gaze --dataset FOLDER --space sigma_lr --samples 16

Cost: a trial trains one head per backbone on one fold; ASHA stops most after a few epochs.
"""

from __future__ import annotations

from ray import tune

SPACE = {
    "sigma": tune.loguniform(4, 64),  # image px
    "learn_sigma": tune.choice([True, False]),
    "learning_rate": tune.loguniform(3e-4, 1e-2),
}
