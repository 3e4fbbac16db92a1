"""Batches ahead of the steps: the same bits in the same order, however made; and samples that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtl.data
from mtl.config import ConfigError
from mtl.data import Batch, DataError, Loading, MemorySplit, SplitWorkers, training_batches
from mtl.data.orders import Shuffled
from mtl.data.samplers import training_shares
from mtl.data.workers import THREAD_NAME
from mtl.distributed.world import ALONE, World
from mtl.training.run import train
from runs import exact_metrics, tiny_parts


def split(num: int = 23) -> MemorySplit:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, 4, 4, 3), dtype=torch.uint8, generator=generator)
    return MemorySplit(
        images, {"a": torch.arange(num, dtype=torch.int16), "b": torch.rand(num, 1, generator=generator).half()}
    )


def contents(batches: Iterator[Batch]) -> list[list[Tensor]]:
    return [[batch.indices, batch.images, batch.labels["a"], batch.labels["b"]] for batch in batches]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(THREAD_NAME)]


CPU = torch.device("cpu")
WAYS = {
    "ahead": Loading(True, CPU),
    "images when asked for": Loading(),
    "workers": Loading(True, CPU, SplitWorkers(2)),
    "more workers than batches": Loading(True, CPU, SplitWorkers(9)),
    "workers without images": Loading(False, CPU, SplitWorkers(1)),
}


@pytest.fixture(autouse=True)
def enough_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """More workers than CPUs, of which a machine for tests may have few, would make torch warn."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize("way", WAYS)
def test_batches_are_the_same_however_they_are_made(way: str) -> None:
    data = split()
    plain = contents(data.batch(indices) for (indices,) in training_shares(Shuffled(len(data)), 5, 3, 1))
    assert len(plain) == 4
    assert same(plain, contents(training_batches(data, 5, 3, 1, loading=WAYS[way])))
    assert same(plain[2:], contents(training_batches(data, 5, 3, 1, skip=2, loading=WAYS[way])))
    assert not threads()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_draws_nothing_from_the_generator_of_training(num_workers: int) -> None:
    before = torch.get_rng_state(), random.getstate()
    contents(training_batches(split(), 5, 3, 1, loading=Loading(True, CPU, SplitWorkers(num_workers))))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_the_order_is_that_of_seed_and_epoch_written_out_by_hand() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)).tolist()

    def own(seed: int, epoch: int, skip: int = 0, world: World = ALONE) -> list[list[int]]:
        return [each[world.rank].tolist() for each in training_shares(Shuffled(23), 5, seed, epoch, skip, world)]

    whole = own(3, 1)
    assert whole == own(3, 1) == [order[:5], order[5:10], order[10:15], order[15:20]]
    assert own(3, 1, skip=2) == [order[10:15], order[15:20]]
    assert own(3, 1, 3, World(1, 2, 1)) == [order[18:20]], "a rank has its share of each batch"
    assert own(3, 2) != whole != own(4, 1)


def test_a_worker_ends_without_a_fault() -> None:
    """Another exit code than 0 is an error of torch's for whoever has its handler of SIGCHLD in the process."""
    batches = training_batches(split(), 5, 3, 1, loading=Loading(True, CPU, SplitWorkers(2)))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2 and len(list(batches)) == 3
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_can_begin_at_its_end_and_not_after_it(num_workers: int) -> None:
    assert not contents(training_batches(split(), 5, 3, 1, skip=4, loading=Loading(workers=SplitWorkers(num_workers))))
    with pytest.raises(ValueError, match="skip: expected 0 to 4, the batches of an epoch, got 5"):
        training_batches(split(), 5, 3, 1, skip=5)


def test_processes_share_every_batch_and_know_all_of_it() -> None:
    data = split()
    whole = [batch.indices for batch in training_batches(data, 7, 3, 1)]
    shares = [list(training_batches(data, 7, 3, 1, world=World(rank, 3, rank))) for rank in range(3)]
    for number, indices in enumerate(whole):
        assert torch.equal(torch.cat([own[number].indices for own in shares]), indices)
        assert all(torch.equal(own[number].everyone, indices) for own in shares)


@pytest.mark.parametrize("way", ["ahead", "workers"])
def test_a_loop_that_is_left_ends_the_thread_and_the_workers(way: str) -> None:
    batches = training_batches(split(), 5, 3, 1, loading=WAYS[way])
    next(batches)
    assert threads()
    assert len(multiprocessing.active_children()) == WAYS[way].workers.num
    batches.close()
    assert not threads()
    assert not multiprocessing.active_children()


def test_what_fails_in_the_background_is_raised_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = MemorySplit.rows, []

    def rows(self: MemorySplit, indices: Tensor, with_images: bool, view: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return real(self, indices, with_images, view)

    monkeypatch.setattr(MemorySplit, "rows", rows)
    taken = []
    with pytest.raises(OSError, match="the disk is gone"):
        taken.extend(training_batches(split(), 5, 3, 1, loading=WAYS["ahead"]))
    assert not threads()


def test_what_a_worker_raises_is_raised_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: object) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(MemorySplit, "rows", rows)
    with pytest.raises(OSError, match="the disk is gone"):
        next(training_batches(split(), 5, 3, 1, loading=WAYS["workers"]))
    assert not threads()
    assert not multiprocessing.active_children()


def test_a_worker_without_memory_to_share_a_batch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(_: Tensor) -> Tensor:
        raise RuntimeError("unable to mmap 100 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(Tensor, "share_memory_", share)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        next(training_batches(split(), 5, 3, 1, loading=WAYS["workers"]))


class Unpicklable:
    def __init__(self, *_: object) -> None: ...

    def __reduce__(self) -> Any:
        raise MemoryError("no room to pickle it")


@pytest.mark.parametrize(
    ("error", "said", "sends_errors"),
    [
        (MemoryError, "no room to pickle it", True),
        (DataError, r"data worker \d \(pid \d+\) ended with exit code 1", False),
    ],
)
def test_a_batch_that_cannot_be_sent_is_an_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], said: str, sends_errors: bool
) -> None:
    """A queue would drop it, and the loop would wait for it forever."""
    monkeypatch.setattr("mtl.data.split_workers.RowsOfSplits.__getitems__", Unpicklable)
    if not sends_errors:
        monkeypatch.setattr("mtl.data.workers.ExceptionWrapper", type("Error", (Unpicklable,), {}))
    with pytest.raises(error, match=said):
        next(training_batches(split(), 5, 3, 1, loading=WAYS["workers"]))
    assert not threads()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("victims", ["all", "one"])
def test_a_worker_that_dies_is_named_with_its_end(victims: str) -> None:
    batches = training_batches(split(20_000), 5, 3, 1, loading=WAYS["workers"])
    next(batches)
    children = multiprocessing.active_children()
    for child in children if victims == "all" else children[:1]:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data worker \d \(pid \d+\) was killed by SIGKILL .*data\.num_workers=0"):
        for _ in batches:
            pass
    assert not threads()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_killed_at_any_moment_is_named() -> None:
    """While it reads, while it sends, while the main process takes a batch from it: none may hang or look different."""
    chance = random.Random(0)
    for _ in range(20):
        batches = training_batches(split(6000), 5, 3, 1, loading=WAYS["workers"])
        next(batches)
        pid = chance.choice(multiprocessing.active_children()).pid
        assert pid is not None
        killer = threading.Timer(chance.uniform(0, 0.3), os.kill, (pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(DataError, match=r"data worker \d \(pid \d+\) was killed by SIGKILL"):
            for _ in batches:
                pass
        killer.join()
        assert not threads()
        assert not multiprocessing.active_children()


def test_a_worker_that_ends_by_itself_is_named_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemorySplit, "rows", lambda *_: os._exit(3))
    end = r"data worker \d \(pid \d+\) ended with exit code 3 while it made a batch; data\.num_workers=0"
    with pytest.raises(DataError, match=end):
        next(training_batches(split(), 5, 3, 1, loading=WAYS["workers"]))


def test_workers_leave_signals_to_the_main_process() -> None:
    batches = training_batches(split(2000), 5, 3, 1, loading=WAYS["workers"])
    taken = [next(batches), next(batches)]  # one of each worker, which ignores signals by then
    for child in multiprocessing.active_children():
        assert child.pid is not None
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(child.pid, number)
    assert len([*taken, *batches]) == 400


@pytest.mark.slow
def test_a_run_with_workers_has_the_bits_of_one_without(tmp_path: Path) -> None:
    rows = []
    for number in (0, 2):
        parts = tiny_parts(tmp_path, f"data.num_workers={number}", f"name=run-{number}")
        run_dir = train(parts, quiet=True).run_dir
        rows.append(exact_metrics(run_dir))
    assert rows[0] == rows[1]


def plant(patch: pytest.MonkeyPatch) -> None:
    """Three samples of the training data and one of the validation data that cannot be used."""
    real = mtl.data.generated.generated_source.load_split

    def load(config: Any, which: str, quiet: bool) -> MemorySplit:
        found = real(config, which, quiet)
        labels = {name: label.clone() for name, label in found.labels.items()}
        labels["depth"][3, 0, 0, 0] = float("inf")
        if which == "train":
            labels["normals"][7, 1, 2, 2] = float("-inf")
            labels["object"][11] = 77
        return MemorySplit(found.images, labels)

    patch.setattr(mtl.data.generated.generated_source, "load_split", load)


def test_a_sample_that_cannot_be_trained_on_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(ConfigError, match=r"tasks\.object: the labels of scenes do not fit: expected classes 0 to 9"):
        tiny_parts(tmp_path)
    tasks = {"depth": {"type": "depth"}, "normals": {"type": "normals"}}
    message = r"scenes, train: sample 3 has a label of depth .*infinite.* 0 more have; data\.on_bad_sample=skip leaves"
    with pytest.raises(DataError, match=message):
        tiny_parts(tmp_path, tasks=tasks, phases=[{"name": "a", "epochs": 1}])


def test_samples_that_cannot_be_trained_on_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny_parts(tmp_path)
    plant(monkeypatch)
    parts = tiny_parts(tmp_path, "data.on_bad_sample=skip")
    assert (len(parts.train), parts.train.num_skipped) == (37, 3)
    assert (len(parts.val), parts.val.num_skipped) == (19, 1)
    kept = [place for place in range(40) if place not in (3, 7, 11)]
    assert torch.equal(parts.train.images, whole.train.images[kept])
    assert any("scenes, train: 3 of 40 samples are left out: 3, 7, 11" in record.message for record in caplog.records)
    assert parts.phases[0].steps_per_epoch == 4 and parts.plan.phases[0].num_steps == 4, "37 images make 4 batches of 8"
    assert train(parts, quiet=True).report.ok


def test_data_without_a_usable_sample_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.tasks.Depth.bad_samples", lambda _, label: torch.ones(len(label), dtype=torch.bool))
    with pytest.raises(DataError, match="scenes, train: every sample has a label that cannot be trained on"):
        tiny_parts(tmp_path, "data.on_bad_sample=skip")
