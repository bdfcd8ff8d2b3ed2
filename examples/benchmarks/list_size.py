"""What an epoch's end and the list of wrong labels cost where there are many samples and classes: seconds, and memory
beside the run's.

    python examples/benchmarks/list_size.py --out docs/results/list_size.json [--samples 1000000] [--classes 1000]

Nothing is trained. The memory of a run is filled with random rows: the averaged probabilities of each sample are a
softmax in which its given label is likely, for a fifth of the samples another class, and the rest is spread over all.
A process is forked for each call, so that the most memory that it held can be told beside what the run holds. One
thread; its CPU time, which other programs disturb less than the clock; the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsr_wrap import FSRWrapper

CHUNK = 10_000


def make_run(samples: int, classes: int, storage: str | int) -> FSRWrapper:
    """A wrapper that knows all samples, as after ten epochs of the default, when labels are judged."""
    head = nn.Linear(8, classes)
    inner = torch.optim.SGD(head.parameters(), lr=0.1)
    fsr = FSRWrapper(head, inner, head, num_samples=samples, relabel_storage=storage)
    memory = fsr._memory
    memory.prepare(torch.arange(1), classes, torch.device("cpu"))
    memory.epoch = 10
    memory.log_prior = torch.zeros(classes)
    assert memory.pseudo is not None
    assert memory.selection is not None
    memory.selection.active = memory.selection.estimated = True
    memory.selection.share.fill_(0.2)
    for index in torch.arange(samples).split(CHUNK):
        given = torch.randint(classes, (len(index),))
        likely = torch.where(torch.rand(len(index)) < 0.2, (given + 1) % classes, given)  # one class for another
        logits = torch.randn(len(index), classes)
        logits[torch.arange(len(index)), likely] += 6 + 3 * torch.randn(len(index))
        blank = torch.zeros_like(logits)
        memory.pseudo.average(index, logits, blank, blank == 0)
        memory.table.update(index, logits.gather(1, given[:, None])[:, 0] - 6, epoch=memory.epoch)
        memory.given.note(torch.stack([index, given]))
    memory.given.end_epoch()
    memory.consumed = samples
    memory.visits.seen.fill_(10)
    return fsr


def peak() -> int:
    """The most bytes that this process held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds and peak memory of a call, in a process of its own."""

    def child(pipe: Any) -> None:
        torch.set_num_threads(1)
        before, start = peak(), time.process_time()
        call()
        pipe.send({"seconds": round(time.process_time() - start, 2), "gigabytes": round((peak() - before) / 1e9, 2)})

    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=child, args=(there,))
    process.start()
    there.close()  # so that a child that dies is an error here, not a wait
    result: dict[str, float] = here.recv()
    process.join()
    return result


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--storage", default="10", help="relabel_storage: a number, float16 or int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    storage = int(args.storage) if args.storage.isdigit() else args.storage
    fsr = make_run(args.samples, args.classes, storage)
    results: dict[str, Any] = {"samples": args.samples, "classes": args.classes, "storage": storage}
    with tempfile.TemporaryDirectory() as folder:
        make_run(1000, 10, storage).report(folder)  # what is imported then is not the call's
        calls = {"end_epoch": fsr.end_epoch, "label_issues": fsr.label_issues, "pred_probs": fsr.pred_probs}
        calls["report"] = lambda: fsr.report(folder)
        for name, call in calls.items():
            found = [measure(call) for _ in range(args.rounds)]
            results[name] = {key: min(one[key] for one in found) for key in found[0]}
            print(name, results[name], flush=True)
    if args.out:
        args.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
