"""The whole job: extract, train, aggregate, score, register. What is there already is kept; a rerun goes on.

python jobs/pipeline.py demo                                # the embedded displays, on a CPU, in minutes
python jobs/pipeline.py gaze --dataset FOLDER               # your images and fixations, small backbones
python jobs/pipeline.py gaze_small --dataset FOLDER --tune sigma_lr --samples 32    # searches, trains with the best
ray job submit --address URL --working-dir . -- python jobs/pipeline.py cat2000 --dataset D --root R
"""

from acw.cli import run
from acw.pipeline.whole import main

if __name__ == "__main__":
    run(main)
