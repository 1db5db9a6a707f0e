"""Which heads are trained together, what each is trained with, and the checkpoint of a bank of them.

torch is imported only where tensors are at hand: `acw status` has no time to wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from acw.recipes import Recipe
from acw.storage.addresses import shown
from acw.storage.errors import Damaged
from acw.storage.files import fetch, remove, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from acw.heads.readout import Parameters


# Of heads that were trained before: they go on from where they were best.
FURTHER_EPOCHS = 6


@dataclass(frozen=True)
class Head:
    """A head's place in the cross-validation, and the fields of the recipe in which heads of one bank may differ."""

    fold: int
    seed: int
    sigma: float
    learn_sigma: bool
    learning_rate: float
    weight_decay: float
    initial_scale: float
    dropout: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, fold: int, seed: int) -> Head:
        return cls(fold, seed, *(getattr(recipe, name) for name in HYPERPARAMETERS))


HYPERPARAMETERS = tuple(field.name for field in dataclasses.fields(Head) if field.name not in ("fold", "seed"))


@dataclass(frozen=True)
class Bank:
    """Heads on one backbone that are trained together, in one pass over its features."""

    backbone: str
    members: tuple[Head, ...]

    @property
    def name(self) -> str:
        first, last = self.members[0], self.members[-1]
        return f"{self.backbone}-f{first.fold}s{first.seed}-f{last.fold}s{last.seed}"


def plan_banks(recipe: Recipe) -> list[Bank]:
    """All heads of a recipe, in banks of `heads_per_worker`; small banks keep to one fold, and so to fewer images."""
    members = [Head.of(recipe, fold, seed) for fold in range(recipe.folds) for seed in range(recipe.seeds)]
    size = recipe.heads_per_worker
    parts = [tuple(members[start : start + size]) for start in range(0, len(members), size)]
    return [Bank(backbone, part) for backbone in recipe.backbones for part in parts]


def further(recipe: Recipe) -> Recipe:
    """By which heads that are trained already are trained on, on more images (`--refit`)."""
    return dataclasses.replace(recipe, max_epochs=min(FURTHER_EPOCHS, recipe.max_epochs))


@dataclass
class BankState:
    """All that a bank's training needs to go on after an interruption.

    parameters, best, first_moment, second_moment: stacked over the K heads. steps, bad_epochs: (K,) int64.
    learning_rate, best_ig: (K,) float64. history: one entry an epoch, values per head (None for a stopped one).
    """

    parameters: Parameters
    best: Parameters
    first_moment: Parameters
    second_moment: Parameters
    steps: Tensor
    bad_epochs: Tensor
    learning_rate: Tensor
    best_ig: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, recipe: Recipe, bank: Bank, channels: int) -> BankState:
        from acw.heads import readout as bank_of_heads

        parameters = bank_of_heads.stack(
            [
                bank_of_heads.new_head(
                    channels,
                    head.sigma,
                    head.initial_scale,
                    head_seed(recipe.seed, bank.backbone, head.fold, head.seed),
                )
                for head in bank.members
            ]
        )
        return cls.before_training(bank, parameters)

    def further(self, bank: Bank) -> BankState:
        """The same heads, as they were best, before another training; bank: of its rates."""
        return self.before_training(bank, self.best)

    @classmethod
    def before_training(cls, bank: Bank, parameters: Parameters) -> BankState:
        """A bank whose heads start with these parameters."""
        import torch

        count = len(bank.members)
        return cls(
            parameters,
            {name: value.clone() for name, value in parameters.items()},
            {name: torch.zeros_like(value) for name, value in parameters.items()},
            {name: torch.zeros_like(value) for name, value in parameters.items()},
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
            torch.tensor([head.learning_rate for head in bank.members], dtype=torch.float64),
            torch.full((count,), -math.inf, dtype=torch.float64),
        )

    def active(self, recipe: Recipe) -> Tensor:
        """Indices of the heads that still train."""
        import torch

        if len(self.history) >= recipe.max_epochs:
            return torch.empty(0, dtype=torch.int64)
        return torch.nonzero(above(self.learning_rate, recipe.min_learning_rate))[:, 0]

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {f"{group}/{name}": t for group in _GROUPS for name, t in getattr(self, group).items()}
        tensors |= {name: getattr(self, name) for name in _VECTORS}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"history": json.dumps(self.history)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> BankState:
        tensors, metadata = read_checkpoint(path)
        fields: dict[str, Any] = {group: below(tensors, group) for group in _GROUPS}
        fields |= {name: tensors[name] for name in _VECTORS}
        return cls(**fields, history=json.loads(metadata["history"]))


_GROUPS = ("parameters", "best", "first_moment", "second_moment")
_VECTORS = ("steps", "bad_epochs", "learning_rate", "best_ig")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors and metadata; raises Damaged for one that is."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise Damaged(f"{path}: unreadable checkpoint ({error}); train again, which replaces it") from None


def stored(path: Path) -> bool:
    """Whether there is a checkpoint; a damaged one is deleted, which is said, so that its heads are trained again."""
    try:
        if fetch(path).exists():
            read_checkpoint(path)
            return True
    except Damaged:
        print(f"{shown(path)}: the checkpoint is damaged; deleted, and what it held is trained again", flush=True)
        remove(path)
    return False


def above(rate: Any, lowest: float) -> Any:
    """Whether a learning rate, a number or a tensor, has not fallen to the lowest: to it but for rounding is to it, as
    1e-4 * 0.1 * 0.1 is more than 1e-6."""
    return rate > lowest * (1 + 1e-9)


def below(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Those whose names are `GROUP/NAME`, by NAME."""
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{group}/")}


def head_seed(seed: int, backbone: str, fold: int, head: int) -> int:
    """A head's own seed: it starts the same in whatever bank it is trained."""
    return zlib.crc32(f"{seed}/{backbone}/{fold}/{head}".encode())


def checkpoint_path(folder: Path, bank: Bank) -> Path:
    return folder / "banks" / f"{bank.name}.safetensors"


def system_path(folder: Path, fold: int) -> Path:
    """Of the joint training of a fold's heads."""
    return folder / "systems" / f"fold{fold}.safetensors"


def unfinished(recipe: Recipe, folder: Path) -> list[Bank]:
    """The recipe's banks that have epochs left to train."""

    def has_epochs_left(bank: Bank) -> bool:
        path = checkpoint_path(folder, bank)
        return not stored(path) or len(BankState.load(path).active(recipe)) > 0

    return [bank for bank in plan_banks(recipe) if has_epochs_left(bank)]
