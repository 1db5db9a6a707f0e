"""Computes the backbones' features of a data set, once; what is there already is kept.

python jobs/extract.py gaze --dataset FOLDER
python jobs/extract.py demo                     # the embedded displays, on a CPU
"""

from __future__ import annotations

from collections.abc import Sequence

from acw.cli import Job, parse, run


def extract(job: Job) -> None:
    """Fills the feature stores and notes in the run's folder which they are."""
    from acw import features
    from acw.storage import write_json

    stores = {}
    for backbone in job.recipe.backbone_values:
        store = features.extract(
            job.root,
            backbone,
            job.dataset.stimuli,
            job.dataset.stimuli_fingerprint,
            job.recipe.workers,
            job.recipe.accelerator,
        )
        stores[backbone.name] = store.folder.name
        print(f"features {backbone.name}: {store.images} images in {store.folder}", flush=True)
    write_json(job.folder / "features.json", stores)


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__.splitlines()[0])
    from acw.cluster import connect

    connect()
    extract(job)


if __name__ == "__main__":
    run(main)
