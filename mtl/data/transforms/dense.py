"""Labels per pixel as torchvision's v2 transforms take them: which pixel goes where, and what that does to its value.

torchvision finds the code for a type and an operation through `register_kernel`. Pixels are never mixed: each pixel of
the result has the value of one pixel of the label, or that of none. Where a value changes with the geometry, it is
changed; where there is no formula for it, the operation is refused, since v2 would pass an unknown type through as if
nothing had happened.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import register_kernel

Operation = Callable[..., Any]

# Those that move pixels. `resize`, `resized_crop` and the flips have code of their own.
MOVES: tuple[Operation, ...] = (
    functional.affine,
    functional.center_crop,
    functional.crop,
    functional.elastic,
    functional.pad,
    functional.perspective,
    functional.rotate,
)
_SEVERAL_RESULTS: tuple[Operation, ...] = (functional.five_crop, functional.ten_crop)


class NoFormulaError(ValueError):
    """An operation for which there is no formula for the values of a label."""


class Dense(tv_tensors.TVTensor):  # type: ignore[misc]  # torchvision has no types
    """A label "... h w".

    Attributes:
        outside: The value of pixels that come from outside the image.
    """

    outside: float = 0
    is_for: ClassVar[str]

    @classmethod
    def of(cls, label: Tensor) -> Dense:
        """The label as this type; a view of it."""
        return label.as_subclass(cls)

    @classmethod
    def wrap(cls, tensor: Tensor, like: Any, **_: Any) -> Dense:
        made = cls.of(tensor.as_subclass(Tensor))
        made.outside = like.outside
        return made

    def filled_with(self, outside: float) -> Dense:
        """The same label with another value for pixels from outside."""
        made = self.wrap(self, self)
        made.outside = outside
        return made

    def changed(self, values: Tensor, name: str, arguments: dict[str, Any]) -> Tensor:  # noqa: ARG002  for subclasses
        """The values as an operation changes them, after the pixels were moved.

        Args:
            values: "... h w", moved.
            name: The operation.
            arguments: What it was called with.
        """
        return values


class Classes(Dense, tv_tensors.Mask):  # type: ignore[misc]
    """The number of each pixel's class, "h w"."""

    is_for = "a mask"
    outside = 255


class DepthMap(Dense):
    """A distance per pixel, "1 h w", in the camera's frame.

    An image that is enlarged by a factor looks as if everything were nearer by that factor, so the distance is divided
    by it (Eigen et al., arXiv 1406.2283, on data augmentation; MTAN and LibMTL do the same). A crop that is enlarged
    differently across and down counts by the geometric mean of both factors, measured against the whole image in the
    same size. `resize` alone keeps the field of view, and with it the distance.
    """

    is_for = "depth"

    def changed(self, values: Tensor, name: str, arguments: dict[str, Any]) -> Tensor:
        if name in ("perspective", "elastic"):
            raise NoFormulaError(f"there is no formula for depth after `{name}`")
        factor = 1.0
        if name == "affine":
            factor = arguments["scale"]
        elif name == "resized_crop":
            height, width = self.shape[-2:]
            factor = math.sqrt(height * width / (arguments["height"] * arguments["width"]))
        return values if factor == 1 else values / factor


class NormalMap(Dense):
    """A unit vector per pixel, "3 h w": its first axis points right in the image, its second up.

    A mirror image has the other sign on one axis; a rotation of the image turns the first two.
    """

    is_for = "normals"

    def changed(self, values: Tensor, name: str, arguments: dict[str, Any]) -> Tensor:
        if name in ("perspective", "elastic"):
            raise NoFormulaError(f"there is no formula for normals after `{name}`")
        if name in ("horizontal_flip", "vertical_flip"):
            return mirrored(values, 0 if name == "horizontal_flip" else 1)
        if name == "affine" and any(arguments["shear"]):
            raise NoFormulaError("there is no formula for normals after `affine` with shear")
        # torchvision turns counter-clockwise in `rotate` and clockwise in `affine`.
        degrees = {"rotate": 1, "affine": -1}.get(name, 0) * arguments.get("angle", 0)
        return _turned(values, degrees) if degrees else values


def mirrored(vectors: Tensor, axis: int) -> Tensor:
    """Vectors "3 h w" with the other sign on one axis."""
    vectors = vectors.clone()
    vectors[axis].neg_()
    return vectors


def _turned(vectors: Tensor, degrees: float) -> Tensor:
    """Vectors "3 h w" turned counter-clockwise about the third axis, where the second points up."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # In half precision the lengths would drift.
    x, y, z = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).unbind()
    return torch.stack([x * cos - y * sin, x * sin + y * cos, z]).to(vectors.dtype)


@dataclass(frozen=True)
class Move:
    """An operation that moves pixels, asked of torchvision once for all labels of an image.

    Attributes:
        name: The operation.
        arguments: What it was called with.
        places: "h w", int64: the number of each pixel of the result in the label; 0 where there is none.
        is_outside: "h w", bool: where there is none.
    """

    name: str
    arguments: dict[str, Any]
    places: Tensor
    is_outside: Tensor

    @classmethod
    def of(cls, operation: Operation, label: Dense, **arguments: Any) -> Move:
        """The effect of an operation on every label of one size."""
        # What is outside is the label's own matter, whatever fills the image there.
        arguments.pop("fill", None)
        height, width = label.shape[-2:]
        # Numbers from 1 on, in a type that has all of them.
        exact = torch.float32 if height * width < 2**24 else torch.float64
        numbers = torch.arange(1, height * width + 1, dtype=exact, device=label.device).view(1, height, width)
        found = operation(tv_tensors.Mask(numbers), **arguments).as_subclass(Tensor)[0].long()
        return cls(operation.__name__, arguments, (found - 1).clamp(min=0), found == 0)

    def __call__(self, label: Dense) -> Dense:
        values: Tensor = label.as_subclass(Tensor)
        moved = values.flatten(-2).index_select(-1, self.places.flatten())
        moved = self._fill(moved.view(*values.shape[:-2], *self.places.shape), label.outside)
        return type(label).wrap(label.changed(moved, self.name, self.arguments), label)

    def _fill(self, values: Tensor, outside: float) -> Tensor:
        number = torch.tensor(outside)
        if number.to(values.dtype).to(number.dtype) == number:
            return values.masked_fill(self.is_outside, outside)
        if bool(self.is_outside.any()):
            raise NoFormulaError(f"{outside}, the class of pixels from outside, cannot be stored as {values.dtype}")
        return values


def _register_move(operation: Operation) -> None:
    signature = inspect.signature(operation)

    def move(label: Dense, *args: Any, **kwargs: Any) -> Dense:
        arguments = dict(signature.bind(label, *args, **kwargs).arguments)
        del arguments["inpt"]
        return Move.of(operation, label, **arguments)(label)

    register_kernel(operation, Dense)(move)


def _register_flip(operation: Operation, axis: int) -> None:
    def flip(label: Dense) -> Dense:
        values = label.as_subclass(Tensor).flip(axis)
        return type(label).wrap(label.changed(values, operation.__name__, {}), label)

    register_kernel(operation, Dense)(flip)


def _register_refusal(operation: Operation) -> None:
    def refuse(label: Dense, *_: Any, **__: Any) -> Dense:
        raise NoFormulaError(f"`{operation.__name__}` makes several images of one; {label.is_for} can follow one only")

    register_kernel(operation, Dense)(refuse)


def _nearest(values: Tensor, size: Sequence[int]) -> Tensor:
    """Each pixel of the result has the value at its own centre.

    torchvision's `nearest` takes the pixel at its upper left corner, half a pixel away from what the image shows there.

    Args:
        values: "... h w".
        size: Height and width of the result.
    """
    for axis, new in ((-2, size[0]), (-1, size[1])):
        old = values.shape[axis]
        if old != new:
            places = (torch.arange(new, device=values.device) * 2 + 1) * old // (2 * new)
            values = values.index_select(axis, places)
    return values


def _size_of(label: Tensor, size: list[int] | None, max_size: int | None) -> Sequence[int]:
    """The height and width that torchvision gives an image of the label's size."""
    if size is not None and len(size) == 2:
        return size
    nothing = tv_tensors.KeyPoints(torch.zeros(0, 2), canvas_size=tuple(label.shape[-2:]))
    found: Sequence[int] = functional.resize(nothing, size, max_size=max_size).canvas_size
    return found


def _resize(label: Dense, size: list[int] | None, max_size: int | None = None, **_: Any) -> Dense:
    moved = _nearest(label.as_subclass(Tensor), _size_of(label, size, max_size))
    return type(label).wrap(label.changed(moved, "resize", {}), label)


def _resized_crop(label: Dense, top: int, left: int, height: int, width: int, size: list[int], **_: Any) -> Dense:
    if left < 0 or top < 0 or top + height > label.shape[-2] or left + width > label.shape[-1]:
        raise NoFormulaError("`resized_crop` reaches over the image's edge")
    cropped = label.as_subclass(Tensor)[..., top : top + height, left : left + width]
    moved = _nearest(cropped, _size_of(cropped, size, None))
    return type(label).wrap(label.changed(moved, "resized_crop", {"height": height, "width": width}), label)


for _operation in MOVES:
    _register_move(_operation)
for _operation in _SEVERAL_RESULTS:
    _register_refusal(_operation)
register_kernel(functional.resize, Dense)(_resize)
register_kernel(functional.resized_crop, Dense)(_resized_crop)
_register_flip(functional.horizontal_flip, -1)
_register_flip(functional.vertical_flip, -2)
