"""The first questions of Galván's ACW: how wide to smooth, whether to learn the width, and how fast to learn.

acw search gaze_small --dataset FOLDER --space sigma_lr --samples 32

Cost: all three are fields that a bank mixes, so a population of 15 is one pass over the features an epoch; two thirds
of it stop after 3 epochs. On `gaze` (959 photographs, four small backbones, populations of 8) 23 configurations took 10
minutes on 2 cores beside other work.

Found there: nothing better than 16 px, learned, at 2e-3, which stay the defaults (docs/log.md, 2026-11-26). 14 px at
2.6e-3 and 18 px at 2.0e-3 are within 0.002 bit; 10 and 22 px, kept fixed, lose 0.008 and 0.013; over 40 px it is 0.1 to
0.35. The width matters nine times as much as the rate. What stops after 3 epochs favours fast rates: those below 7e-4
were not given the time to catch up.
"""

from __future__ import annotations

from ray import tune

SPACE = {
    "sigma": tune.loguniform(4, 64),  # image px
    "learn_sigma": tune.choice([True, False]),
    "learning_rate": tune.loguniform(3e-4, 1e-2),
}
