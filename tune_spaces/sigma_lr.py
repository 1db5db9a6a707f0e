"""The paper's first questions: how wide to smooth, whether to learn the width, and how fast to learn.

python jobs/tune.py gaze --dataset FOLDER --space sigma_lr --samples 32

Cost: all three are fields that a bank mixes, so a population of 15 is one pass over the features an epoch; two thirds
of it stop after 3 epochs.
"""

from __future__ import annotations

from ray import tune

SPACE = {
    "sigma": tune.loguniform(4, 64),  # image px
    "learn_sigma": tune.choice([True, False]),
    "learning_rate": tune.loguniform(3e-4, 1e-2),
}
