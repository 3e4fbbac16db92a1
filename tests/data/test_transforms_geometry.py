"""Transforms against rendering: a scene of planes and a sphere, ray-cast again as it is after the change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtl.config.transform import TransformsConfig
from mtl.data.transforms import build_transforms
from mtl.tasks.base import LabelKind

KINDS: Mapping[str, LabelKind] = {"mask": "mask", "depth": "depth", "normals": "normals", "points": "points"}
HEIGHT, WIDTH = 96, 128
SEEDS = range(6)


@dataclass(frozen=True)
class Scene:
    """Planes and a sphere around a camera that looks along z; x points right, y up.

    Attributes:
        planes: "p 4", unit normals towards the camera and the distance of each plane from it.
        sphere: Centre and radius.
    """

    planes: Tensor
    sphere: Tensor | None

    def turned(self, matrix: Tensor) -> Scene:
        """The scene after a rotation or reflection about the camera."""
        planes = torch.cat([self.planes[:, :3] @ matrix.T, self.planes[:, 3:]], dim=1)
        sphere = None if self.sphere is None else torch.cat([matrix @ self.sphere[:3], self.sphere[3:]])
        return Scene(planes, sphere)

    def squeezed(self, factor: float) -> Scene:
        """The scene with all distances along z divided by a factor; of planes only."""
        normals = self.planes[:, :3] * torch.tensor([1, 1, factor])
        length = normals.norm(dim=1, keepdim=True)
        return Scene(torch.cat([normals / length, self.planes[:, 3:] / length], dim=1), None)


@dataclass(frozen=True)
class Camera:
    """A pinhole.

    Attributes:
        size: Height and width of the image in pixels.
        focal: Focal lengths across and down, in pixels.
        centre: Column and row of the optical axis.
    """

    size: tuple[int, int]
    focal: tuple[float, float]
    centre: tuple[float, float]

    def render(self, scene: Scene) -> dict[str, Tensor]:
        """Mask, depth and normals, and an image "1 h w" that shows the first two; labels are float64."""
        height, width = self.size
        x = (torch.arange(width) + 0.5 - self.centre[0]) / self.focal[0]
        y = -(torch.arange(height) + 0.5 - self.centre[1]) / self.focal[1]
        rays = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width)]).double()
        # A plane is where n.p = -distance.
        slopes = torch.einsum("pc,chw->phw", scene.planes[:, :3].double(), rays)
        depths = -scene.planes[:, 3].double()[:, None, None] / slopes
        depth, mask = torch.where(slopes < 0, depths, torch.inf).min(dim=0)
        normals = scene.planes[:, :3].double()[mask].movedim(-1, 0)
        if scene.sphere is not None:
            centre, radius = scene.sphere[:3].double(), scene.sphere[3].double()
            squared, along = rays.square().sum(0), torch.einsum("c,chw->hw", centre, rays)
            root = along.square() - squared * (centre.square().sum() - radius**2)
            reached = (along - root.clamp(min=0).sqrt()) / squared
            hit = (root > 0) & (reached < depth)
            depth, mask = torch.where(hit, reached, depth), torch.where(hit, len(scene.planes), mask)
            normals = torch.where(hit, (rays * reached - centre[:, None, None]) / radius, normals)
        image = (20 * mask + 10 * depth)[None].float()
        return {"image": image, "mask": mask, "depth": depth[None], "normals": normals}


def _planes() -> Tensor:
    """Floor, ceiling and three walls, one of them slanted: no axis is like its mirror image."""
    normals = torch.tensor([[0, 1, 0], [0.1, -1, 0], [1, 0, -0.2], [-1, 0.15, -0.4], [0.2, 0.1, -1]]).double()
    distances = torch.tensor([1.2, 1.5, 1.7, 2.2, 5.0]).double()
    return torch.cat([functional.normalize(normals, dim=1), distances[:, None]], dim=1)


SPHERE = 5
ROOM = Scene(_planes(), torch.tensor([0.5, -0.35, 3.0, 0.7]).double())
CAMERA = Camera((HEIGHT, WIDTH), (100.0, 100.0), (WIDTH / 2, HEIGHT / 2))
# Three points that say which affine map was applied.
CORNERS = torch.tensor([[0, 0, 1], [100, 0, 1], [0, 100, 1]]).double()


def _changed(
    entries: Sequence[Any], size: tuple[int, int], seed: int, camera: Camera = CAMERA, scene: Scene = ROOM
) -> dict[str, Tensor]:
    pipeline = build_transforms(TransformsConfig.model_validate({"train": entries}).train, size, "data.transform.train")
    labels = camera.render(scene)
    image, found = pipeline(labels.pop("image"), labels | {"points": CORNERS}, KINDS, seed)
    return found | {"image": image}


def _where(points: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map that moved `CORNERS`: matrix and offset, of columns and rows."""
    origin, across, down = points[:, :2]
    return torch.stack([(across - origin) / 100, (down - origin) / 100], dim=1), origin


def _centre(matrix: Tensor, offset: Tensor) -> tuple[float, float]:
    """Where the optical axis is after the map."""
    x, y = (matrix @ torch.tensor(CAMERA.centre).double() + offset).tolist()
    return x, y


def _inside(truth: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Tensor:
    """Pixels away from edges between surfaces, from the frame, and from the corners that a rotation leaves empty."""
    mask = torch.where(found["mask"] == 255, 99, truth["mask"])
    highest = functional.max_pool2d(mask[None].double(), 5, 1, 2)[0]
    lowest = -functional.max_pool2d(-mask[None].double(), 5, 1, 2)[0]
    inside = (highest == lowest) & (mask != 99)
    inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = False
    return inside


def _assert_same(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """A sample is what rendering says, away from edges: each pixel of a plane, and the sphere on average."""
    inside = _inside(truth, found)
    assert inside.double().mean() > 0.5
    assert torch.equal(found["mask"][inside], truth["mask"][inside])
    flat, round_ = inside & (truth["mask"] != SPHERE), inside & (truth["mask"] == SPHERE)
    assert round_.sum() > 100
    angle = _angle(found["normals"], truth["normals"])
    assert angle[flat].max() < 0.01
    assert angle[round_].mean() < 2
    # The place of a pixel is known to half a pixel.
    error = (found["depth"] / truth["depth"] - 1).abs()[0]
    assert error[flat].max() < 0.04
    assert error[inside].mean() < 0.01
    # The image shows the same place as the labels.
    off = (found["image"] - truth["image"]).abs()
    assert off[:, flat].max() < 0.5
    assert off[:, round_].mean() < 1


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return 2 * torch.atan2((a - b).norm(dim=0), (a + b).norm(dim=0)).rad2deg()


# Exact: every pixel goes to a pixel


def test_a_flip_is_the_mirrored_scene_to_the_last_pixel() -> None:
    found = _changed([{"name": "flip", "options": {"p": 1.0}}], (HEIGHT, WIDTH), 0)
    truth = CAMERA.render(ROOM.turned(torch.diag(torch.tensor([-1, 1, 1]).double())))
    assert torch.equal(found["mask"], truth["mask"])
    assert torch.allclose(found["depth"], truth["depth"], rtol=1e-12)
    assert torch.allclose(found["normals"], truth["normals"], atol=1e-12)
    assert torch.equal(found["image"], CAMERA.render(ROOM)["image"].flip(-1))
    assert found["points"][:, 0].tolist() == [WIDTH, WIDTH - 100, WIDTH]


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_quarter_turn_is_the_turned_scene_to_the_last_pixel(quarters: int) -> None:
    camera = replace(CAMERA, size=(WIDTH, WIDTH), centre=(WIDTH / 2, WIDTH / 2))
    rotation = {"name": "torchvision.transforms.v2:RandomRotation", "options": {"degrees": [90 * quarters] * 2}}
    found = _changed([rotation], (WIDTH, WIDTH), 0, camera)
    truth = camera.render(ROOM.turned(_turn(90 * quarters)))
    assert torch.equal(found["mask"], truth["mask"])
    assert torch.allclose(found["depth"], truth["depth"], rtol=1e-9)
    assert torch.allclose(found["normals"], truth["normals"], atol=1e-9)


@pytest.mark.parametrize("degrees", [90, 180])
def test_an_affine_turn_is_the_turned_scene_though_torchvision_turns_the_other_way_there(degrees: int) -> None:
    camera = replace(CAMERA, size=(WIDTH, WIDTH), centre=(WIDTH / 2, WIDTH / 2))
    affine = {"name": "torchvision.transforms.v2:RandomAffine", "options": {"degrees": [degrees] * 2}}
    found = _changed([affine], (WIDTH, WIDTH), 0, camera)
    truth = camera.render(ROOM.turned(_turn(-degrees)))
    assert torch.equal(found["mask"], truth["mask"])
    assert torch.allclose(found["normals"], truth["normals"], atol=1e-9)


def test_a_vertical_flip_of_torchvision_is_the_scene_upside_down() -> None:
    flip = {"name": "torchvision.transforms.v2:RandomVerticalFlip", "options": {"p": 1.0}}
    found = _changed([flip], (HEIGHT, WIDTH), 0)
    truth = CAMERA.render(ROOM.turned(torch.diag(torch.tensor([1, -1, 1]).double())))
    assert torch.equal(found["mask"], truth["mask"])
    assert torch.allclose(found["normals"], truth["normals"], atol=1e-12)
    assert found["points"][:, 1].tolist() == [HEIGHT, HEIGHT, HEIGHT - 100]


# Near: a pixel shows what lies up to half a pixel from its centre


def _turn(degrees: float) -> Tensor:
    """Counter-clockwise, as one looks along z with y up."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]).double()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rotation_is_the_turned_scene(seed: int) -> None:
    found = _changed([{"name": "rotation", "options": {"degrees": 40.0}}], (HEIGHT, WIDTH), seed)
    matrix, _ = _where(found["points"])
    degrees = math.degrees(math.atan2(-matrix[1, 0], matrix[0, 0]))  # rows count downwards
    assert 0.1 < abs(degrees) <= 40
    _assert_same(found, CAMERA.render(ROOM.turned(_turn(degrees))))


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_whose_second_axis_points_down_are_turned_as_they_are(seed: int) -> None:
    options = {"degrees": 30.0}
    up = _changed([{"name": "rotation", "options": options}], (HEIGHT, WIDTH), seed)
    labels = CAMERA.render(ROOM)
    signs = torch.tensor([1, -1, 1]).double()[:, None, None]
    config = [{"name": "rotation", "options": options | {"normals_y": "down"}}]
    pipeline = build_transforms(TransformsConfig.model_validate({"train": config}).train, (HEIGHT, WIDTH), "train")
    _, found = pipeline(labels["image"], {"normals": labels["normals"] * signs}, KINDS, seed)
    assert torch.allclose(found["normals"] * signs, up["normals"], atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_enlarged_image_is_what_a_longer_lens_sees_and_all_depths_are_divided(seed: int) -> None:
    found = _changed([{"name": "scale", "options": {"factors": [1.5]}}], (HEIGHT, WIDTH), seed)
    matrix, offset = _where(found["points"])
    assert torch.allclose(matrix, 1.5 * torch.eye(2).double(), atol=1e-5)
    truth = Camera((HEIGHT, WIDTH), (150.0, 150.0), _centre(matrix, offset)).render(ROOM)
    _assert_same(found, truth | {"depth": truth["depth"] / 1.5})


@pytest.mark.parametrize("seed", SEEDS)
def test_divided_depths_are_those_of_the_scene_pressed_together_along_the_axis(seed: int) -> None:
    planes = Scene(_planes(), None)
    found = _changed([{"name": "scale", "options": {"factors": [1.3]}}], (HEIGHT, WIDTH), seed, scene=planes)
    matrix, offset = _where(found["points"])
    truth = replace(CAMERA, centre=_centre(matrix, offset)).render(planes.squeezed(1.3))
    inside = _inside(truth, found)
    assert torch.equal(found["mask"][inside], truth["mask"][inside])
    assert (found["depth"] / truth["depth"] - 1).abs()[0][inside].max() < 0.03


@pytest.mark.parametrize("seed", SEEDS)
def test_a_resized_crop_is_what_a_longer_lens_sees_and_depth_is_divided_by_the_mean_factor(seed: int) -> None:
    crop = {"name": "random_resized_crop", "options": {"scale": [0.3, 0.9], "ratio": [0.7, 2.0]}}
    size = (80, 88)
    found = _changed([crop], size, seed)
    matrix, offset = _where(found["points"])
    across, down = float(matrix[0, 0]), float(matrix[1, 1])
    truth = Camera(size, (100 * across, 100 * down), _centre(matrix, offset)).render(ROOM)
    factor = math.sqrt(across * WIDTH / size[1] * down * HEIGHT / size[0])
    assert factor > 1.04
    _assert_same(found, truth | {"depth": truth["depth"] / factor})


@pytest.mark.parametrize("size", [(48, 64), (64, 64), (200, 130), (41, 57)])
def test_a_resize_is_what_a_coarser_or_finer_sensor_sees_and_no_value_changes(size: tuple[int, int]) -> None:
    found = _changed([], size, 0)
    down, across = size[0] / HEIGHT, size[1] / WIDTH
    truth = Camera(size, (100 * across, 100 * down), (size[1] / 2, size[0] / 2)).render(ROOM)
    _assert_same(found, truth)
    assert torch.isin(found["depth"], CAMERA.render(ROOM)["depth"]).all()
    assert torch.allclose(found["points"][:, 0], CORNERS[:, 0] * across)


@pytest.mark.parametrize("size", [(32, 32), (24, 16), (41, 57)])
def test_a_mask_is_not_shifted_against_the_image_when_it_shrinks(size: tuple[int, int]) -> None:
    """Where torchvision's `nearest` is off by half a pixel of the result, up and left."""
    columns = torch.arange(WIDTH).expand(HEIGHT, WIDTH)
    image, found = build_transforms([], size, "val")(columns[None].float(), {"mask": columns}, KINDS, None)
    assert (found["mask"] - image[0]).mean().abs() <= 0.51
