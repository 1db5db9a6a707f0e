"""Reproduces Galván's ACW (2024): its systems and DeepGaze IIE (2021), both its tables, with paired intervals.

python jobs/reproduce.py --dataset FOLDER --backbones lite             # small backbones: a laptop is enough
python jobs/reproduce.py --dataset CAT2000 --weights shapenet_c=deepgaze2e:deepgaze2e.pth
python jobs/reproduce.py --backbones lite0,lite1 --max-epochs 2 --joint-max-epochs 2    # the built-in displays
"""

from acw.cli import run
from acw.pipeline.reproduce import main

if __name__ == "__main__":
    run(main)
