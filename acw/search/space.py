"""A search over recipe fields: its space, the populations that Optuna proposes, and what became of them.

All of it is in the search's folder, a file a population: written when it is proposed, and again when it has ended. So a
search goes on after any interruption, and its searcher knows what it knew.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.recipes import Recipe, derive
from acw.search.population import Outcome, Population
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_json
from acw.training.bank import HYPERPARAMETERS

if TYPE_CHECKING:
    import optuna

# Fields that a bank cannot mix and that act on a head's training all the same. Others decide about which heads there
# are and on which images, or nothing before the mixture.
COMMON = (
    *("long_side", "taps", "center_bias", "center_bias_bandwidth", "density_cell", "upsampling", "upsampling_steps"),
    *("batch_size", "lr_factor", "lr_patience", "min_learning_rate"),
)
# Of those, the ones that other features are needed for, extracted before the search: they take one of some values.
OF_FEATURES = ("long_side", "taps")


@dataclass(frozen=True)
class Space:
    """A named search space: its docstring, and Optuna's distributions by the recipe's fields."""

    name: str
    doc: str
    distributions: dict[str, optuna.distributions.BaseDistribution]

    @property
    def own(self) -> list[str]:
        """Fields in which the configurations of one bank may differ."""
        return [name for name in self.distributions if name in HYPERPARAMETERS]

    @property
    def common(self) -> list[str]:
        return [name for name in self.distributions if name not in HYPERPARAMETERS]

    @property
    def identity(self) -> dict[str, Any]:
        """Equal for spaces in which the same is searched; for JSON."""
        from optuna.distributions import distribution_to_json

        return {name: json.loads(distribution_to_json(one)) for name, one in self.distributions.items()}

    def recipes(self, recipe: Recipe) -> list[Recipe]:
        """The recipe, and those of the space that need other features than it."""
        choices = [[(name, value) for value in self._choices(name)] for name in self.common if name in OF_FEATURES]
        return [recipe, *(derive(recipe, dict(pairs)) for pairs in itertools.product(*choices) if pairs)]

    def _choices(self, name: str) -> Sequence[Any]:
        from optuna.distributions import CategoricalDistribution

        distribution = self.distributions[name]
        if not isinstance(distribution, CategoricalDistribution):
            raise UserError(f"search space {self.name}: '{name}' needs features of its own; give it as tune.choice")
        return distribution.choices


def load_space(folder: Path, name: str) -> Space:
    """SPACE of the folder's NAME.py; raises UserError where there is none, or one that cannot be searched."""
    spaces = {file.stem: file for file in sorted(folder.glob("*.py"))}
    if name not in spaces:
        raise UserError(f"no search space '{name}'; spaces are {', '.join(spaces)}")
    spec = importlib.util.spec_from_file_location(name, spaces[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        fields = dict(module.SPACE)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"search space {name}: {spaces[name]} cannot be read ({reason}); see those beside it") from None
    for field in fields:
        if field not in (*HYPERPARAMETERS, *COMMON):
            allowed = ", ".join((*HYPERPARAMETERS, *COMMON))
            raise UserError(f"search space {name}: '{field}' cannot be searched; fields are {allowed}")
    from ray.tune.search.optuna import OptunaSearch

    try:
        distributions = OptunaSearch.convert_search_space(fields)
    except ValueError as error:
        raise UserError(f"search space {name}: {error}") from None
    # Ray leaves out what is no sampler.
    if constant := [field for field in fields if field not in distributions]:
        option = f"--{constant[0].replace('_', '-')}"
        raise UserError(f"search space {name}: '{constant[0]}' is fixed; give it on the command line, {option}")
    return Space(name, (module.__doc__ or "").strip(), distributions)


@dataclass(frozen=True)
class Trialled:
    """A configuration, by its number in the search, and what became of it; number 0 is the recipe's own."""

    number: int
    fields: dict[str, Any]
    outcome: Outcome

    @property
    def ig(self) -> float:
        """Validation IG in bits per fixation; minus infinity where training went astray."""
        astray = self.outcome.ig is None or self.outcome.state == "diverged"
        return -math.inf if astray else self.outcome.ig  # type: ignore[return-value]  # not None


class Search:
    """Populations proposed and finished so far, those of earlier attempts too.

    Each configuration is a trial of Optuna's study, also where many are trained at once: the searcher learns from all
    of them, and not from each population's best. What was stopped early counts as pruned at its epoch.
    """

    def __init__(self, folder: Path, space: Space, size: int, samples: int, seed: int) -> None:
        """size: configurations a population at most; samples: how many are wanted in all, besides the recipe's own."""
        self.folder, self.space, self.samples, self.seed = folder, space, samples, seed
        self.size = 1 if not space.own else size
        self.proposed: dict[int, Population] = {}
        self.finished: dict[int, list[Outcome]] = {}
        for number in itertools.count():
            if not (path := fetch(self._path(number))).exists():
                break
            entry = json.loads(path.read_text(encoding="utf-8"))
            population = Population(number, entry["first"], entry["common"], entry["own"])
            self.proposed[number] = population
            if entry["outcomes"]:
                self.finished[number] = [Outcome(**outcome) for outcome in entry["outcomes"]]

    @property
    def waiting(self) -> list[Population]:
        """Proposed and not finished: the ones that an interruption left."""
        return [population for number, population in self.proposed.items() if number not in self.finished]

    @property
    def trialled(self) -> list[Trialled]:
        """All configurations that have ended, the best first."""
        ended = [
            Trialled(population.first + k, fields, self.finished[number][k])
            for number, population in self.proposed.items()
            if number in self.finished
            for k, fields in enumerate(population.fields)
        ]
        return sorted(ended, key=lambda configuration: (-configuration.ig, configuration.number))

    @property
    def missing(self) -> list[int]:
        """The sizes of the populations that are still to be proposed, without the recipe's own configuration."""
        left = self.samples - max(sum(len(population.own) for population in self.proposed.values()) - 1, 0)
        sizes: list[int] = []
        if not self.proposed:
            # Where it fits, the recipe's own configuration is trained among others, as one of them.
            among = bool(not self.space.common and self.size > 1)
            sizes = [math.ceil((left + 1) / math.ceil((left + 1) / self.size)) - 1 if among else 0]
            left -= sizes[0]
        while left > 0:
            sizes.append(math.ceil(left / math.ceil(left / self.size)))
            left -= sizes[-1]
        return sizes

    def propose(self) -> Population:
        """The next population, which is noted in the folder."""
        number, size = len(self.proposed), self.missing[0]
        first = sum(len(population.own) for population in self.proposed.values())
        own: list[dict[str, Any]] = [] if number else [{}]
        common: dict[str, Any] = {}
        study = self._study()
        for _ in range(size):
            if common:
                study.enqueue_trial(common)
            trial = study.ask(self.space.distributions)
            common = {name: trial.params[name] for name in self.space.common}
            own.append({name: trial.params[name] for name in self.space.own})
        population = Population(number, first, common, own)
        self.proposed[number] = population
        self._write(population)
        return population

    def finish(self, population: Population, outcomes: Sequence[Outcome]) -> None:
        """Notes what became of a population; what still trained was stopped for better ones elsewhere."""
        ended = [
            dataclasses.replace(outcome, state="stopped") if outcome.state == "training" else outcome
            for outcome in outcomes
        ]
        self._write(population, ended)
        self.finished[population.number] = ended

    def summary(self) -> dict[str, Any]:
        """The space, its configurations in the order of their numbers, and how much each field matters; for JSON."""
        return {
            "space": {"name": self.space.name, "doc": self.space.doc, "fields": self.space.identity},
            "configurations": [
                {"number": tried.number, "fields": tried.fields} | dataclasses.asdict(tried.outcome)
                for tried in sorted(self.trialled, key=lambda tried: tried.number)
            ],
            "best": self.trialled[0].number,
            "importance": self.importance(),
        }

    def importance(self) -> dict[str, float]:
        """How much of the variation of IG is due to each field (fANOVA), shares that sum to 1; empty if it is unknown.

        What was stopped early counts with the IG that it had.
        """
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances
        from optuna.trial import create_trial

        study = _study(0)
        for tried in self.trialled:
            if tried.number and math.isfinite(tried.ig):
                trial = create_trial(params=tried.fields, distributions=self.space.distributions, value=tried.ig)
                study.add_trial(trial)
        if len({trial.value for trial in study.trials}) < 2:
            return {}
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        return {name: float(value) for name, value in shares.items()}

    def _study(self) -> optuna.Study:
        """All configurations proposed so far but the recipe's own; of those that still train, the searcher keeps away.

        The seed goes by their populations: one proposes the same after an interruption as without.
        """
        study = _study(self.seed + len(self.proposed))
        for number, population in self.proposed.items():
            outcomes: Sequence[Outcome | None] = self.finished.get(number) or [None] * len(population.own)
            for k, (fields, outcome) in enumerate(zip(population.fields, outcomes, strict=True), population.first):
                if k:
                    study.add_trial(self._trial(fields, outcome))
        return study

    def _trial(self, fields: dict[str, Any], outcome: Outcome | None) -> optuna.trial.FrozenTrial:
        from optuna.trial import TrialState, create_trial

        result: dict[str, Any] = {"state": TrialState.RUNNING}
        if outcome and (outcome.ig is None or outcome.state == "diverged"):
            result["state"] = TrialState.FAIL
        elif outcome:
            pruned = outcome.state == "stopped"
            result = {"state": TrialState.PRUNED if pruned else TrialState.COMPLETE, "value": outcome.ig}
            result["intermediate_values"] = {outcome.epochs: outcome.ig} if pruned else {}
        return create_trial(params=fields, distributions=self.space.distributions, **result)

    def _path(self, number: int) -> Path:
        return self.folder / "populations" / f"{number:03d}.json"

    def _write(self, population: Population, outcomes: Sequence[Outcome] = ()) -> None:
        entry = {
            "first": population.first,
            "common": population.common,
            "own": population.own,
            "outcomes": [dataclasses.asdict(one) for one in outcomes] if outcomes else None,
        }
        write_json(self._path(population.number), entry)


def _study(seed: int) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True))
