"""Predicts where people look in very many images: a row an image in Parquet files, or a map each.

python jobs/predict.py FOLDER OUT --model runs/gaze-...
python jobs/predict.py s3://BUCKET/images s3://BUCKET/predictions --model s3://BUCKET/runs/gaze-... --accelerator gpu
"""

from acw.cli import run
from acw.pipeline.predict_many import main

if __name__ == "__main__":
    run(main)
