"""Fuses trained heads under learned category weights, scores the held-out images, registers the model in MLflow."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from acw.cluster import event_log
from acw.fusion import weights
from acw.fusion.adaptation import KERNELS
from acw.model import assembly, files
from acw.pipeline import job
from acw.pipeline.job import Job, parse
from acw.storage.addresses import shown
from acw.storage.files import csv_text, fetch, write_atomic, write_json
from acw.training import checkpoints, training_set

if TYPE_CHECKING:
    from acw.evaluation.gold_standard import GoldStandard
    from acw.evaluation.scoring import StoredDensities
    from acw.features.joined import Store
    from acw.fusion.adaptation import Adaptation
    from acw.fusion.adaptation_fit import FittedAdaptation
    from acw.fusion.category_weights import CategoryWeights
    from acw.fusion.out_of_fold import OutOfFold
    from acw.fusion.weights import Fusion
    from acw.heads.center_bias import CenterBias
    from acw.model.model import Model
    from acw.report.examples import Predictions
    from acw.training.bank import Bank, BankState
    from acw.training.joint import SystemState

EXAMPLES = 4  # categories in the picture
ALL = "all images"  # the row of category_adaptation.csv after those of the categories


@job.stage("aggregation")
def aggregate(job: Job) -> None:
    """Leaves the model, its weights and its scores in the run's folder and in MLflow."""
    from acw.tracking import mlflow_store, runs

    recipe, folder = job.recipe, job.folder
    stores = job.stores()
    banks, systems = checkpoints.trained(recipe, folder)
    uri = mlflow_store.ready(job.root, job.tracking_uri)
    record = json.loads(fetch(folder / "recipe.json").read_text(encoding="utf-8"))
    with runs.under_way(uri, folder, recipe, record):
        evaluation = _evaluate(job, stores, banks, systems, record)
        event_log.event("registering")
        registration = runs.log_run(uri, folder, recipe, banks, evaluation, systems)
    print(f"registered: acw version {registration.version}, {registration.alias} ({registration.reason})", flush=True)
    # Last: it says that the run is finished.
    write_json(folder / "registration.json", dataclasses.asdict(registration) | {"store": shown(uri)})


def _evaluate(
    job: Job, views: dict[str, Store], banks: dict[Bank, BankState], systems: list[SystemState], record: dict[str, Any]
) -> dict[str, Any]:
    """Leaves model, weights, scores and report in the run's folder; the content of evaluation.json."""
    import ray

    from acw.cluster.tasks import submit
    from acw.evaluation.summary import HEADLINES, per_image_csv, summarise
    from acw.features import joined
    from acw.fusion import out_of_fold
    from acw.pipeline import found_categories
    from acw.pipeline.refit import refit
    from acw.report import figures
    from acw.report.examples import Predictions
    from acw.tracking import model_card

    recipe, dataset, split, folder = job.recipe, job.dataset, job.split, job.folder
    stores, heads = list(views.values()), assembly.heads_by_fold(recipe, banks, systems)
    # It takes one core for long, beside what follows, as the classifier does; asked for where it is needed.
    center_bias = training_set.kde_of(dataset, job.heads_split.development)
    shared = ray.put(dataset)
    people = _gold_standard(job, shared, center_bias)
    training = training_set.training_set(dataset, job.heads_split, recipe)
    predictions = out_of_fold.out_of_fold(recipe, dataset, training, split, heads, stores)
    if recipe.categories == "auto":
        job = found_categories.found(job, predictions, stores)
        dataset = job.dataset
        shared = ray.put(dataset)
    classifier = submit(out_of_fold.fit_classifier, shared, split, stores)
    fitted = _weights(job, predictions, systems)
    standards = joined.read_standards(folder / joined.FILE)
    model = assembly.assemble(
        recipe, dataset, job.heads_split, heads, center_bias, classifier(), fitted, standards, record
    )
    if not recipe.refit:
        _save(folder, model)
    _write_weights(folder, model, fitted.category)
    if fitted.adaptation:
        numbers = fitted.adaptation
        write_adaptation(folder, model.categories, model.components, numbers.adaptation, numbers.area.tolist())
    write_atomic(folder / "out_of_fold.csv", _out_of_fold_csv(job, predictions, fitted.left_out(predictions)))

    gold = people()
    stored = _stored(job, model, stores)
    scores = _held_out_scores(job, stored, fitted, gold)
    write_atomic(folder / "per_image.csv", per_image_csv(dataset, scores))
    refitted = refit(job, model, banks, views) if recipe.refit else None
    evaluation: dict[str, Any] = {
        "dataset": dataset.summary() | {"scored": "held-out images", "images_scored": len(scores)},
        **summarise(dataset, scores, recipe.seed),
        "weights": {
            "prior_strength": _json_number(fitted.category.strength),
            "crossvalidation_nats": {str(s): v for s, v in fitted.category.crossvalidation.items()},
            "global": dict(zip(model.names, fitted.category.global_weights.tolist(), strict=True)),
        },
        **({"adaptation": _adaptation(fitted.adaptation)} if fitted.adaptation else {}),
        "headline": HEADLINES[model.adaptation is not None],
        **({"gold_standard": gold.described()} if gold else {}),
        **({"refit": {"images": len(dataset.stimuli)}} if refitted else {}),
        "category_inference": {"out_of_fold_accuracy": model.classifier.accuracy, "categories": len(model.categories)},
        "provenance": record,
    }
    if refitted:
        _save(folder, refitted)
    if recipe.heads and (seen := _seen_by_heads(job)):
        evaluation["doubts"] |= {evaluation["headline"]: seen}
    write_json(folder / "evaluation.json", evaluation)
    write_atomic(folder / "model" / model_card.FILE, model_card.write(recipe, evaluation))
    curves = figures.head_curves({bank: state.history for bank, state in banks.items()})
    curves |= figures.joint_curves([system.history for system in systems])
    _report(job, Predictions(dataset, stored, gold), curves)
    return evaluation


def _seen_by_heads(job: Job) -> str:
    """Why the scores of another model's heads are not to be believed: they have learned from these very images."""
    from acw.model.description import describe
    from acw.storage.addresses import local

    trained_on = describe(local(job.recipe.heads))["provenance"]["dataset"]
    if trained_on is None or trained_on["fingerprint"] != job.dataset.fingerprint:
        return ""
    return f"the heads of {job.recipe.heads} were trained on images of this very data set; see that model's own scores"


def _save(folder: Path, model: Model) -> None:
    """The model as a folder, and as a plain PyTorch file."""
    from acw.features.backbone import load_backbone

    networks = [load_backbone(backbone) for backbone in model.backbones]
    files.save(model, folder / "model", networks)
    state = files.state_dict(model, networks)
    write_atomic(folder / "model.pth", lambda temporary: torch.save(state, temporary))


def _weights(job: Job, predictions: OutOfFold, systems: Sequence[SystemState]) -> Fusion:
    """The weights of the mixture, as the recipe says."""

    recipe, dataset = job.recipe, job.dataset
    if recipe.joint:
        print(f"weights: learned with the heads, by {recipe.folds} systems", flush=True)
        return weights.joint_weights(dataset, job.split, predictions, systems)
    if not recipe.category_weights:
        return weights.even_weights(dataset, predictions)
    fitted = weights.fit_weights(dataset, predictions, recipe.seed)
    print(f"weights: prior strength {fitted.category.strength} images, chosen by cross-validation", flush=True)
    assert fitted.adaptation is not None
    gain, use = fitted.adaptation.gain.mean() / math.log(2), "used" if fitted.adaptation.pays else "not used"
    print(f"adaptation: {gain:+.4f} bit on images that it was not fitted on, so it is {use}", flush=True)
    return fitted


def _gold_standard(job: Job, dataset: Any, center_bias: CenterBias) -> Callable[[], GoldStandard | None]:
    """Begins to fit how well people predict people; dataset: the job's, as the cluster has it."""
    from acw.cluster.tasks import submit
    from acw.evaluation import gold_standard

    if gold_standard.has_subjects(job.dataset, range(len(job.dataset.stimuli))):
        adaptive = job.recipe.gold_standard == "adaptive"
        return submit(gold_standard.fit, dataset, job.split.development, center_bias, adaptive)
    print("no gold_standard: it needs two named subjects for every image", flush=True)
    return lambda: None


def _stored(job: Job, model: Model, stores: list) -> StoredDensities:
    """The model's densities of images, from their features, and from their mirror images' where the recipe says so."""
    from acw.evaluation.scoring import StoredDensities

    sizes = [stimulus.size for stimulus in job.dataset.stimuli]
    if not job.recipe.mirrored:
        return StoredDensities(model, stores, sizes)
    places = {int(index): place for place, index in enumerate(job.split.held_out)}
    return StoredDensities(model, stores, sizes, list(job.stores(mirrored=True).values()), places)


def _held_out_scores(job: Job, stored: StoredDensities, fitted: Fusion, gold: GoldStandard | None) -> dict:
    from acw.cluster.costs import note
    from acw.evaluation.distributed import score_images
    from acw.evaluation.scoring import Scoring

    dataset, held_out = job.dataset, job.split.held_out
    scoring = Scoring(
        dataset=dataset,
        among=held_out,
        densities=stored,
        model=stored.model,
        by_image=fitted.controls,
        adaptation=fitted.adaptation.adaptation if fitted.adaptation else None,
        shuffled=fitted.shuffled,
        labelled=True,
        gold_standard=gold,
        # To show what the combination of Galván's ACW costs, where its systems are trained.
        log_mixture=job.recipe.joint and job.recipe.category_weights,
    )
    scores, cost = score_images(scoring, held_out)
    note(job.folder, "scores", cost)
    return scores


def _report(job: Job, predictions: Predictions, curves: dict[str, list[np.ndarray]]) -> None:
    """report.html, and the first held-out image of some categories as a picture."""
    from acw.report import figures, page, pictures

    dataset, held_out = job.dataset, [job.dataset.stimuli[index] for index in job.split.held_out]
    # Of categories that were found, one may have no image that is held out.
    first = {stimulus.category: stimulus.name for stimulus in reversed(held_out)}
    rows = [predictions(first[name]) for name in [name for name in dataset.categories if name in first][:EXAMPLES]]
    figures.save(pictures.examples_figure(rows), job.folder / "examples.png")
    page.write(job.folder, predictions, curves)


def _write_weights(folder: Path, model: Model, weights: CategoryWeights) -> None:
    """The weights, and how they came about: per step of the fit, or epoch of the joint training, as CSV and NPY."""
    write_atomic(folder / "category_weights.csv", _weights_csv(model.categories, model.names, weights))
    write_atomic(folder / "category_weights_history.csv", _history_csv(model.categories, model.names, weights))
    longest = max(map(len, weights.history))
    steps = [np.concatenate([steps, np.repeat(steps[-1:], longest - len(steps), 0)]) for steps in weights.history]
    array = io.BytesIO()
    np.save(array, np.stack(steps, 1))  # (steps, categories, backbones)
    write_atomic(folder / "category_weights_history.npy", array.getvalue())


def write_adaptation(
    folder: Path, categories: Sequence[str], components: Sequence[str], numbers: Adaptation, area: Sequence[float]
) -> None:
    """The numbers of each category and, in the row `all`, of all images together; see `acw.fusion.adaptation`.

    area: of each category, as `FittedAdaptation` has it.
    """
    header = ["category", "temperature", "center_bias", "own_center_bias", "area"]
    header += [f"weight:{name}" for name in components] + [f"blur:{width:g}" for width in KERNELS]
    names, areas = [*categories, ALL], [*area, 1.0]
    columns = numbers.temperature, numbers.center_bias_weight, numbers.own_weight, areas
    rows = [
        [name, *(f"{value:.6f}" for value in (*each, *weights, *kernels))]
        for name, *each, weights, kernels in zip(names, *columns, numbers.weights, numbers.kernels, strict=True)
    ]
    write_atomic(folder / "category_adaptation.csv", csv_text(header, rows))


def _weights_csv(categories: list[str], backbones: list[str], weights: Any) -> str:
    rows = []
    for c, category in enumerate(categories):
        for b, backbone in enumerate(backbones):
            values = (weights.weights[c, b], weights.low[c, b], weights.high[c, b])
            rows.append([category, backbone, *(f"{value:.6f}" for value in values)])
    return csv_text(["category", "backbone", "weight", "low", "high"], rows)


def _history_csv(categories: list[str], backbones: list[str], weights: Any) -> str:
    rows = []
    for category, steps in zip(categories, weights.history, strict=True):
        for step, values in enumerate(steps):
            rows += [[category, str(step), b, f"{value:.6f}"] for b, value in zip(backbones, values, strict=True)]
    return csv_text(["category", "step", "backbone", "weight"], rows)


def _out_of_fold_csv(job: Job, predictions: Any, left_out: np.ndarray) -> str:
    """IG of the mixture on images that neither its heads nor its weights were fitted on."""
    gain = (left_out - predictions.baseline) / math.log(2)
    stimuli = [job.dataset.stimuli[index] for index in predictions.images]
    rows = [[s.name, s.category, f"{value:.6f}"] for s, value in zip(stimuli, gain, strict=True)]
    return csv_text(["image", "category", "IG"], rows)


def _adaptation(fitted: FittedAdaptation) -> dict[str, Any]:
    """What evaluation.json says of it: the gain, in bits, is out of fold."""
    return {
        "prior_strength": _json_number(fitted.strength),
        "crossvalidation_nats": fitted.crossvalidation,
        "gain_bits": float(fitted.gain.mean()) / math.log(2),
        "used": fitted.pays,
    }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__)
    from acw.cluster.joining import connect

    connect()
    aggregate(job)
