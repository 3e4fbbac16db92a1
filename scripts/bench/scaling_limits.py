"""Where the design ends, for scaling.py: the plan's numbers and the measured ones against what is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from mtl.config.checkpoint import CheckpointConfig
from mtl.data import BUILT_IN
from mtl.data.generated.sprites import load_sprites
from mtl.distributed.world import TIMEOUT_S
from mtl.runtime.text import in_bytes as in_small_bytes
from mtl.tasks import build_tasks
from scaling_costs import Assumptions, Case, Measured, config_of

_MANY = 1024
# Images of a device at the smallest batches that a BatchNorm which trains can take.
_LEAST = 2


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short_name(case: Case) -> str:
    """The trunk without its patch and input size."""
    return case.trunk.split("_patch")[0]


def in_bytes(number: float) -> str:
    """Bytes in the unit that fits, up to PB."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}" if number < 1000 * factor else f"{number / factor:,.0f} {unit}"
    return in_small_bytes(round(number))


def in_seconds(seconds: float) -> str:
    """A time in the unit that fits."""
    for unit, factor in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * factor or (unit == "s" and seconds >= 1):
            return f"{seconds / factor:.3g} {unit}" if seconds < 1000 * factor else f"{seconds / factor:,.0f} {unit}"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms" if seconds else "0"


def in_words(number: float) -> str:
    """Two digits of a number of images."""
    for unit, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= factor:
            return f"{float(f'{number / factor:.2g}'):g} {unit}"
    return f"{number:.2g}"


@cache
def bytes_of_an_image(image_size: int) -> int:
    """What `scenes` holds of an image: itself and the labels of all four tasks."""
    data = BUILT_IN["scenes"].module
    block = data.render_block(load_sprites("train"), image_size, 0, 0)
    return sum(int(array.nbytes) for array in block.values()) // int(data.BLOCK)


def checkpoint_bytes(case: Case) -> tuple[int, int]:
    """What is written once for all checkpoints of a phase, and with each: average, weights as they train, moments."""
    frozen = case.weights - case.buffers - case.plan.trainable.bytes
    return frozen, case.weights - frozen + case.plan.memory.average + (case.plan.memory.optimizer_state or 0)


def limits(cases: Sequence[Case], a: Assumptions) -> str:
    """A table of what grows with devices or images, and where it ends."""
    header = ["what", "how much", "ends at"]
    return table(header, [*_of_images(cases[0].image_size, a), *_of_features(cases, a), *_of_devices(cases, a)])


def _of_images(image_size: int, a: Assumptions) -> list[list[str]]:
    each, disk, wait = bytes_of_an_image(image_size), 1e9 * a.disk_gb, f"{TIMEOUT_S:g} s"
    ram, own = 1e9 * a.host_ram_gb, 1e9 * a.host_ram_gb / a.devices_per_node
    of = f"{in_bytes(each)} an image"
    order, tight = (8 + Measured.share_bytes / batch for batch in (a.batch_per_device, _LEAST))
    shares = f"{order - 8:.3g} B with {a.batch_per_device} images a device, {tight - 8:g} B with {_LEAST}"
    ends = f"{in_words(own / order)} images, or {in_words(own / tight)}: the process's memory"
    hashed = f"{in_words(1e9 * a.disk_gb_s * TIMEOUT_S / each)} images, for {wait}"
    return [
        [
            "the data set is made in one process, twice over in memory [plan]",
            of,
            f"{in_words(ram / (2 * each))} images",
        ],
        ["every process reads and hashes all of it at the start [plan]", of, hashed],
        ["a node's memory has it once: processes map one file [measured]", of, f"{in_words(ram / each)} images"],
        ["beyond, each image is a random read of its node's disk [plan]", of, f"{in_words(disk / each)} images"],
        [
            "order of an epoch and all ranks' shares of it, in every process [measured]",
            f"8 B an image, and {shares}",
            ends,
        ],
    ]


def _of_features(cases: Sequence[Case], a: Assumptions) -> list[list[str]]:
    rows = []
    for case in [case for case in cases if case.plan.name == "a" and case.kept_bytes]:
        rooms = (1e9 * a.host_ram_gb * a.features_ram_share, 1e9 * a.disk_gb)
        ram, disk = (
            " / ".join(in_words(-(-n // a.devices_per_node) * room / case.kept_bytes) for n in (8, _MANY))
            for room in rooms
        )
        ends = f"{ram} images in memory, {disk} on disk, on 8 / {_MANY:,}"
        rows.append([f"kept features of {short_name(case)} [plan]", f"{in_bytes(case.kept_bytes)} an image", ends])
    fill, look = Measured.fill_ns * 1e-9 * _MANY, Measured.lookup_us * _MANY / 1e6
    filled = f"{in_seconds(1e9 * fill)} for 10^9 images on {_MANY:,}"
    looked, few = f"{in_seconds(look)} a step on {_MANY:,}", int(1e3 / Measured.lookup_us)
    return [
        *rows,
        [
            "who computes which features, found for every rank [measured]",
            filled,
            f"{in_words(TIMEOUT_S / fill)} images",
        ],
        ["who has which features, found for every rank [measured]", looked, f"{few} devices, for 1 ms a step"],
    ]


def _of_devices(cases: Sequence[Case], a: Assumptions) -> list[list[str]]:
    last, norms = cases[-1], max(cases, key=lambda case: case.buffers)
    tasks = build_tasks(config_of(last.trunk, last.image_size)).values()
    outputs = 4 * sum(task.num_outputs * (last.image_size**2 if task.output == "dense" else 1) for task in tasks)
    metrics = sum(tensor.nbytes for task in tasks for tensor in task.metrics().state())
    whole, (frozen, saved) = int(1e9 * a.device_gb / outputs), checkpoint_bytes(last)
    every, on = 60 * CheckpointConfig().every_minutes, f"on {_MANY:,}"
    failure, read = 3600 * a.device_mtbf_h / _MANY, _MANY * (frozen + saved)
    ends = f"batches of {in_words(whole)}: {whole // a.batch_per_device} devices of {a.batch_per_device}, at most"
    pause = f"{saved / (1e9 * a.write_gb_s) / every:.1%} of the time; {in_bytes(1e9 * a.write_gb_s * TIMEOUT_S)}"
    lost = f"{in_seconds(every / 2)} of work and a start, each time"
    taken = f"{in_seconds(read / (1e9 * a.shared_read_gb_s))} at each start"
    states, statistics = in_bytes(_MANY * Measured.random_state_bytes), in_bytes(_MANY * norms.buffers)
    what = "validation and filling run global batches in one process [plan]"
    return [
        [what, f"{in_bytes(outputs)} of outputs an image", ends],
        ["the first process writes, all wait [plan]", f"{in_bytes(saved)}, {short_name(last)}", pause],
        ["every process reads all of a checkpoint [plan]", f"{in_bytes(read)} {on}, {short_name(last)}", taken],
        ["if one process dies, all end [assumed]", f"every {in_seconds(failure)} {on}", lost],
        ["every process gathers all random states [measured]", f"{states} {on}", "not here"],
        ["and, inside epochs, norms' statistics [plan]", f"{statistics} {on}, {short_name(norms)}", "not here"],
        ["sums of metrics, a validation [plan]", in_bytes(metrics), "never: the same for any number"],
        ["digests of what processes hold, an epoch [plan]", f"{in_bytes(32 * _MANY)} {on}", "not here"],
    ]
