"""What tasks cost: microseconds an item and a grade, and milliseconds a run of the sandbox.

    python benchmarks/task_cost.py                 about 20 seconds on one core

Medians of three rounds. The first item of a task reads what it is made of (CLDR, the words of the
standard library) and is told apart.
"""

import statistics
import time
from collections.abc import Callable

from herdling.tasks import jail, sandbox
from herdling.tasks.registry import TASKS, create

ITEMS, ROUNDS = 200, 3


def median(work: Callable[[int], object], count: int) -> float:
    """Seconds of one piece of work, the median of rounds of `count`."""
    rounds = []
    for r in range(ROUNDS):
        start = time.perf_counter()
        for i in range(count):
            work(r * count + i)
        rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def main() -> None:
    print(f"{'task':<18} {'first, ms':>9}  {'item, us':>8}  {'grade, us':>9}")
    for name in TASKS:
        start = time.perf_counter()
        task = create(name)
        item = task.item(0, "train")
        first = time.perf_counter() - start
        each = median(lambda i, task=task: task.item(i, "train"), ITEMS)
        runs_code = name == "functions"
        if runs_code and jail.missing():
            print(f"{name:<18} {1e3 * first:>9.1f}  {1e6 * each:>8.0f}  {jail.missing()}")
            continue
        graded = median(lambda _, t=task, i=item: t.grade(i, i.answer), 5 if runs_code else ITEMS)
        print(f"{name:<18} {1e3 * first:>9.1f}  {1e6 * each:>8.0f}  {1e6 * graded:>9.0f}")
    if not jail.missing():
        bare = median(lambda _: sandbox.run("", ["1"]), 10)
        named = median(lambda _: sandbox.run("import re, math, collections", ["1"]), 10)
        print(f"sandbox: {1e3 * bare:.1f} ms a run, {1e3 * named:.1f} ms with three imports")


if __name__ == "__main__":
    main()
