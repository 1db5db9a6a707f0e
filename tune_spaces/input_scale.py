"""How finely the backbones should see the images: the long side of their input, and the smoothing that goes with it.

acw search gaze_small --dataset FOLDER --space input_scale --samples 30 --heads-per-worker 5

Cost: features of each backbone at each of the five sizes are extracted first, and kept: for 959 images and the small
backbones some 20 GiB, and five times the extraction. A population has one size, so small ones try more of them.
`lite2_fine` sees 1.6 times what is given here. Not run yet.
"""

from __future__ import annotations

from ray import tune

SPACE = {
    "long_side": tune.choice([256, 320, 400, 512, 640]),  # px
    "sigma": tune.loguniform(8, 32),  # image px
}
