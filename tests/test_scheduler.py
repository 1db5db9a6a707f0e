"""Workers that take turns at banks end together."""

from __future__ import annotations

import heapq
import random

import pytest

from acw.training.scheduler import Scheduler


def simulate(banks: dict[str, list[float]], workers: int) -> tuple[float, int]:
    """When the last of the banks, given by their epochs' lengths, is done, and how often one was laid aside."""
    scheduler = Scheduler({name: sum(epochs) for name, epochs in banks.items()})
    done, aside, end = dict.fromkeys(banks, 0), 0, 0.0
    ready = [(0.0, worker, "") for worker in range(workers)]
    while ready:
        now, worker, mine = heapq.heappop(ready)
        end = max(end, now)
        done |= {mine: done[mine] + 1} if mine else {}
        left = banks[mine][done[mine] :] if mine else []
        chosen = scheduler.next(worker, sum(left), left[0] if left else 0.0)
        aside += bool(left) and chosen != mine
        if chosen:
            held = [other for _, _, other in ready]
            assert chosen not in held, "a bank is trained by one worker at a time"
            heapq.heappush(ready, (now + banks[chosen][done[chosen]], worker, chosen))
    assert done == {name: len(epochs) for name, epochs in banks.items()}
    return end, aside


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_all_workers_have_work_until_the_end(workers: int) -> None:
    """Never an epoch later than the soonest that any plan could end (McNaughton 1959), with few banks laid aside."""
    draw = random.Random(workers)
    for _ in range(300):
        banks = {str(n): [draw.uniform(1, 3)] * draw.randint(1, 30) for n in range(draw.randint(1, 20))}
        amounts = [sum(epochs) for epochs in banks.values()]
        end, aside = simulate(banks, workers)
        assert end <= max(*amounts, sum(amounts) / workers) + max(max(epochs) for epochs in banks.values())
        assert aside <= 5 * (workers - 1)


def test_four_banks_on_three_workers() -> None:
    """Whoever trained banks to their end one after the other would need twice a bank's time."""
    end, aside = simulate({name: [1.0] * 12 for name in "abcd"}, 3)
    assert end == pytest.approx(16, abs=1)
    assert aside <= 4


def test_a_worker_alone_trains_one_bank_after_the_other() -> None:
    scheduler = Scheduler({"short": 2.0, "long": 3.0})
    told = [(0.0, 0.0), (2.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    assert [scheduler.next(0, *left) for left in told] == ["long", "long", "long", "short", "short", "", ""]
