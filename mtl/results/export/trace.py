"""`torch.export` of a model whose batch varies, and whose image size varies where that is shown to work."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import timm.layers.padding
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mtl.results.export.errors import ExportError
from mtl.results.export.images import resized
from mtl.results.export.parity import LIMIT, Check, Run, check_parity

# Letters of another library's reason.
_LONGEST = 400
# From images "b c h w", uint8, to the model's outputs by task.
Reference = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Sizes:
    """The image sizes that exported files take.

    Attributes:
        size: Height and width for which they were made, in pixels.
        step: Heights and widths are multiples of it; None if only `size` is taken.
        grid: Pixels of the image to an element of the trunk's coarsest map.
    """

    size: tuple[int, int]
    step: int | None
    grid: int

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.size[0]} x {self.size[1]} only"
        # An axis of length 1 is another program to torch.
        if self.step == 1:
            return f"any height and width above {self.grid}"
        return f"height and width in multiples of {self.step}, from {2 * self.step} on"


def trace(module: nn.Module, name: str, example: Any, step: int | None) -> ExportedProgram:
    """Exports a module of which the first axis of all inputs varies.

    Args:
        module: Takes images "b c h w", or features by name.
        name: What it is called in errors.
        example: Its input: a batch of two, since one of one is special to torch.
        step: Axes from the third on vary too, of images in multiples of this; None if they do not.

    Raises:
        ExportError: torch cannot trace it; gives its reason.
    """
    if isinstance(example, Mapping):
        shapes: Any = {key: _axes(each, step and 1) for key, each in example.items()}
    else:
        shapes = _axes(example, step)
    try:
        with quiet(), torch.no_grad(), _same_padding(step):
            return torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # modules of the user's own may raise anything
        raise ExportError(f"{name} cannot be exported: torch.export: {reason_of(error)}") from error


def _axes(tensor: Tensor, step: int | None) -> dict[int, Any]:
    """How each axis of an input varies; maps have rows and columns, tokens their number, vectors neither."""
    inner = {3: (1,), 4: (2, 3)}.get(tensor.ndim, ()) if step is not None else ()
    varying = {axis: Dim.AUTO if step == 1 else (step or 1) * Dim(f"cells_{axis}") for axis in inner}
    return {0: Dim.DYNAMIC, **varying}


@contextmanager
def _same_padding(step: int | None) -> Iterator[None]:
    """Has TensorFlow's padding of a side that varies be that of a multiple of the stride, a constant.

    As a function of the side, timm's formula keeps torch's symbolic algebra busy for minutes.
    """
    padding: Any = timm.layers.padding
    of_timm = padding.get_same_padding

    def constant(side: Any, kernel: int, stride: int, dilation: int) -> Any:
        if not isinstance(side, torch.SymInt):
            return of_timm(side, kernel, stride, dilation)
        if step == 1:
            raise ExportError("the padding depends on the size of the images")
        return max((kernel - 1) * dilation + 1 - stride, 0)

    padding.get_same_padding = constant
    try:
        yield
    finally:
        padding.get_same_padding = of_timm


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript say of themselves: warnings, and the whole graph of what cannot be traced."""
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def reason_of(error: Exception) -> str:
    """Another library's message in a line: its first sentence, and the next where that only points to it."""
    text = str(error).replace('For more information, run with TORCH_LOGS="+dynamic".', "")
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    shown = " ".join(lines[: 2 if text.startswith("Constraints violated") else 1])
    return f"{type(error).__name__}: {shown or 'it gives no reason'}"[:_LONGEST]


def first_that_holds(
    make: Callable[[int | None], Run], reference: Reference, images: Tensor, grid: int, steps: Collection[int]
) -> tuple[Sizes, list[Check]]:
    """Exports for any image size, else for multiples of the trunk's grid, else for one size.

    Args:
        make: Exports for sizes in such steps, or for one size, and returns what runs the files on images "b c h w",
            uint8; the files of the last call hold.
        reference: The model's outputs.
        images: "b c h w", uint8.
        grid: Pixels of the image to an element of the trunk's coarsest map.
        steps: The steps that are tried.

    Returns:
        The sizes that the files take, and comparisons: all images, one image, and another size where it varies.

    Raises:
        ExportError: It cannot be exported for one size either.
    """
    size = (images.shape[-2], images.shape[-1])
    for step, other in _other_sizes(size, grid).items():
        if step not in steps:
            continue
        others = resized(images, other)
        try:
            reference(others[:1])
        except Exception:  # noqa: BLE001 - the trunk does not take it, and says so in any way
            continue
        try:
            run = make(step)
            checks = [*_batches(run, reference, images), _compared(run, reference, others)]
        except Exception:  # noqa: BLE001 - as above; for one size, the reason is raised
            continue
        if all(check.worst <= LIMIT for check in checks):
            return Sizes(size, step, grid), checks
    run = make(None)
    try:
        return Sizes(size, None, grid), _batches(run, reference, images)
    except Exception as error:  # torch and ONNX Runtime raise anything
        raise ExportError(f"the exported file does not run: {reason_of(error)}") from error


def _other_sizes(size: tuple[int, int], grid: int) -> dict[int, tuple[int, int]]:
    """By step, another size that is no multiple of anything larger."""
    height, width = size
    on_grid = {grid: (height + grid, width + 2 * grid)} if not (height % grid or width % grid) else {}
    return {1: (height + grid + 1, width + 2 * grid - 1), **on_grid}


def _batches(run: Run, reference: Reference, images: Tensor) -> list[Check]:
    """Comparisons on all images, and on one."""
    return [_compared(run, reference, images[:num]) for num in (len(images), 1)]


def _compared(run: Run, reference: Reference, images: Tensor) -> Check:
    return check_parity(run(images), reference(images), (images.shape[-2], images.shape[-1]))
