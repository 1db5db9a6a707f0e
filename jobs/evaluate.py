"""Scores a finished model on every image of a data set.

python jobs/evaluate.py --model runs/gaze-gaze-0123456789abcdef --dataset FOLDER --out scores.json
python jobs/evaluate.py --model models:/acw@champion --dataset synthetic --out scores.json   # on a CPU
python jobs/evaluate.py --model RUN --dataset FOLDER --out scores.json --maps OTHER=DIR --kind saliency
"""

from acw.cli import run
from acw.pipeline.evaluate import main

if __name__ == "__main__":
    run(main)
