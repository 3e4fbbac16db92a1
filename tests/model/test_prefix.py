"""The frozen prefix: what is kept of it gives the bits of a plain pass, in features and gradients, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from device_sync import no_device_sync
from mtl.freeze import enforce, plan_freeze
from mtl.model.prefix import Prefix, PrefixError
from mtl.model.prefix.cut import find_cut
from mtl.model.prefix.trace import no_side_effects, record_trace
from mtl.model.trunk import Features, pyramid_levels, read_features

CPU = torch.device("cpu")
Read = Callable[[Tensor], Features]


def frozen(trunk: nn.Module, *patterns: str) -> nn.Module:
    """The trunk, of which some is frozen as in a run."""
    model = nn.Module()
    model.trunk = trunk
    enforce(model, plan_freeze(model, [f"trunk{pattern}" for pattern in patterns]))
    return trunk


def build(name: str, *patterns: str, pooled: bool = True, **options: Any) -> tuple[nn.Module, Read]:
    trunk = frozen(timm.create_model(name, pretrained=False, num_classes=0, **options), *patterns)
    return trunk, partial(read_features, trunk, levels=pyramid_levels(trunk), pooled=pooled)


def small_resnet(*patterns: str, **options: Any) -> tuple[nn.Module, Read]:
    return build("resnet10t", *patterns, **options)


def pictures(number: int, size: int = 64) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(number))


def rows_of(kept: list[Tensor]) -> list[Tensor]:
    """The kept tensors as they come out of a store of rows."""
    stored = [[row.contiguous().clone() for row in tensor] for tensor in kept]
    return [torch.stack(rows) for rows in stored]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def drawn(trunk: nn.Module, run: Callable[[], Features]) -> tuple[list[bytes], dict[str, bytes]]:
    """The bits of the features, and of the gradients that a loss of them gives."""
    with no_side_effects(trunk, CPU):
        torch.manual_seed(1)
        tensors = run().tensors()
        live = [tensor for tensor in tensors if tensor.requires_grad]
        if live:
            torch.stack([tensor.float().square().sum() for tensor in live]).sum().backward()
    grads = {name: bits(p.grad) for name, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad(set_to_none=True)
    return [bits(tensor) for tensor in tensors], grads


def assert_same(prefix: Prefix, trunk: nn.Module, read: Read, images: Tensor) -> None:
    """A plain pass, a run, and a replay of what was run or computed, agree in features and gradients."""
    plain = drawn(trunk, lambda: read(images))
    assert drawn(trunk, lambda: prefix.run(images)[0]) == plain
    with no_side_effects(trunk, CPU):
        kept, computed = prefix.run(images)[1], prefix.compute(images)
    assert [bits(tensor) for tensor in kept] == [bits(tensor) for tensor in computed]
    assert not any(tensor.requires_grad for tensor in kept + computed)
    assert [(tuple(t.shape), t.dtype) for t in kept] == [
        ((len(images), *shape), dtype) for shape, dtype in zip(prefix.shapes, prefix.dtypes, strict=True)
    ]
    stored = rows_of(computed)
    before = [bits(tensor) for tensor in stored]
    assert drawn(trunk, lambda: prefix.replay(stored)) == plain
    assert [bits(tensor) for tensor in stored] == before, "a replay changed what was kept"
    assert prefix.agrees(images)


def check(trunk: nn.Module, read: Read, size: int = 64) -> Prefix:
    prefix = Prefix.record(trunk, read, pictures(4, size))
    for number in (4, 2):
        assert_same(prefix, trunk, read, pictures(number, size))
    return prefix


def readers_of(trunk: nn.Module, read: Read, size: int = 64) -> list[str]:
    """Names of the modules in which kept tensors meet trainable parameters."""
    return find_cut(*(record_trace(trunk, read, pictures(3, size)[:number]) for number in (3, 2))).readers


def state_of(trunk: nn.Module) -> list[Any]:
    """All that a pass could leaves: tensors by identity, version and bits, modes, attributes, hooks."""
    tensors = [*trunk.named_parameters(), *trunk.named_buffers()]
    return [
        [(name, id(t), t._version, bits(t), t.requires_grad, t.grad) for name, t in tensors],
        [(m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in trunk.modules()],
        [len(m._forward_hooks_with_kwargs) + len(m._forward_pre_hooks_with_kwargs) for m in trunk.modules()],
        list(trunk.state_dict()),
        bits(torch.get_rng_state()),
    ]


# What is kept


def test_the_boundary_of_a_resnet_and_the_levels_before_it_are_kept() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    prefix = check(trunk, read)
    assert prefix.shapes == [(64, 16, 16), (128, 8, 8)]
    assert prefix.dtypes == [torch.float32] * 2
    assert prefix.bytes_per_image == 4 * (64 * 16 * 16 + 128 * 8 * 8)
    assert {"conv1", "bn1", "layer1", "layer2"} <= set(prefix.modules)
    assert not any(name.startswith("layer1.") for name in prefix.modules), "the outermost modules are named"
    assert readers_of(trunk, read) == ["layer3.0.conv1", "layer3.0.downsample.1"]


def test_without_levels_only_the_boundary_is_kept() -> None:
    trunk, _ = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    prefix = check(trunk, partial(read_features, trunk, levels=[], pooled=True))
    assert prefix.shapes == [(128, 8, 8)]


@pytest.mark.parametrize(
    "patterns, shapes",
    [
        ((".conv1", ".bn1"), [(64, 16, 16)]),  # after the stem: the pooled map is smaller than what is pooled
        ((".conv1", ".bn1", ".layer1", ".layer2", ".layer3"), [(64, 16, 16), (128, 8, 8), (256, 4, 4)]),
    ],
)
def test_the_boundary_may_lie_at_either_end(patterns: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    trunk, read = small_resnet(*patterns)
    assert check(trunk, read).shapes == shapes


def test_a_trunk_frozen_as_a_whole_keeps_its_features() -> None:
    trunk, read = small_resnet("")
    prefix = check(trunk, read)
    assert prefix.shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512,)]
    assert (prefix.modules, readers_of(trunk, read)) == ((), [])
    ran = []
    trunk.conv1.register_forward_hook(lambda *_: ran.append("conv1"))  # type: ignore[operator, union-attr]
    prefix.replay(prefix.compute(pictures(2)))
    assert ran == ["conv1"], "only what is computed runs"


def test_a_vit_keeps_the_tokens_at_the_boundary_once() -> None:
    trunk, _ = build("vit_tiny_patch16_224", "@first:50%", img_size=32, depth=4)
    read = partial(read_features, trunk, levels=[1, 3], pooled=True)
    prefix = check(trunk, read, 32)
    # The level is these tokens in another shape, and is made of them in the replay.
    assert prefix.shapes == [(5, 192)]
    assert readers_of(trunk, read, 32)[0].startswith("blocks.2")


def test_a_position_table_that_trains_leaves_only_what_lies_before_it() -> None:
    trunk, read = build("vit_tiny_patch16_224", ".patch_embed", ".blocks", ".cls_token", img_size=32, depth=4)
    prefix = check(trunk, read, 32)
    assert prefix.modules == ("patch_embed",)
    assert readers_of(trunk, read, 32) == ["the trunk itself"]


def test_convnext_with_dropped_paths_draws_the_same_random_numbers() -> None:
    trunk, read = build("convnext_atto", "@first:50%", drop_path_rate=0.5)
    check(trunk, read)


def test_a_partly_frozen_block_keeps_its_input_and_not_what_is_cheaply_made_of_it() -> None:
    trunk, read = build("vit_tiny_patch16_224", ".patch_embed", ".pos_embed", ".cls_token", ".blocks.0",
                        ".blocks.1.norm1", img_size=32, depth=3)  # fmt: skip
    of_pooled = partial(read_features, trunk, levels=[], pooled=True)
    prefix = check(trunk, of_pooled, 32)
    assert prefix.shapes == [(5, 192)]
    assert "blocks.1" in readers_of(trunk, of_pooled, 32), "the sum over the skip connection reads the block's input"
    assert read(pictures(1, 32)).pooled is not None


def test_channels_last_is_restored() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = pictures(4).contiguous(memory_format=torch.channels_last)
    prefix = Prefix.record(trunk, read, images)
    for number in (4, 2):
        assert_same(prefix, trunk, read, images[:number])
    plain, replayed = read(images), prefix.replay(rows_of(prefix.compute(images)))
    assert [level.stride() for level in replayed.pyramid] == [level.stride() for level in plain.pyramid]


def test_bf16_activations_are_kept_as_they_are() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prefix = check(trunk, read)
    assert torch.bfloat16 in prefix.dtypes


def test_a_checkpointed_forward_replays_with_the_same_gradients() -> None:
    for name, options in [("resnet10t", {}), ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4})]:
        trunk, read = build(name, "@first:50%", **options)
        trunk.set_grad_checkpointing()  # type: ignore[operator]
        check(trunk, read)


def test_a_prefix_serves_validation_too() -> None:
    trunk, read = build("convnext_atto", "@first:50%", drop_path_rate=0.5)
    prefix = Prefix.record(trunk, read, pictures(3))
    trunk.eval()
    with torch.no_grad():
        replayed = prefix.replay(rows_of(prefix.compute(pictures(2))))
        assert [bits(t) for t in replayed.tensors()] == [bits(t) for t in read(pictures(2)).tensors()]


def test_one_image_is_enough_to_record() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = pictures(4).contiguous(memory_format=torch.channels_last)
    prefix = Prefix.record(trunk, read, images[:1])
    for number in (4, 1):
        assert_same(prefix, trunk.eval() if number == 1 else trunk, read, images[:number])


# Trunks by hand


class Sequence(nn.Sequential):
    """Read by its output alone."""

    def read(self, images: Tensor) -> Features:
        return Features([self(images)], None)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


def by_hand(*modules: nn.Module, train_from: int) -> tuple[Sequence, Read]:
    trunk = Sequence(*modules)
    for number, module in enumerate(modules):
        module.requires_grad_(number >= train_from).train(number >= train_from)
    return trunk, trunk.read


@pytest.mark.parametrize(
    "tail",
    [[nn.ReLU(inplace=True), conv()], [nn.Dropout(0.5), conv()], [nn.BatchNorm2d(3), nn.ReLU(inplace=True), conv()]],
)
def test_what_is_trained_may_change_its_input_in_place_or_drop_of_it(tail: list[nn.Module]) -> None:
    trunk, read = by_hand(conv(), conv(), *tail, train_from=2)
    check(trunk, read, 8)


class Block(nn.Module):
    """Calls that a prefix can stumble on; `first` and `second` are frozen or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.last = conv(), Sizes(), conv()
        self.kind = kind
        self.first.requires_grad_(False).eval()
        self.second.requires_grad_(False).eval()

    def read(self, images: Tensor) -> Features:
        return Features([getattr(self, self.kind)(images)], None)

    def twice(self, images: Tensor) -> Tensor:
        return self.last(self.first(self.first(images)))

    def mixed_twice(self, images: Tensor) -> Tensor:
        return self.last(self.first(self.last(self.first(self.first(images)))))

    def residual(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(self.first(x)) + x

    def functional(self, images: Tensor) -> Tensor:
        x = functional.silu(self.first(images))
        x += 1
        return self.last(x)

    def structured(self, images: Tensor) -> Tensor:
        out = self.second(x=self.first(images), flag=True)
        height, width = out["sizes"]
        return self.last(out["maps"][0].view(-1, 3, height, width) + out["maps"][1])

    def folded(self, images: Tensor) -> Tensor:
        x = self.first(images)
        windows = self.second(x.view(-1, 3, 4, 8), flag=True)["maps"][0]
        return self.last(windows.view_as(x))

    def branches(self, images: Tensor) -> Tensor:
        return self.last(functional.dropout(self.last(images), 0.5, self.training)) + self.last(self.first(images))

    def late(self, images: Tensor) -> Tensor:
        x = self.first(images)
        y = functional.dropout(self.last(x), 0.5, self.training)
        return y + self.last(self.first(self.first(x)))

    def checkpointed(self, images: Tensor) -> Tensor:
        def again(x: Tensor) -> Tensor:
            return self.last(self.first(self.first(x)))

        return checkpoint(again, self.first(images), use_reentrant=False)  # type: ignore[no-any-return]

    def branching_on_numbers(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(x if x.mean().item() > 100 else self.first(x))

    def aliased(self, images: Tensor) -> Tensor:
        x = self.first(images)
        functional.relu_(x.view(-1))
        return self.last(x)

    def sequence_first(self, images: Tensor) -> Tensor:
        x = self.first(images).transpose(0, 1)
        return self.last(self.second(x, flag=True)["maps"][0].transpose(0, 1))


class Sizes(nn.Module):
    """Takes keywords, returns nested tensors and plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor, *, flag: bool) -> dict[str, Any]:
        assert flag
        return {"maps": [x * self.scale[0, 0], x + 1], "sizes": (x.shape[-2], x.shape[-1])}


@pytest.mark.parametrize(
    "kind, num_kept",
    [
        ("twice", 1),
        ("mixed_twice", 1),
        ("residual", 2),
        ("functional", 1),
        ("structured", 2),
        ("folded", 1),
        ("late", 2),
        ("checkpointed", 1),
        ("branching_on_numbers", 2),
        ("sequence_first", 1),
    ],
)
def test_calls_of_every_kind_give_the_same_bits(kind: str, num_kept: int) -> None:
    trunk = Block(kind)
    prefix = check(trunk, trunk.read, 8)
    assert len(prefix.shapes) == num_kept
    assert all(shape == (3, 8, 8) for shape in prefix.shapes)


def test_computing_does_not_move_statistics_of_a_part_that_trains_earlier() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen, self.last = nn.BatchNorm2d(3), conv().requires_grad_(False).eval(), conv()

        def read(self, images: Tensor) -> Features:
            x = self.frozen(images)
            y = self.norm(x)
            return Features([self.last(y + self.frozen(x))], None)

    trunk = Two()
    prefix = check(trunk, trunk.read, 8)
    before = state_of(trunk)
    prefix.compute(pictures(3, 8))
    assert state_of(trunk) == before


class Program(nn.Module):
    """A trunk that does what it is told: each line takes earlier tensors and makes one more, or changes one."""

    def __init__(self, lines: list[tuple[str, int, int]], frozen_modules: list[bool]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv() for _ in frozen_modules)
        self.norm, self.act, self.pair = nn.BatchNorm2d(3), nn.ReLU(inplace=True), Pair()
        for module, is_frozen in zip(self.convs, frozen_modules, strict=True):
            module.requires_grad_(not is_frozen).train(not is_frozen)
        self.norm.requires_grad_(not frozen_modules[0]).train(not frozen_modules[0])
        self.lines = lines

    def read(self, images: Tensor) -> Features:
        made = [self.convs[0](images)]
        for kind, one, two in self.lines:
            a, b = made[one % len(made)], made[two % len(made)]
            match kind:
                case "conv":
                    made.append(self.convs[two % len(self.convs)](a))
                case "add":
                    made.append(a + b)
                case "add in place":
                    # A copy, or autograd objects to some programs.
                    c = a.clone()
                    c += b
                    made.append(c)
                case "act in place":
                    made.append(self.act(a + 0 if a.requires_grad else a))
                case "norm":
                    made.append(self.norm(a))
                case "pair":
                    made.extend(self.pair(a, other=b)[0])
                case "view":
                    made.append(a.view(-1, 3, 4, 16).transpose(2, 3).reshape(a.shape))
                case "drop":
                    made.append(functional.dropout(a, 0.5, self.training))
        return Features(made[-2:], made[-1].mean((2, 3)))


class Pair(nn.Module):
    """No parameters; two outputs in a list, and a number."""

    def forward(self, x: Tensor, *, other: Tensor) -> tuple[list[Tensor], int]:
        return [x * 2, other.sigmoid()], 2


KINDS = ["conv", "add", "add in place", "act in place", "norm", "pair", "view", "drop"]
LINES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)


@settings(max_examples=60, derandomize=True)
@given(LINES, st.lists(st.booleans(), min_size=2, max_size=4))
def test_any_program_is_kept_to_the_bit_or_refused(lines: list[tuple[str, int, int]], is_frozen: list[bool]) -> None:
    trunk = Program(lines, [True, *is_frozen])
    try:
        drawn(trunk, lambda: trunk.read(pictures(3, 8)))
    except RuntimeError:  # changed in place what a backward needs: no program to begin with
        assume(False)
    before = state_of(trunk)
    try:
        prefix = Prefix.record(trunk, trunk.read, pictures(3, 8))
    except PrefixError:
        prefix = None
    assert state_of(trunk) == before
    if prefix is not None:
        assert_same(prefix, trunk, trunk.read, pictures(4, 8))


# Refusals


def test_a_trunk_that_trains_from_its_start_is_refused() -> None:
    trunk = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(PrefixError, match=r"conv1\.0 needs the images, and no frozen module is before it"):
        Prefix.record(trunk, partial(read_features, trunk, levels=[], pooled=True), pictures(2))
    trunk, read = small_resnet(".layer3")
    with pytest.raises(PrefixError, match="needs the images"):
        Prefix.record(trunk, read, pictures(2))


@pytest.mark.parametrize("kind, message", [("branches", "needs the images"), ("aliased", "under another name")])
def test_what_cannot_be_followed_is_refused(kind: str, message: str) -> None:
    trunk = Block(kind)
    with pytest.raises(PrefixError, match=message):
        Prefix.record(trunk, trunk.read, pictures(2, 8))


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3, track_running_stats=False)])
def test_a_frozen_module_that_depends_on_chance_or_on_the_batch_is_not_in_the_prefix(module: nn.Module) -> None:
    """Frozen by `requires_grad` alone, and left in train mode; without running statistics eval mode does not help."""
    trunk, read = by_hand(conv(), module, conv(), conv(), train_from=3)
    module.train(getattr(module, "track_running_stats", True))
    assert check(trunk, read, 8).modules == ("0",)


@pytest.mark.parametrize("also_seen, message", [(False, "nothing that could be kept"), (True, "the same features")])
def test_a_wrong_replay_is_refused_and_not_used(also_seen: bool, message: str) -> None:
    class Odd(Block):
        def odd(self, images: Tensor) -> Tensor:
            x = self.first(images)
            with torch._C.DisableTorchFunction():  # as in scripted code
                y = x * 2
            return self.last(y) + (self.last(self.first(x)) if also_seen else 0)

    trunk = Odd("odd")
    # In place of numbers that are missing stands NaN, so this cannot go unseen.
    with pytest.raises(PrefixError, match=message):
        Prefix.record(trunk, trunk.read, pictures(2, 8))


@pytest.mark.parametrize("num_frozen", [2, 3])
def test_a_frozen_part_that_mixes_the_images_of_a_batch_is_refused(num_frozen: int) -> None:
    class Mixing(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.1 * x.mean(0))

    trunk, read = by_hand(conv(), Mixing(3, 3, 3), conv(), train_from=num_frozen)
    for number in (1, 4):
        with pytest.raises(PrefixError, match="mix the images of a batch"):
            Prefix.record(trunk, read, pictures(number, 8))


def test_a_compiled_module_is_refused() -> None:
    trunk, read = by_hand(conv(), conv(), train_from=1)
    trunk[0].compile()
    with pytest.raises(PrefixError, match="compiled"):
        Prefix.record(trunk, read, pictures(2, 8))


def test_modules_without_parameters_are_no_prefix() -> None:
    trunk, read = by_hand(nn.AvgPool2d(2), conv(), conv(), train_from=1)
    with pytest.raises(PrefixError, match="1 needs the images, and no frozen module is before it"):
        Prefix.record(trunk, read, pictures(2, 8))


def test_another_course_of_calls_than_the_recorded_one_is_an_error() -> None:
    class Longer(Block):
        num_calls = 1

        def longer(self, images: Tensor) -> Tensor:
            for _ in range(self.num_calls):
                images = self.first(images)
            return self.last(images)

    trunk = Longer("longer")
    prefix = Prefix.record(trunk, trunk.read, pictures(2, 8))
    trunk.num_calls = 2
    with pytest.raises(PrefixError, match="calls Conv2d more often than when its prefix was recorded"):
        prefix.replay([torch.zeros(2, 3, 8, 8)])


def test_kept_tensors_of_another_shape_or_type_are_named() -> None:
    trunk, read = by_hand(conv(), conv(), train_from=1)
    prefix = Prefix.record(trunk, read, pictures(2, 8))
    with pytest.raises(ValueError, match=r"shape \(b, 3, 8, 8\) and type torch.float32, got \(2, 3, 4, 8\)"):
        prefix.replay([torch.zeros(2, 3, 4, 8)])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        prefix.replay([torch.zeros(2, 3, 8, 8, dtype=torch.float64)])


def test_a_single_wrong_bit_and_a_changed_freeze_are_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    prefix, images = Prefix.record(trunk, read, pictures(2)), pictures(2)
    assert prefix.agrees(images)
    for method in ("replay", "run", "compute"):
        with monkeypatch.context() as patch:
            patch.setattr(prefix, method, partial(_with_a_wrong_bit, getattr(prefix, method)))
            assert not prefix.agrees(images), method
    assert prefix.agrees(images)
    frozen(trunk, ".conv1", ".bn1", ".layer1")
    assert not prefix.agrees(images)


def _with_a_wrong_bit(method: Callable[[Any], Any], given: Any) -> Any:
    result = method(given)
    features = result[0] if isinstance(result, tuple) else result
    tensors = features.tensors() if isinstance(features, Features) else features
    tensors[-1].data.view(torch.int32).view(-1)[-1] ^= 1
    return result


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_it() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    trunk.cuda()
    images = pictures(4).cuda()
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        prefix = Prefix.record(trunk, read, images)
        assert prefix.agrees(images)
        with no_device_sync():
            features, kept = prefix.run(images)
            replayed = prefix.replay(prefix.compute(images))
    assert all(tensor.is_cuda for tensor in [*kept, *features.tensors(), *replayed.tensors()])


# No trace


@contextmanager
def unchanged(trunk: nn.Module) -> Iterator[None]:
    before = state_of(trunk)
    yield
    assert state_of(trunk) == before


def test_nothing_is_left_over() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", drop_rate=0.2)
    with unchanged(trunk):
        prefix = Prefix.record(trunk, read, pictures(3))
    images = pictures(3)
    with unchanged(trunk):
        assert prefix.agrees(images)
        kept = prefix.compute(images)
        with no_side_effects(trunk, CPU):
            prefix.run(images)
            prefix.replay(kept)


def test_nothing_is_left_over_by_a_failure() -> None:
    trunk, read = by_hand(conv(), conv(), train_from=1)
    prefix = Prefix.record(trunk, read, pictures(2, 8))
    last = trunk[1]
    last.__dict__["forward"] = lambda _: 1 / 0
    with unchanged(trunk):
        for fails in (lambda: prefix.run(pictures(2, 8)), lambda: prefix.replay([torch.zeros(2, 3, 8, 8)])):
            with pytest.raises(ZeroDivisionError):
                fails()


def test_the_frozen_modules_do_not_run_in_a_replay_and_the_others_do_not_in_computing() -> None:
    trunk, read = small_resnet(".conv1", ".bn1", ".layer1", ".layer2")
    prefix = Prefix.record(trunk, read, pictures(2))
    ran: list[str] = []
    for name in ("layer2.0.conv1", "layer3.0.conv1"):
        trunk.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    kept = prefix.compute(pictures(2))
    assert ran == ["layer2.0.conv1"]
    ran.clear()
    prefix.replay(kept)
    assert ran == ["layer3.0.conv1"]


# Real architectures

SMALL = (
    "resnet18 resnet50 seresnet18 resnetv2_50 efficientnet_b0 tf_efficientnet_lite0 mobilenetv3_small_050"
    " mobilenetv4_conv_small convnext_atto convnextv2_atto pvt_v2_b0 davit_tiny densenet121 mambaout_femto repvit_m0_9"
    " fastvit_t8 mobilevit_xxs mobilevitv2_050 regnetx_002 regnety_002 ghostnet_050 edgenext_xx_small poolformer_s12"
    " hrnet_w18_small twins_svt_small dla34 cspresnet50 dpn48b rexnet_100 starnet_s1 vovnet39a hgnet_tiny"
)
LARGE = (
    "vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224"
    " swin_tiny_patch4_window7_224 hiera_tiny_224 coatnet_nano_rw_224 mixer_s16_224 crossvit_tiny_240 levit_128s"
    " pit_ti_224 tiny_vit_5m_224"
)
OTHERS: list[tuple[str, int, dict[str, Any]]] = [
    ("vit_small_patch14_dinov2", 56, {"img_size": 56}),
    ("beit_base_patch16_224", 64, {"img_size": 64}),
    ("maxvit_pico_rw_256", 256, {}),
    ("inception_v3", 96, {}),
    ("vgg11_bn", 64, {}),
]
ARCHITECTURES = [
    *((name, 64, {}) for name in SMALL.split()),
    *((name, 240 if name.endswith("240") else 224, {}) for name in LARGE.split()),
    *OTHERS,
]
# Freezes of which nothing can be kept, and the module that trains first.
REFUSED = [
    ("resnet18", 64, ["type:BatchNorm2d"], "conv1"),
    ("resnet18", 64, [".layer1", ".layer2"], "conv1"),
    ("convnext_atto", 64, ["@last:50%"], r"stem\.0"),
    ("densenet121", 64, ["**.bias"], r"features\.conv0"),
    ("vit_tiny_patch16_224", 224, [".blocks"], r"patch_embed\.proj"),
    ("swin_tiny_patch4_window7_224", 224, [".layers"], r"patch_embed\.proj"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, size, options", ARCHITECTURES, ids=[name for name, _, _ in ARCHITECTURES])
def test_half_of_an_architecture_is_kept_to_the_bit(name: str, size: int, options: dict[str, Any]) -> None:
    trunk, read = build(name, "@first:50%", **options)
    try:
        with no_side_effects(trunk, CPU):
            read(pictures(2, size))
    except (AttributeError, RuntimeError):  # no intermediate features
        read = partial(read_features, trunk, levels=[], pooled=True)
    with unchanged_but_caches(trunk):
        prefix = check(trunk, read, size)
    assert prefix.modules


@pytest.mark.slow
@pytest.mark.parametrize("name, size, patterns, first", REFUSED)
def test_a_freeze_that_starts_later_is_refused(name: str, size: int, patterns: list[str], first: str) -> None:
    trunk = timm.create_model(name, pretrained=False, num_classes=0)
    model = nn.Module()
    model.trunk = trunk
    enforce(model, plan_freeze(model, [f"trunk{p}" if p[0] in ".@" else p for p in patterns]))
    read = partial(read_features, trunk, levels=pyramid_levels(trunk), pooled=True)
    with pytest.raises(PrefixError, match=f"^{first} needs the images, and no frozen module is before it"):
        Prefix.record(trunk, read, pictures(2, size))


@contextmanager
def unchanged_but_caches(trunk: nn.Module) -> Iterator[None]:
    """Attributes and their number stay; LeViT's kin fill a cache in any forward."""
    before = state_of(trunk)[1:]
    yield
    assert state_of(trunk)[1:] == before
