"""Fuses trained heads under learned category weights, scores the held-out images, registers the model in MLflow.

python jobs/aggregate.py gaze --dataset FOLDER  # after jobs/train.py with the same arguments
python jobs/aggregate.py demo                   # the embedded displays, on a CPU
"""

from acw.cli import run
from acw.pipeline.aggregate import main

if __name__ == "__main__":
    run(main)
