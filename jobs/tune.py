"""Searches a space of recipe fields with Ray Tune; writes the best as a file that `acw run --overlay FILE` takes.

python jobs/tune.py gaze_small --dataset FOLDER --space sigma_lr --samples 32
python jobs/tune.py demo --samples 4 --max-epochs 2     # the embedded displays, on a CPU
"""

from acw.cli import run
from acw.pipeline.search import main

if __name__ == "__main__":
    run(main)
