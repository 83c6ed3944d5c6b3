"""The runs of test_align_distributed.py, in a process of their own that forks; see distributed_runs.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alignment_runs import make_inputs, moody_codes, settings
from distributed_runs import fill_disk_of_first, in_processes

from siren.align.loop import Alignment
from siren.align.run import align
from siren.errors import SirenError
from siren.train.logs import Logs

# A group a process and a part: the gradients of one process are then sums of the same two numbers.
EXACT: dict[str, Any] = {
    "reward_funcs": [moody_codes],
    "prompts_per_step": 2,
    "num_generations": 4,
    "batch_size": 4,
    "rollout_batch_size": 4,
    "eval_prompts": 1,
}


def at(step: int, rank: int, work: Callable[[], Any]) -> Callable[[], None]:
    """Have one process do `work` before its updates of a step (from 0)."""

    def prepare() -> None:
        learn = Alignment.learn

        def wrapped(self: Alignment, *given: Any) -> dict[str, float]:
            if self.step == step and int(os.environ["RANK"]) == rank:
                work()
            return learn(self, *given)

        Alignment.learn = wrapped  # type: ignore[method-assign]

    return prepare


def fail(*_: Any) -> None:
    raise SirenError("out of luck")


def refuse_lines_of_first() -> None:
    """Process 0 cannot log its second step."""
    write = Logs.write

    def full(self: Logs, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise SirenError("cannot write metrics.jsonl: No space left on device")
        write(self, record)

    Logs.write = full  # type: ignore[method-assign]


def main(folder: Path) -> None:
    """Print what each process of each run raised, as JSON."""
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports much, once for all processes
    inputs = make_inputs(folder)

    def run(name: str, prepare: Callable[[], None] | None = None, **changes: Any) -> Callable[[], None]:
        def work() -> None:
            if prepare is not None:
                prepare()
            align(settings(inputs, folder / name, **EXACT | changes))

        return work

    dpo = {"loss": "dpo", "batch_size": 2}
    many = {"prompts_per_step": 6, "batch_size": 5, "eval_prompts": 3}
    errors = {
        "one": in_processes(1, run("one")),
        "two": in_processes(2, run("two")),
        "stopped": in_processes(2, run("stopped", at(3, 1, lambda: signal.raise_signal(signal.SIGTERM)))),
        "resumed": in_processes(1, run("stopped")),
        "one, dpo": in_processes(1, run("one, dpo", **dpo)),
        "two, dpo": in_processes(2, run("two, dpo", **dpo)),
        "one, many": in_processes(1, run("one, many", **many)),
        "two, many": in_processes(2, run("two, many", **many)),
        "full": in_processes(2, run("full", at(2, 0, fill_disk_of_first))),
        "log": in_processes(2, run("log", refuse_lines_of_first)),
        "lost": in_processes(2, run("lost", at(1, 1, fail))),
        "uneven": in_processes(2, run("uneven", prompts_per_step=3)),
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
