"""The finished banks and systems of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from acw.heads.readout import Parameters, concatenate, select
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.storage.files import fetch
from acw.training.bank import Bank, BankState, checkpoint_path, plan_banks
from acw.training.joint import SystemState, trained_systems


def trained_heads(recipe: Recipe, folder: Path) -> dict[Bank, BankState]:
    """The finished banks of a run; raises UserError if one is missing or has not finished."""
    result = {}
    for bank in plan_banks(recipe):
        path = checkpoint_path(folder, bank)
        if not fetch(path).exists():
            raise UserError(f"{path}: heads are not trained yet; run jobs/train.py first")
        result[bank] = BankState.load(path)
        if len(result[bank].active(recipe)):
            raise UserError(f"{path}: training has not finished; run jobs/train.py again, it goes on where it stopped")
    return result


def trained(recipe: Recipe, folder: Path) -> tuple[dict[Bank, BankState], list[SystemState]]:
    """The finished banks and, of a joint training, systems of a run; neither where it takes another model's heads.

    Raises UserError if one is missing or has not finished.
    """
    banks = {} if recipe.heads else trained_heads(recipe, folder)
    return banks, trained_systems(recipe, folder) if recipe.joint else []


def best_heads(recipe: Recipe, banks: Mapping[Bank, BankState]) -> list[dict[str, Parameters]]:
    """Per fold and backbone the best-validation parameters of its heads, stacked."""

    def of(backbone: str, fold: int) -> Parameters:
        chosen = []
        for bank, state in banks.items():
            if bank.backbone == backbone:
                members = [k for k, head in enumerate(bank.members) if head.fold == fold]
                chosen += [select(state.best, members)] if members else []
        return concatenate(chosen)

    return [{name: of(name, fold) for name in recipe.backbones} for fold in range(recipe.folds)]
