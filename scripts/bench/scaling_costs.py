"""The arithmetic of scripts/bench/scaling.py: what devices hold, send and wait for, from the numbers of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtl.config import RunConfig
from mtl.model.fsdp import blocks
from mtl.model.prefix import Prefix
from mtl.phases.enter import entered
from mtl.phases.plan import PhasePlan, make_plan
from mtl.phases.setup import ModelSetup, build_meta_setup

CONFIG = Path(__file__).parents[2] / "configs/scenes.yaml"
PHASES = {"trunk frozen": ["trunk"], "first half frozen": ["trunk@first:50%"], "nothing frozen": []}
# DDP sends gradients in portions of this size.
_BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Assumptions:
    """What the reader's machines give; each is an option of the script, in the units of its name."""

    device_tflops: float = 300.0
    utilisation: float = 0.35
    device_gb: float = 80.0
    devices_per_node: int = 8
    node_link_gb_s: float = 200.0
    link_gb_s: float = 25.0
    link_us: float = 10.0
    cpu_message_us: float = 30.0
    host_ram_gb: float = 1000.0
    features_ram_share: float = 0.5
    host_link_gb_s: float = 25.0
    disk_gb: float = 10_000.0
    disk_gb_s: float = 5.0
    write_gb_s: float = 2.0
    shared_read_gb_s: float = 100.0
    device_mtbf_h: float = 50_000.0
    batch_per_device: int = 32
    global_batch: int = 2048

    @property
    def flops_per_s(self) -> float:
        return 1e12 * self.device_tflops * self.utilisation

    def link(self, num_devices: int) -> float:
        """Bytes a second that a device sends."""
        return 1e9 * (self.node_link_gb_s if num_devices <= self.devices_per_node else self.link_gb_s)


@dataclass(frozen=True)
class Measured:
    """Medians of `scripts/bench/scaling_measured.py` with one thread, on a shared core of an Intel Xeon (AVX-512)."""

    hash_gb_s: float = 11.1
    permutation_ns: float = 28.8
    share_bytes: int = 600
    share_us: float = 2.7
    fill_ns: float = 2.26
    lookup_us: float = 31.1
    random_state_bytes: int = 14_536


@dataclass(frozen=True)
class Case:
    """A phase of a trunk.

    Attributes:
        trunk: Its name.
        image_size: Height and width of images, in pixels.
        plan: What the plan says of the phase, for one process.
        buffers: Bytes of the model's buffers, which FSDP2 does not shard.
        gathered: Bytes of weights that are whole at a time under FSDP2: those of the trunk in no block, and two blocks,
            since the next one is fetched while one computes.
        gathered_gradient: Bytes of gradients that are whole at a time: those of the block with the most of them.
        num_units: Parts that FSDP2 fetches one after the other.
        left_forward: Operations of the forward that are left if what is frozen at the trunk's beginning is kept.
    """

    trunk: str
    image_size: int
    plan: PhasePlan
    buffers: int
    gathered: int
    gathered_gradient: int
    num_units: int
    left_forward: int

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        return self.plan.memory.weights

    @property
    def stepped(self) -> int:
        """Bytes of what training adds: gradients, the optimizer's state, the average."""
        memory = self.plan.memory
        return memory.gradients + (memory.optimizer_state or 0) + memory.average

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept of an image; 0 if nothing can be."""
        return self.plan.kept.bytes_per_image if self.plan.kept is not None else 0

    def ddp_bytes(self) -> int:
        """What each device holds under DDP, activations not counted."""
        return self.weights + self.stepped

    def fsdp_bytes(self, num_devices: int) -> int:
        """What each device holds at most under FSDP2, activations not counted."""
        if num_devices == 1:
            return self.ddp_bytes()
        spread = self.weights - self.buffers + self.stepped
        return -(-spread // num_devices) + self.buffers + self.gathered + self.gathered_gradient

    def ddp_sent(self, num_devices: int) -> int:
        """What each device sends a step under DDP: the plan's `sent_bytes` for `num_devices` processes."""
        return 2 * (num_devices - 1) * self.plan.reduced_bytes // num_devices

    def fsdp_sent(self, num_devices: int) -> int:
        """What each device sends a step under FSDP2: all weights, and those trained twice more, for the backward."""
        moved = self.weights - self.buffers + 2 * self.plan.reduced_bytes
        return (num_devices - 1) * moved // num_devices


@dataclass(frozen=True)
class Step:
    """Seconds of a step: what is computed, and what is waited for."""

    compute: float
    gradients: float = 0.0
    kept: float = 0.0
    control: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.gradients + self.kept + self.control


def step(
    case: Case, num_devices: int, batch: float, a: Assumptions, *, keeps: bool = False, fsdp: bool = False
) -> Step:
    """The time of a step, in which traffic overlaps with what is computed at the same time.

    Args:
        case: The phase.
        num_devices: How many there are.
        batch: Images for each of them.
        a: What they give.
        keeps: Whether features are kept, in the memory of the hosts.
        fsdp: Whether the model is sharded.
    """
    flops = case.plan.flops
    forward = batch * (case.left_forward if keeps else flops.forward) / a.flops_per_s
    backward = batch * flops.backward / a.flops_per_s
    read = batch * case.kept_bytes / (1e9 * a.host_link_gb_s) if keeps else 0.0
    if num_devices == 1:
        return Step(forward + backward, kept=read)
    rate, hops = a.link(num_devices), 2 * math.log2(num_devices)
    if fsdp:
        fetched = (num_devices - 1) * (case.weights - case.buffers) / num_devices
        # One way through the tree for each part: to fetch it, to fetch it again, to hand its gradients on.
        begun = case.num_units * hops / 2 * a.link_us * 1e-6
        behind = max(0.0, fetched / rate + begun - forward)
        behind += max(0.0, (case.fsdp_sent(num_devices) - fetched) / rate + 2 * begun - backward)
    else:
        portions = -(-case.plan.reduced_bytes // _BUCKET)
        behind = max(0.0, case.ddp_sent(num_devices) / rate + portions * hops * a.link_us * 1e-6 - backward)
    if keeps:
        read += batch * case.kept_bytes * (num_devices - 1) / num_devices / rate
        read += num_devices * Measured.lookup_us * 1e-6
    # The message between CPUs, the mean of the losses, the sum of their weights.
    control = hops * (a.cpu_message_us + 2 * a.link_us) * 1e-6
    return Step(forward + backward, behind, read, control)


def per_device_efficiency(case: Case, num_devices: int, a: Assumptions, **how: bool) -> float:
    """How fast a device is among `num_devices` against alone, with as many images for each."""
    alone = step(case, 1, a.batch_per_device, a, **how).seconds
    return alone / step(case, num_devices, a.batch_per_device, a, **how).seconds


def global_efficiency(case: Case, num_devices: int, a: Assumptions, **how: bool) -> float:
    """The same, with one global batch shared by all."""
    alone = step(case, 1, a.global_batch, a, **how).seconds
    return alone / (num_devices * step(case, num_devices, a.global_batch / num_devices, a, **how).seconds)


def epoch_seconds(case: Case, num_devices: int, num_images: float, a: Assumptions) -> float:
    """The steps of an epoch, with as many images for each device as there are."""
    batch = min(a.batch_per_device * num_devices, num_images)
    return max(1, num_images // batch) * step(case, num_devices, batch / num_devices, a).seconds


def config_of(trunk: str, image_size: int) -> RunConfig:
    """configs/scenes.yaml with another trunk, and the phases that are looked at."""
    content: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["trunk"] = {"name": trunk, "weights": "none"}
    content["data"]["image_size"] = image_size
    content["optim"] = {"ema_decay": 0.999}
    content["memory_format"] = "contiguous"
    content["phases"] = [
        {"name": name, "freeze": patterns, "epochs": 10} for name, patterns in zip("abc", PHASES.values(), strict=True)
    ]
    return RunConfig.model_validate(content)


def study(trunk: str, image_size: int) -> list[Case]:
    """The three phases of a trunk, on the meta device."""
    model_setup = build_meta_setup(config_of(trunk, image_size))
    plan = make_plan(model_setup, with_forecast=True)
    model = model_setup.model
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks(model.trunk)]
    rest = sum(p.nbytes for p in model.trunk.parameters()) - sum(sizes)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    units = [*blocks(model.trunk), *model.heads.values()]
    cases = []
    for index, phase in enumerate(plan.phases):
        with entered(model_setup.root, model_setup.phases[index].freeze.plan):
            left = _left_forward(model_setup, phase)
        gradients = max(sum(p.nbytes for p in unit.parameters() if p.requires_grad) for unit in units)
        cases.append(Case(trunk, image_size, phase, buffers, rest + 2 * max(sizes), gradients, len(units), left))
    return cases


def _left_forward(model_setup: ModelSetup, phase: PhasePlan) -> int:
    """Operations of a forward on one image without what is kept."""
    model = model_setup.model
    if phase.kept is None or phase.kept.why_not:
        return phase.flops.forward
    images = model.example_inputs(3)
    prepared = model.prepare(images)
    prefix = Prefix.forecast(model.trunk, model.read, prepared)
    with sdpa_kernel(SDPBackend.MATH):
        kept = prefix.compute(prepared)
        whole, part = (
            _operations(partial(run, given)) for run, given in ((model.read, prepared), (prefix.replay, kept))
        )
    return phase.flops.forward - (whole - part) // len(images)


def _operations(run: partial[Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
