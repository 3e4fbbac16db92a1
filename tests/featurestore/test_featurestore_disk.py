"""Features on disk: damage, killed writers, full disks, several processes, the folder's limit, memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featurestore_rows
from featurestore_rows import BIG, FIELDS, fill, filled, open_store, rows, same_bits
from forks import Forked
from mtl.featurestore import DiskStore
from mtl.featurestore.folder import _is_in_use
from mtl.runtime.files import all_bytes
from processes import HANGS_S, wait_until

ALL = torch.arange(8)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def processes(verb: str, *arguments: list[str]) -> list[Any]:
    """What processes of featurestore_rows.py say that run at the same time."""
    running = [Forked([featurestore_rows.__file__, verb, *each], stdout=subprocess.PIPE) for each in arguments]
    said = [process.communicate(timeout=HANGS_S)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return [json.loads(text) for text in said]


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# A store that is open, in a process with a fork, as data workers are.
HOLDER = """
import os, signal, sys
from pathlib import Path
from featurestore_rows import filled
store = filled(Path(sys.argv[1]))
pid = os.fork()
if pid == 0:
    sys.stdin.read()
    os._exit(0)
print(pid, flush=True)
signal.pause()
"""


# Runs that share features


def test_the_next_store_of_the_same_key_reads_them_and_others_do_not(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with contextlib.closing(open_store(tmp_path)) as again:
        assert again.is_complete
        assert same_bits(again.read(ALL), rows(ALL, FIELDS))
    for other in (open_store(tmp_path, key="l"), open_store(tmp_path, 9), open_store(tmp_path, fields=FIELDS[:1])):
        assert other.num_present == 0
        other.close()


def test_the_card_says_what_the_features_are_of(tmp_path: Path) -> None:
    with contextlib.closing(filled(tmp_path)) as store:
        card = json.loads((store.path / "card.json").read_text())
    assert card["key"] == {"name": "k"}
    assert card["num_rows"] == 8
    assert card["fields"][0] == {"shape": [3, 2], "dtype": "torch.bfloat16"}


def test_rows_have_no_final_name_before_the_last_one_and_go_when_it_is_closed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(ALL[:7], rows(ALL[:7], FIELDS))
    assert same_bits(store.read(ALL[:7]), rows(ALL[:7], FIELDS))
    assert not store.path.exists()
    with contextlib.closing(open_store(tmp_path)) as other:
        assert other.num_present == 0
    assert len(inside(tmp_path)) == 1  # the other store saw that its owner lives
    store.close()
    assert inside(tmp_path) == []


def test_the_second_one_to_fill_takes_what_the_first_one_finished(tmp_path: Path) -> None:
    first, second, third = (open_store(tmp_path) for _ in range(3))
    for store in (second, third):
        store.write(ALL[:7], rows(ALL[:7], FIELDS))
    fill(first)
    second.write(ALL[:1], rows(ALL[:1], FIELDS))  # sees it before its own last row
    third.write(ALL[7:], rows(ALL[7:], FIELDS))
    for store in (first, second, third):
        assert same_bits(store.read(ALL), rows(ALL, FIELDS))
        assert inside(tmp_path)[-1] == store.path.name
        store.close()
    assert inside(tmp_path) == [first.path.name]


def test_two_processes_that_fill_the_same_key_leave_one_entry(tmp_path: Path) -> None:
    said = processes("fill_with_others", [str(tmp_path), "1"], [str(tmp_path), "2"])
    assert said == [{"wrong": 0, "whole": True, "right": True, "off": False}] * 2
    assert len(inside(tmp_path / "store")) == 1


def test_everything_is_forced_to_disk_before_it_has_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[int] = []
    at_rename: list[bool] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        forced.append(os.fstat(descriptor).st_ino)

    def record_rename(source: Path, target: Path) -> None:
        names = (".", "rows.bin", "sums.bin", "card.json")
        at_rename.append({(Path(source) / name).stat().st_ino for name in names} <= set(forced))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    with contextlib.closing(filled(tmp_path)):
        assert at_rename == [True]
        assert forced[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100])
def test_a_call_that_moves_less_than_it_should_is_continued(most: int) -> None:
    source = np.arange(12, dtype=np.uint8)
    target = np.zeros(12, dtype=np.uint8)

    def move(_: int, buffers: Sequence[memoryview], at: int) -> int:
        moved = source[at : at + most]
        for place, value in enumerate(moved):
            left = [*buffers]
            while place >= len(left[0]):
                place -= len(left.pop(0))
            left[0][place] = value
        return len(moved)

    assert all_bytes(move, 0, [target[:4].data, target[4:5].data, target[5:].data], 0) == 12
    assert target.tolist() == source.tolist()


# Killed writers


def test_a_writer_killed_at_any_file_operation_leaves_nothing_that_is_wrong(tmp_path: Path) -> None:
    ((*killed, last),) = processes("kill_at_every_file_operation", [str(tmp_path)])
    assert last == ["survived", "empty", "whole"]
    assert len(killed) > 20
    assert {how for how, *_ in killed} == {"killed"}
    # The other entry, which has to make room, is there whole or not at all, and so is the new one; both at some time.
    assert {(old, new) for _, old, new in killed} == {("whole", "empty"), ("empty", "empty"), ("empty", "whole")}


@pytest.mark.slow
def test_a_writer_killed_at_random_leaves_nothing_that_is_wrong(tmp_path: Path) -> None:
    (found,) = processes("kill_at_random", [str(tmp_path), "60"])
    # The first one is killed before it has done anything, the second one not at all.
    assert {what for _, what in found[:2]} == {"empty", "whole"} == {what for _, what in found}


def test_what_is_not_of_a_store_is_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "folder/file", ".hidden/file", "0123/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    before = set(inside(tmp_path))
    with contextlib.closing(filled(tmp_path, max_bytes=1000)) as store:
        assert set(inside(tmp_path)) == {*before, store.path.name}


# Damage


def check_found_and_mended(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged entry is never served, is spoken of once, goes, and is filled again."""
    caplog.clear()
    with contextlib.closing(open_store(folder)) as store:
        assert [store.read(row) for row in ALL.split(1)].count(None) > 0
        assert store.num_present == 0
        assert not store.path.exists()
        (warning,) = warnings_of(caplog)
        assert f"features {store.path} are damaged (" in warning
        assert "); they are removed and computed again" in warning
        fill(store)
        assert same_bits(store.read(ALL), rows(ALL, FIELDS))
    with contextlib.closing(open_store(folder)) as store:
        assert same_bits(store.read(ALL), rows(ALL, FIELDS))
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("name", ["rows.bin", "sums.bin", "card.json"])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "sound").close()
    (entry,) = (tmp_path / "sound").glob("*/card.json")
    content = (entry.parent / name).read_bytes()
    folder = tmp_path / "store"
    shutil.copytree(tmp_path / "sound", folder)
    for place in range(len(content)):
        if not (folder / entry.parent.name).exists():
            shutil.copytree(entry.parent, folder / entry.parent.name)
        flipped = bytes([content[place] ^ (1 << place % 8)])
        (folder / entry.parent.name / name).write_bytes(content[:place] + flipped + content[place + 1 :])
        with contextlib.closing(open_store(folder)) as store:
            read = [store.read(row) for row in ALL.split(1)]
            assert all(
                got is None or same_bits(got, rows(row, FIELDS)) for got, row in zip(read, ALL.split(1), strict=True)
            )
            assert None in read
            assert not store.path.exists()


FAULTS: dict[str, Callable[[Path], object]] = {
    "rows cut": lambda entry: os.truncate(entry / "rows.bin", 20),
    "no rows": lambda entry: os.truncate(entry / "rows.bin", 0),
    "rows longer": lambda entry: os.truncate(entry / "rows.bin", 1000),
    "checksums cut": lambda entry: os.truncate(entry / "sums.bin", 63),
    "card cut": lambda entry: os.truncate(entry / "card.json", 50),
    "card is no JSON": lambda entry: (entry / "card.json").write_text("{"),
    "card is no text": lambda entry: (entry / "card.json").write_bytes(b"\xff\xfe"),
    "card is a folder": lambda entry: ((entry / "card.json").unlink(), (entry / "card.json").mkdir()),
    "card of another": lambda entry: shutil.copy(other(entry) / "card.json", entry),
    "rows of another": lambda entry: shutil.copy(other(entry) / "rows.bin", entry),
    "checksums of another": lambda entry: shutil.copy(other(entry) / "sums.bin", entry),
    "all of another": lambda entry: [shutil.copy(file, entry) for file in other(entry).iterdir()],
    "two rows exchanged": lambda entry: exchange_rows(entry / "rows.bin"),
    **{
        f"{name} missing": lambda entry, name=name: (entry / name).unlink()
        for name in ("rows.bin", "sums.bin", "card.json", "lock")
    },
}


def other(entry: Path) -> Path:
    return next(path for path in entry.parent.iterdir() if path.is_dir() and path != entry)


def exchange_rows(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[16:32] + content[:16] + content[32:])


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_found_and_mended(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, "other").close()
    entry = filled(tmp_path)
    entry.close()
    FAULTS[fault](entry.path)
    check_found_and_mended(tmp_path, caplog)


@pytest.mark.parametrize("is_whole", [True, False])
def test_damage_while_it_is_open_is_found_once_by_many_threads(
    tmp_path: Path, is_whole: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path) if is_whole else open_store(tmp_path)
    store.write(ALL[:6], rows(ALL[:6], FIELDS))
    (file,) = tmp_path.rglob("rows.bin")
    content = file.read_bytes()
    file.write_bytes(content[:17] + bytes([content[17] ^ 1]) + content[18:])
    # Every thread has the entry before one of them reads.
    barrier, new_batch = threading.Barrier(4), store._new_batch

    def wait(length: int) -> Any:
        barrier.wait()
        return new_batch(length)

    monkeypatch.setattr(store, "_new_batch", wait)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(store.read(ALL[:6]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert found == [None] * 4
    assert len(warnings_of(caplog)) == 1
    assert inside(tmp_path) == []
    fill(store)
    assert same_bits(store.read(ALL), rows(ALL, FIELDS))
    store.close()


def test_damage_does_not_remove_what_another_process_made_again(tmp_path: Path) -> None:
    first, second = filled(tmp_path), open_store(tmp_path)
    exchange_rows(first.path / "rows.bin")
    assert first.read(ALL) is None
    fill(first)
    assert second.read(ALL) is None  # it has the damaged one open
    assert first.path.exists()
    second.write(ALL[:1], rows(ALL[:1], FIELDS))
    assert same_bits(second.read(ALL), rows(ALL, FIELDS))
    first.close()
    second.close()


def test_a_store_damaged_again_and_again_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(filled(tmp_path)) as store:
        for _ in range(2):
            exchange_rows(store.path / "rows.bin")
            assert store.read(ALL) is None
            fill(store)
        assert store.is_disabled
        assert "are not kept" in warnings_of(caplog)[-1]
        assert "damaged again" in warnings_of(caplog)[-1]
    assert inside(tmp_path) == []


# Disks that take nothing


def check_is_off(store: DiskStore, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert store.is_disabled
    assert store.read(ALL[:1]) is None
    store.write(ALL[:1], rows(ALL[:1], list(store.fields)))
    assert store.read(ALL[:1]) is None
    store.close()
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"features are not kept in {store.path.parent}: ")
    assert reason in warning
    assert warning.endswith("; they are computed every time")


@pytest.mark.parametrize("free_rows", [0, 3, 31])
def test_a_disk_that_becomes_full_turns_it_off(
    small_disk: Path, free_rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(small_disk / "store", 32, BIG)
    one = torch.tensor([0])
    store.write(one, rows(one, BIG))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "else").write_bytes(bytes(free - free_rows * store.row_bytes))
    for row in torch.arange(1, 32).split(1):
        store.write(row, rows(row, BIG))
    assert inside(small_disk / "store") == []
    check_is_off(store, "No space left on device", caplog)


def test_a_disk_with_too_little_room_is_not_begun(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(small_disk / "store", 32, BIG, spare_bytes=1 << 20)
    assert store.is_disabled
    fill(store)
    assert inside(small_disk / "store") == []
    check_is_off(store, "bytes and 1,048,576 to be left free; the disk has 2,0", caplog)


def test_what_others_will_still_write_is_not_free(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = torch.tensor([0])
    with contextlib.closing(open_store(small_disk / "store", 24, BIG)) as first:
        first.write(one, rows(one, BIG))
        assert not warnings_of(caplog)
        check_is_off(open_store(small_disk / "store", 24, BIG, "l"), "the disk has", caplog)


@contextlib.contextmanager
def longest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow_turns_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, content = open_store(tmp_path, 8, BIG), rows(ALL, BIG)
    store.write(ALL[:2], rows(ALL[:2], BIG))
    with longest_file(int(4.5 * store.row_bytes)):  # it is met in the middle of a row
        for row in ALL.split(1):
            store.write(row, [tensor[row] for tensor in content])
            assert (store.read(row) is not None) == (row < 4)
    assert inside(tmp_path) == []
    check_is_off(store, "File too large", caplog)


def test_a_file_that_may_not_be_as_long_as_all_rows_is_not_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    with longest_file(64):
        store.write(ALL[:1], rows(ALL[:1], FIELDS))
    assert inside(tmp_path) == []
    check_is_off(store, "File too large", caplog)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder cannot be written by this process, which is nobody if it is root."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def test_a_folder_that_can_only_be_read_serves_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        filled(folder).close()
        with read_only(folder):
            with contextlib.closing(open_store(folder)) as store:
                assert same_bits(store.read(ALL), rows(ALL, FIELDS))
            assert not warnings_of(caplog)
            store = open_store(folder, key="l")
            fill(store)
            check_is_off(store, "Permission denied", caplog)


def test_features_that_another_user_keeps_to_himself_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.closing(filled(folder)) as store:
            (store.path / "rows.bin").chmod(0)
        with read_only(folder):
            check_is_off(open_store(folder), "Permission denied", caplog)
        assert len(inside(folder)) == 1


def test_a_folder_that_cannot_be_made_turns_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    check_is_off(open_store(tmp_path / "file" / "store"), "Not a directory", caplog)


def test_a_folder_that_disappears_turns_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path / "store")
    store.write(ALL[:7], rows(ALL[:7], FIELDS))
    shutil.rmtree(tmp_path / "store")
    store.write(ALL[7:], rows(ALL[7:], FIELDS))
    check_is_off(store, "No such file or directory", caplog)


# The folder's limit


def a_bit_later(store: DiskStore) -> DiskStore:
    """Later by the file system's clock, which ticks in steps."""
    probe = store.path.parent.parent / "probe"
    probe.touch()
    before = probe.stat().st_mtime_ns

    def has_ticked() -> bool:
        probe.touch()
        return probe.stat().st_mtime_ns > before

    wait_until(has_ticked)
    return store


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("when", ["written", "opened", "closed"])
def test_what_was_used_longest_ago_makes_room(
    tmp_path: Path, order: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paths = {}
    # Nothing is closed that is not said to be: as if its process had died.
    for key in order if when == "written" else order[::-1]:
        paths[key] = a_bit_later(filled(tmp_path, key)).path
    if when == "opened":
        for key in order:
            a_bit_later(open_store(tmp_path, key=key))
    if when == "closed":
        stores = {key: open_store(tmp_path, key=key) for key in order[::-1]}
        for key in order:
            a_bit_later(stores[key]).close()
    most = int(2.5 * sum(file.stat().st_size for file in paths["a"].iterdir()))
    with contextlib.closing(open_store(tmp_path, key="c", max_bytes=most)) as third:
        assert all(path.exists() for path in paths.values())  # nothing goes before something comes
        fill(third, "c")
        assert [key for key in order if paths[key].exists()] == [order[1]]
    assert f"features {paths[order[0]]} are removed to make room" in caplog.text
    assert not warnings_of(caplog)


@pytest.mark.parametrize("is_opened", [True, False])
def test_what_is_open_is_never_removed(tmp_path: Path, is_opened: bool, caplog: pytest.LogCaptureFixture) -> None:
    oldest = filled(tmp_path, "a")
    if is_opened:
        oldest.close()
        oldest = open_store(tmp_path, key="a")
    a_bit_later(oldest)
    filled(tmp_path, "b").close()
    most = int(2.5 * sum(file.stat().st_size for file in oldest.path.iterdir()))
    with contextlib.closing(filled(tmp_path, "c", max_bytes=most)) as newest:
        assert set(inside(tmp_path)) == {oldest.path.name, newest.path.name}
        assert not warnings_of(caplog)
        check_is_off(open_store(tmp_path, key="d", max_bytes=most), "allowed, ", caplog)
    assert same_bits(oldest.read(ALL), rows(ALL, FIELDS, "a"))
    oldest.close()


def test_features_beyond_the_limit_are_refused_before_anything_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, "a").close()
    store = open_store(tmp_path, 100, max_bytes=2000)
    fill(store)
    assert len(inside(tmp_path)) == 1
    check_is_off(store, "bytes and at most 2,000 are allowed", caplog)


# Memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident set is read from /proc")
def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    (said,) = processes("measure_memory", [str(tmp_path)])
    assert said["bytes"] >= 400e6
    assert said["mapped"] > 0.9 * said["bytes"]  # the meter works
    assert said["written"] < 40e6
    assert said["read"] < 40e6


def test_a_fork_that_outlives_its_killed_parent_does_not_keep_an_entry_in_use(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    path = os.pathsep.join([str(Path(featurestore_rows.__file__).parent), os.environ.get("PYTHONPATH", "")])
    surroundings = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=surroundings) as holder:
        assert holder.stdout is not None
        fork = int(holder.stdout.readline())
        (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert _is_in_use(entry)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(fork, 0)  # it is still there
        assert not _is_in_use(entry)
