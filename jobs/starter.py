"""Makes the package's starter model of a finished run (`make starter`).

python jobs/starter.py RUN --dataset FOLDER
"""

from acw.cli import run
from acw.pipeline.starter import main

if __name__ == "__main__":
    run(main)
