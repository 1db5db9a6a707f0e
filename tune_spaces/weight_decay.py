"""How much the readout's weights should decay, and how fast to learn then: decay is applied times the rate.

acw search gaze_small --dataset FOLDER --space weight_decay --samples 32

Cost: as `sigma_lr`, a bank mixes both. Not run yet. Single heads gained nothing from decays of 0.3 and 1.0 under half a
cosine (docs/log.md, 2026-11-25).
"""

from __future__ import annotations

from ray import tune

SPACE = {
    "weight_decay": tune.loguniform(1e-3, 3),  # times the rate, a step
    "learning_rate": tune.loguniform(5e-4, 5e-3),
}
