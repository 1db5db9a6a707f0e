"""Trains the heads of a recipe on extracted features; goes on where an interrupted training stopped.

python jobs/train.py gaze --dataset FOLDER      # after jobs/extract.py with the same arguments
python jobs/train.py demo                       # the embedded displays, on a CPU
"""

from acw.cli import run
from acw.pipeline.train import main

if __name__ == "__main__":
    run(main)
