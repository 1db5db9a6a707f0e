"""Puts a local data set into S3, for `--dataset s3://BUCKET/PREFIX`: what its reader reads, and nothing else.

python jobs/stage.py CAT2000 s3://bucket/CAT2000
python jobs/stage.py FOLDER s3://bucket/data --fixations F.csv
"""

from acw.cli import run
from acw.pipeline.stage import main

if __name__ == "__main__":
    run(main)
