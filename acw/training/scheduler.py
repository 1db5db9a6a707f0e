"""Which bank each worker of a group trains next, so that all of them have work until the end.

A bank is trained by one worker at a time, and goes from one to another only between two epochs. A worker keeps its bank
until that is done and then takes the longest that waits; but it lays its bank aside when another could not otherwise be
done in time: when the longest bank is, or an even share of all, by the wrap-around rule of McNaughton (1959,
doi:10.1287/mnsc.6.1.1) for work that may be interrupted. So few banks are laid aside, which matters where the features
of all do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


def soonest_end(amounts: Collection[float], workers: int) -> float:
    """When workers that take turns can be done with so much work a bank: with the longest, or an even share of all."""
    return max(*amounts, sum(amounts) / workers) if amounts else 0.0


class Scheduler:
    """What is left of each bank, and who has it. left: by bank, in any unit of work."""

    def __init__(self, left: Mapping[str, float]) -> None:
        self._left = dict(left)
        self._held: dict[int, str] = {}

    def next(self, worker: int, left: float, epoch: float) -> str:
        """The bank whose next epoch a worker trains; "" if none is left for it.

        left: what is left of the bank that it has, if it has one; epoch: what that bank's next epoch takes.
        """
        mine = self._held.pop(worker, "")
        self._left |= {mine: left} if mine else {}
        unfinished = {name: amount for name, amount in self._left.items() if amount > 0}
        waiting = unfinished.keys() - set(self._held.values()) - {mine}
        longest = max(waiting, key=lambda name: (unfinished[name], name), default="")
        chosen = mine if mine in unfinished else longest
        if chosen == mine and longest and self._held:
            end = soonest_end(unfinished.values(), len(self._held) + 1)
            # After one more epoch it would be too late for the longest.
            if unfinished[longest] > max(left, end - epoch):
                chosen = longest
        if chosen:
            self._held[worker] = chosen
        return chosen
