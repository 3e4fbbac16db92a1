"""From `tasks.<task>.head` to the head; what does not fit is blamed on its key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from mtl.config import SettingError
from mtl.config.errors import OptionsError
from mtl.config.head import HeadConfig
from mtl.config.own import checked_options, is_own, make_own, own_class
from mtl.model.heads.attention_pool import AttentionPoolHead
from mtl.model.heads.base import Head
from mtl.model.heads.bins import BinsHead
from mtl.model.heads.deeplabv3plus import DeepLabV3PlusHead
from mtl.model.heads.dpt import DptHead
from mtl.model.heads.fpn import FpnHead
from mtl.model.heads.linear import LinearHead
from mtl.model.heads.linear_bn import LinearBnHead
from mtl.model.heads.mlp import MlpHead
from mtl.model.heads.segformer import SegFormerHead
from mtl.model.heads.smp import MissingExtraError
from mtl.model.heads.upernet import UperNetHead
from mtl.model.trunk import Features, FeatureShape, Kind
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint

HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "attention_pool": AttentionPoolHead,
    "fpn": FpnHead,
    "linear_bn": LinearBnHead,
    "bins": BinsHead,
    "dpt": DptHead,
    "upernet": UperNetHead,
    "segformer": SegFormerHead,
    "deeplabv3plus": DeepLabV3PlusHead,
}
_DEFAULTS = {"dense": HeadConfig(name="fpn"), "vector": HeadConfig(name="linear")}
_KINDS: frozenset[Kind] = frozenset({"pyramid", "pooled", "tokens"})

Output = Literal["dense", "vector"]


def class_of(config: HeadConfig | None, output: Output, task: str) -> type[Head]:
    """The class of a task's head.

    Args:
        config: As it is configured; None for the default.
        output: The task's.
        task: Its name.

    Raises:
        SettingError: There is no such head, it is not one, or it gives the other kind of output.
    """
    config, key = config or _DEFAULTS[output], f"tasks.{task}.head"
    if is_own(config.name):
        kind: type[Head] = own_class(config.name, f"{key}.name", Head)
        _check_class(kind, config.name, f"{key}.name")
    elif config.name in HEADS:
        kind = HEADS[config.name]
    else:
        there = f"{', '.join(HEADS)}, or your own as package.module:Name{hint(config.name, HEADS)}"
        raise SettingError(f"{key}.name", f"no head {config.name!r}; there are: {there}")
    if kind.output != output:
        what = {"dense": "an output per pixel", "vector": "an output per image"}
        raise SettingError(
            f"{key}.name",
            f"{config.name} gives {what[kind.output]}, the task has {what[output]}; heads that fit: {_fitting(output)}",
        )
    return kind


def _check_class(kind: type[Head], name: str, key: str) -> None:
    if getattr(kind, "output", None) not in ("dense", "vector"):
        raise SettingError(key, f"{name} has no `output`: expected `dense` or `vector`")
    if not isinstance(reads := getattr(kind, "reads", None), frozenset) or not (reads and reads <= _KINDS):
        raise SettingError(key, f"{name}: expected `reads`, a frozenset of {', '.join(sorted(_KINDS))}; got {reads!r}")


def _fitting(output: Output, without: Iterable[Kind] = ()) -> str:
    """The built-in heads with an output that can do without some kinds of features."""
    return ", ".join(name for name, kind in HEADS.items() if kind.output == output and kind.reads - {*without})


def build_head(
    kind: type[Head], config: HeadConfig | None, shape: FeatureShape, output: Output, num_outputs: int, task: str
) -> Head:
    """Builds a head.

    Args:
        kind: From `class_of`.
        config: As it is configured; None for the default.
        shape: The trunk's features.
        output: The task's.
        num_outputs: Channels of its output.
        task: Its name.

    Raises:
        SettingError: The options do not fit, the class raised an error, or the head reads what this trunk does not
            give.
    """
    config, key = config or _DEFAULTS[output], f"tasks.{task}.head"
    if not is_own(config.name):
        return _build_built_in(kind, config, shape, num_outputs, key)
    no_tokens = SettingError(
        f"{key}.name",
        f"{config.name} reads tokens, and this trunk gives none, but maps; heads that fit:"
        f" {_fitting(output, ['tokens'])}",
    )
    lacks_tokens = "tokens" in kind.reads and shape.tokens is None
    try:
        head: Head = make_own(kind, config.options, f"{key}.options", config.name, shape=shape, num_outputs=num_outputs)
    except OptionsError:
        raise
    except SettingError as error:
        raise no_tokens if lacks_tokens else error from error
    if lacks_tokens and "tokens" in head.reads:
        raise no_tokens
    _check_bias(head, config.name, num_outputs, f"{key}.name")
    return head


def _build_built_in(kind: type[Head], config: HeadConfig, shape: FeatureShape, num_outputs: int, key: str) -> Head:
    make: Callable[..., Head] = kind
    options = checked_options(kind, config.options, f"{key}.options")
    try:
        return make(shape=shape, num_outputs=num_outputs, **options)
    except MissingExtraError as error:
        raise SettingError(f"{key}.name", f"{config.name} {error}") from error
    except ValueError as error:
        raise SettingError(key, f"{config.name}: {error}") from error


def _check_bias(head: Head, name: str, num_outputs: int, key: str) -> None:
    if type(head).set_output_bias is not Head.set_output_bias:
        return
    bias = getattr(getattr(head, "out", None), "bias", None)
    if not isinstance(bias, nn.Parameter) or tuple(bias.shape) != (num_outputs,):
        got = f"one of shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else "none"
        raise SettingError(
            key,
            f"{name}: expected a last layer `out` with a bias of shape ({num_outputs},), from which training starts,"
            f" got {got}; or override set_output_bias",
        )


def try_out(
    head: Head, features: Features, size: tuple[int, int], config: HeadConfig, num_outputs: int, task: str
) -> None:
    """Runs a head on the features of one image, so that what is wrong with it is found before anything is trained.

    Args:
        head: In eval mode.
        features: Those that it reads and no others.
        size: Height and width of the images, in pixels.
        config: As it is configured.
        num_outputs: Channels of the task's output.
        task: Its name.

    Raises:
        SettingError: It fails, or its output has another shape than the task's.
    """
    key = f"tasks.{task}.head"
    try:
        with torch.no_grad():
            output = head(features, size)
    except Exception as error:  # the user's code may raise anything
        raise SettingError(key, f"{config.name}: {where_it_failed(error)}") from error
    expected = (1, num_outputs, *size) if head.output == "dense" else (1, num_outputs)
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if got != expected:
        raise SettingError(key, f"{config.name}: expected an output of shape {expected} for one image, got {got}")


def set_output_bias(head: nn.Module, constant: Tensor) -> None:
    """Has training of a head start from a constant prediction.

    Args:
        head: A head.
        constant: "c", the constant output.

    Raises:
        ValueError: The head cannot give this constant.
    """
    assert isinstance(head, Head)
    head.set_output_bias(constant)
