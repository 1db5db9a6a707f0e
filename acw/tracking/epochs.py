"""Epochs in MLflow: a child run for each bank of heads and each jointly trained system, filled while they train.

Only the job's driver writes, from the histories that its progress monitor reads out of the checkpoints: workers are
processes on other nodes, and a sqlite file bears no writers there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.recipes import Recipe
from acw.tracking.mlflow_store import log_metrics, log_params
from acw.training.bank import Bank, plan_banks

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

EPOCH_METRICS = ("loss", "ig", "learning_rate", "sigma", "center_bias_weight")
# How often epochs are sent at most, and for how long the end of a training waits for the last ones.
SEND_SECONDS = 5.0
CLOSE_SECONDS = 10.0

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """What has a child run: its name, its parameters, and the heads whose validation IG are metrics of their own."""

    name: str
    params: dict[str, Any]
    heads: tuple[str, ...] = ()


def bank_part(bank: Bank) -> Part:
    folds, seeds = ({getattr(head, key) for head in bank.members} for key in ("fold", "seed"))
    params = {"backbone": bank.backbone, "folds": sorted(folds), "seeds": sorted(seeds), "heads": len(bank.members)}
    return Part(bank.name, params, tuple(f"fold{head.fold}-seed{head.seed}" for head in bank.members))


def system_part(fold: int) -> Part:
    return Part(f"fold{fold}", {"fold": fold})


class Children:
    """The child runs of a run, each made when its first epoch comes, and how many epochs of each MLflow has."""

    def __init__(self, client: MlflowClient, experiment: str, parent: str) -> None:
        self.client, self.experiment, self.parent = client, experiment, parent
        self.forget()

    def forget(self) -> None:
        """What is in the store is looked up again: a request failed of which nobody knows what it has done."""
        self._runs: dict[str, Run] | None = None
        self._epochs: dict[str, int] = {}

    def log(self, part: Part, history: History) -> None:
        """Logs the epochs that MLflow does not have yet. An epoch of which it may have a part is logged again: points
        have the time of their checkpoint, and equal points are one."""
        run = self._run(part)
        if part.name not in self._epochs:
            points = self.client.get_metric_history(run, EPOCH_METRICS[0])
            self._epochs[part.name] = max((point.step for point in points), default=0)
        log_metrics(self.client, run, _points(part, history[self._epochs[part.name] :]))
        self._epochs[part.name] = len(history)

    def end(self) -> None:
        """All of them are finished."""
        for run in self._known().values():
            self.client.set_terminated(run.info.run_id, "FINISHED")

    def _known(self) -> dict[str, Run]:
        if self._runs is None:
            children = self.client.search_runs([self.experiment], f"tags.\"mlflow.parentRunId\" = '{self.parent}'")
            self._runs = {run.info.run_name: run for run in children}
        return self._runs

    def _run(self, part: Part) -> str:
        """The id of a part's run, which is made if need be."""
        runs = self._known()
        if part.name not in runs:
            tags = {"mlflow.parentRunId": self.parent}
            runs[part.name] = self.client.create_run(self.experiment, run_name=part.name, tags=tags)
        run = runs[part.name]
        if not run.data.params and part.name not in self._epochs:
            log_params(self.client, run.info.run_id, part.params)
        return run.info.run_id


def _points(part: Part, history: History) -> Iterator[Metric]:
    """Per epoch the means over the heads that still train, and each head's validation IG."""
    from mlflow.entities import Metric

    for entry in history:
        moment = int(1000 * entry.get("time", time.time()))
        for name in EPOCH_METRICS:
            values = [value for value in np.atleast_1d(entry.get(name, [])).tolist() if value is not None]
            if values:
                yield Metric(name, float(np.mean(values)), moment, entry["epoch"])
        for head, ig in zip(part.heads, entry["ig"] if part.heads else (), strict=True):
            if ig is not None:
                yield Metric(f"ig/{head}", ig, moment, entry["epoch"])


class EpochLog:
    """Sends epochs to MLflow while they come, from a thread of its own, so that no training waits for a store or fails
    with it. What a store that is away does not take is sent when it is back, at the latest with the scores."""

    def __init__(self, children: Children | None, recipe: Recipe) -> None:
        """children: None where epochs are sent with the scores only."""
        self._children = children
        self._parts = {bank.name: bank_part(bank) for bank in plan_banks(recipe)}
        self._parts |= {(part := system_part(fold)).name: part for fold in range(recipe.folds)}
        self._latest: dict[str, History] = {}
        self._told = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def report(self, histories: Mapping[str, History]) -> None:
        """Takes what the progress monitor has seen of banks or systems, by their names; returns at once."""
        if self._children is None or self._end.is_set():
            return
        self._latest = {**self._latest, **histories}
        if not self._thread.ident:
            self._thread.start()

    def close(self) -> None:
        """Sends what is left, unless that takes longer than CLOSE_SECONDS."""
        self._end.set()
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS)

    def _follow(self) -> None:
        going = True
        while going:
            going = not self._end.wait(SEND_SECONDS)
            self._send()

    def _send(self) -> None:
        assert self._children is not None
        try:
            for name, history in self._latest.items():
                if history:
                    self._children.log(self._parts[name], history)
        except Exception as error:  # whatever it is, the training goes on
            self._children.forget()
            if not self._told:
                reason = str(error).partition("\n")[0][:200]
                print(f"MLflow takes no epochs now ({reason}): they are sent later, at the latest with the scores")
            self._told = True
