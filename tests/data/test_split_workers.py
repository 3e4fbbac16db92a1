"""Workers that stay for a phase: the same processes, the same bits, whatever was left, broken off or killed before."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl.data import DataError, Loading, MemorySplit, SplitWorkers, View, training_batches, validation_batches
from mtl.data.dataset import Rows
from mtl.data.split_workers import RowsOfSplits
from mtl.data.workers import Workers
from mtl.training.run import train
from processes import wait_until
from runs import exact_metrics, tiny_parts


class Stored(MemorySplit):
    """Reads batch by batch, as from a disk."""

    is_in_memory = False

    def label_bytes(self) -> int | None:
        return None


def split(num: int) -> Stored:
    return Stored(torch.arange(num * 3, dtype=torch.uint8).view(num, 1, 1, 3), {"a": torch.arange(num)})


def pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def indices(batches: Any) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def test_all_readings_of_a_phase_are_made_by_the_same_processes() -> None:
    data, val = split(23), split(9)
    workers = SplitWorkers(2, [data, val])
    loading, seen = Loading(True, workers=workers), list[set[int]]()
    with workers.stay():
        for epoch in range(3):
            plain = indices(training_batches(data, 5, 3, epoch))
            assert indices(training_batches(data, 5, 3, epoch, loading=loading)) == plain
            seen.append(pids())
            images = [batch.images for batch in validation_batches(val, 4, loading)]
            assert torch.equal(torch.cat(images), val.images)
            seen.append(pids())
    assert len(seen[0]) == 2 and all(each == seen[0] for each in seen)
    assert not pids()
    indices(training_batches(data, 5, 3, 0, loading=loading))
    assert not pids(), "outside of a phase, processes end with their reading"


def test_what_was_left_in_the_middle_is_thrown_away() -> None:
    data = split(60)
    workers = SplitWorkers(2, [data])
    loading = Loading(True, workers=workers)
    with workers.stay():
        for num_taken in (0, 1, 3, 29):
            batches = training_batches(data, 2, 3, 0, loading=loading)
            for _ in range(num_taken):
                next(batches)
            batches.close()
            whole = [(batch.indices, batch.images) for batch in training_batches(data, 2, 3, 1, loading=loading)]
            assert [own.tolist() for own, _ in whole] == indices(training_batches(data, 2, 3, 1))
            assert all(torch.equal(images, data.images[own]) for own, images in whole)


def test_a_reading_within_another_has_processes_of_its_own() -> None:
    """As features are computed at the first step of a phase whose labels are read."""
    data = split(23)
    workers = SplitWorkers(2, [data])
    labels, images = Loading(False, workers=workers), Loading(True, workers=workers)
    with workers.stay(), closing(training_batches(data, 5, 3, 0, loading=labels)) as outer:
        first = [next(outer).indices.tolist()]
        staying = pids()
        inner = training_batches(data, 5, 3, 1, loading=images)
        got = [next(inner).indices.tolist()]
        assert len(pids() - staying) == 2
        assert got + indices(inner) == indices(training_batches(data, 5, 3, 1))
        assert pids() == staying
        assert first + indices(outer) == indices(training_batches(data, 5, 3, 0))


def test_workers_of_a_phase_know_what_the_splits_have_become() -> None:
    data = split(8)
    workers = SplitWorkers(1, [data])
    for value in (0, 1):
        data.labels["a"].fill_(value)
        with workers.stay():
            for batch in training_batches(data, 4, 0, 0, loading=Loading(True, workers=workers)):
                assert batch.labels["a"].tolist() == [value] * 4


def test_what_one_reading_raises_does_not_end_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    data = split(8)
    workers = SplitWorkers(2, [data])
    loading = Loading(True, workers=workers)

    def rows(*_: object) -> Rows:
        raise OSError("the disk is gone")

    with workers.stay():
        with monkeypatch.context() as patch:
            patch.setattr(Stored, "rows", rows)
            with pytest.raises(OSError, match="the disk is gone"):
                indices(training_batches(data, 2, 0, 0, loading=loading))
        assert not pids()
        assert indices(training_batches(data, 2, 0, 1, loading=loading)) == indices(training_batches(data, 2, 0, 1))


def test_a_worker_killed_between_two_readings_is_named_and_all_are_started_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = split(8)
    workers = SplitWorkers(2, [data])
    loading = Loading(True, workers=workers)
    with workers.stay():
        indices(training_batches(data, 2, 0, 0, loading=loading))
        before = pids()
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in pids())
        assert indices(training_batches(data, 2, 0, 1, loading=loading)) == indices(training_batches(data, 2, 0, 1))
        assert not before & pids()
    (warning,) = [record.message for record in caplog.records]
    assert f"(pid {victim}) was killed by SIGKILL while it waited; all of them are started again" in warning


def test_a_worker_killed_while_it_reads_ends_the_reading_and_not_the_next() -> None:
    data = split(20_000)
    workers = SplitWorkers(2, [data])
    loading = Loading(True, workers=workers)
    with workers.stay():
        batches = training_batches(data, 5, 3, 0, loading=loading)
        next(batches)
        for pid in pids():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"data worker \d \(pid \d+\) was killed by SIGKILL while it made a batch"):
            indices(batches)
        assert not pids()
        few = training_batches(data, 5000, 3, 0, loading=loading)
        assert indices(few) == indices(training_batches(data, 5000, 3, 0))


def test_random_light_of_every_image_is_not_sent_with_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(_: object, request: Any) -> Rows:
        assert request.view == View(3, 1), "number and seed, from which a worker draws"
        return data.rows(torch.tensor(request.indices), request.with_images, request.view)

    data = split(8)
    monkeypatch.setattr(RowsOfSplits, "__getitems__", rows)
    light: Any = object()
    loading = Loading(False, workers=SplitWorkers(1))
    indices(training_batches(data, 4, 0, 0, View(3, 1, light), loading=loading))


def test_a_run_starts_processes_once_in_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, begin = [], Workers._make_loader

    def counted(workers: Workers[Any]) -> Any:
        begun.append(workers)
        return begin(workers)

    monkeypatch.setattr(Workers, "_make_loader", counted)
    phases = [{"name": "a", "epochs": 3, "lr": 1e-3}, {"name": "b", "epochs": 2, "lr": 1e-3, "freeze": ["trunk"]}]
    data = {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 24, "num_val": 8, "memory_gb": 0}
    rows = []
    for number in (0, 2):
        chosen = {"phases": phases, "cache": {"mode": "off"}, "data": data | {"num_workers": number}}
        parts = tiny_parts(tmp_path, f"name=run-{number}", **chosen)
        rows.append(exact_metrics(train(parts, quiet=True).run_dir))
    assert rows[0] == rows[1]
    assert len(begun) == 2
    assert not pids()
