"""Computes the backbones' features of a data set, once; what is there already is kept.

python jobs/extract.py gaze --dataset FOLDER
python jobs/extract.py demo                     # the embedded displays, on a CPU
"""

from acw.cli import run
from acw.pipeline.extract import main

if __name__ == "__main__":
    run(main)
