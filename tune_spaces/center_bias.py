"""How wide the centre bias that heads build on should be: its KDE's bandwidth. IG stays over the cross-validated one.

acw search gaze_small --dataset FOLDER --space center_bias --samples 12

Cost: heads of one bank share their centre bias, so each configuration is a population of its own, a pass over the
features an epoch: some ten times as much a configuration as `sigma_lr`. ASHA stops two thirds after 3 epochs. Not run
yet.
"""

from __future__ import annotations

from ray import tune

SPACE = {"center_bias_bandwidth": tune.loguniform(0.01, 0.3)}  # of the image's sides
