"""Computes the backbones' features of a data set, once; what is there already is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from acw.pipeline.job import MIRRORED, Job, parse, stage

if TYPE_CHECKING:
    from acw.cluster.costs import Cost
    from acw.data import Stimulus
    from acw.features.store import FeatureStore


@stage("features")
def extract(job: Job) -> None:
    """Fills the feature stores; leaves in the run's folder which they are, their constants, and what that cost."""
    from acw.cluster.costs import note
    from acw.data.dataset import MirrorImage
    from acw.storage.addresses import shown
    from acw.storage.checksums import fingerprint
    from acw.storage.errors import UserError
    from acw.storage.files import fetch, listing, write_json

    recipe, dataset = job.recipe, job.dataset
    path, trained = fetch(job.folder / "features.json"), bool(listing(job.folder / "banks"))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stores, cost = _fill(job, dataset.stimuli, dataset.stimuli_fingerprint, before)
    for name, store in stores.items():
        print(f"features {name}: {store.images} images in {shown(store.folder)}", flush=True)
    folders = {name: store.folder.name for name, store in stores.items()}
    if recipe.mirrored:
        print("features: of the held-out images' mirror images", flush=True)
        mirrored = [MirrorImage(**vars(dataset.stimuli[index])) for index in job.split.held_out]
        of_these = fingerprint([dataset.stimuli_fingerprint, "mirrored", job.split.hash])
        mirror_stores, more = _fill(job, mirrored, of_these, {})
        folders |= {MIRRORED + name: store.folder.name for name, store in mirror_stores.items()}
        cost = cost + more
    if before and trained and before != folders:
        raise UserError(
            f"{path}: a backbone's weights have changed since this run's heads were trained on the old ones; "
            f"bring those back, or delete {job.folder}"
        )
    _leave_constants(job, stores, trained)
    write_json(path, folders)
    note(job.folder, "features", cost)


def _leave_constants(job: Job, stores: dict[str, FeatureStore], trained: bool) -> None:
    """What standardises the views of several networks; where heads were trained by them, they stay as they are."""
    from acw.features import joined
    from acw.storage.addresses import local
    from acw.storage.errors import UserError
    from acw.storage.files import present

    recipe, path = job.recipe, job.folder / joined.FILE
    if not joined.parts_beside_others(recipe.views) or (trained and present(path)):
        return
    if trained:
        raise UserError(
            f"{path}: is missing, by which this run's heads were trained; bring it back, or delete {job.folder}"
        )
    if recipe.heads:
        from acw.model import files

        constants = files.load(local(recipe.heads)).standards
    else:
        constants = joined.standards(recipe.views, stores, job.heads_split.development)
    joined.write_standards(path, constants)


def _fill(
    job: Job, stimuli: Sequence[Stimulus], of_these: str, before: dict[str, str]
) -> tuple[dict[str, FeatureStore], Cost]:
    from acw.features import extraction, joined

    recipe = job.recipe
    return extraction.extract(
        job.root,
        recipe.backbone_values,
        stimuli,
        of_these,
        recipe.workers,
        recipe.accelerator,
        recipe.gpus_per_worker,
        joined.parts_beside_others(recipe.views),
        before,
    )


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__)
    from acw.cluster.joining import connect

    connect()
    extract(job)
