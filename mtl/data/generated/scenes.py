"""`scenes`: ray-cast rooms with real garments standing in them, labelled exactly for four dense and image-level tasks.

Every image shows a room (checker floor, back wall, two side walls), a sphere, and one to three Fashion-MNIST garments
on tilted billboards. Because the geometry is known, segmentation, depth, surface normals and the nearest object's class
are exact, not annotated. Training and validation scenes use disjoint garment images.

Conventions: camera frame x right, y up, z forward; the ray of a pixel has z = 1, so its ray parameter *is* the depth in
metres along the optical axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from mtl.data.generated.sprites import ALPHA, Sprites
from mtl.data.room import Stored

FLOOR, WALL, SPHERE, FIRST_GARMENT = 0, 1, 2, 3
MAX_OBJECTS = 3
# Scenes are drawn in blocks of this many, each with a generator of its own, so that the first n scenes of a split
# do not depend on how many are asked for.
BLOCK = 50

Array = NDArray[np.floating[Any]]


def stored(num: int, size: int) -> Stored:
    """What is stored of some scenes: see `render_block`."""
    return {
        "images": ((num, size, size, 3), 1),
        "segmentation": ((num, size, size), 1),
        "depth": ((num, 1, size, size), 4),
        "normals": ((num, 3, size, size), 2),
        "object": ((num,), 8),
    }


@dataclass(frozen=True)
class _Room:
    """Random parameters of a block of scenes; every array starts with the block's axis b."""

    camera_height: Array  # b, metres
    pitch: Array  # b, radians, positive looks down
    focal: Array  # b, image widths
    wall_z: Array  # b, metres
    wall_x: Array  # b s, metres, left and right
    light: Array  # b 3, unit vector towards the light
    ambient: Array  # b
    floor_colours: Array  # b 2 3
    wall_colour: Array  # b 3
    checker: Array  # b, metres
    stripe: Array  # b, metres
    sphere: Array  # b 4, centre and radius, metres
    sphere_colour: Array  # b 3
    base: Array  # b k 3, the middle of each garment's lower edge, metres
    size: Array  # b k, metres
    yaw: Array  # b k, radians
    lean: Array  # b k, radians
    tint: Array  # b k 3
    present: NDArray[np.bool_]  # b k
    sprite: NDArray[np.int64]  # b k, index into the split's sprites


def _sample_room(rng: np.random.Generator, num: int, num_sprites: int) -> _Room:
    def uniform(low: float, high: float, *shape: int) -> Array:
        return rng.uniform(low, high, (num, *shape)).astype(np.float32)

    k = MAX_OBJECTS
    # The first garment stands close, the others anywhere in front of the wall.
    z = np.concatenate([uniform(1.4, 2.2, 1), uniform(1.8, 3.4, k - 1)], axis=1)
    base = np.stack([z * uniform(-0.45, 0.45, k), np.zeros_like(z), z], axis=-1)
    radius = uniform(0.25, 0.6)
    sphere_z = uniform(1.8, 4.0)
    sphere = np.stack([sphere_z * uniform(-0.5, 0.5), radius, sphere_z, radius], axis=-1)
    light = np.stack([uniform(-1, 1), uniform(0.5, 1.2), uniform(-1.2, -0.3)], axis=-1)
    return _Room(
        camera_height=uniform(1.0, 1.5),
        pitch=np.deg2rad(uniform(9, 16)),
        focal=uniform(0.75, 0.9),
        wall_z=uniform(4.5, 7.0),
        wall_x=np.stack([uniform(-4.0, -1.8), uniform(1.8, 4.0)], axis=1),
        light=light / np.linalg.norm(light, axis=-1, keepdims=True),
        ambient=uniform(0.25, 0.5),
        floor_colours=uniform(0.15, 0.95, 2, 3),
        wall_colour=uniform(0.3, 0.95, 3),
        checker=uniform(0.35, 0.8),
        stripe=uniform(0.3, 1.0),
        sphere=sphere,
        sphere_colour=uniform(0.2, 1.0, 3),
        base=base,
        size=uniform(1.0, 1.5, k),
        yaw=uniform(-0.35, 0.35, k),
        lean=uniform(-0.2, 0.2, k),
        tint=uniform(0.35, 1.0, k, 3),
        present=rng.random((num, k)) < np.array([1.0, 0.7, 0.4]),
        sprite=rng.integers(0, num_sprites, (num, k)),
    )


def _dot(a: Array, b: Array) -> Array:
    """Scalar product along the first axis of "3 b h w" and "3 b", or of two of the latter."""
    if a.ndim != b.ndim:
        b = b[:, :, None, None]
    result: Array = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return result


def _rows(*components: Array) -> Array:
    """Vectors "3 b" from their components."""
    return np.stack(np.broadcast_arrays(*components)).astype(np.float32)


def _camera_rays(room: _Room, size: int) -> Array:
    """Rays of all pixels, "3 b h w", in the world frame: that of the camera, turned upright."""
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x = centre[None, None, :] / room.focal[:, None, None]
    y = -centre[None, :, None] / room.focal[:, None, None]
    cos, sin = np.cos(room.pitch)[:, None, None], np.sin(room.pitch)[:, None, None]
    return _rows(x, y * cos - sin, y * sin + cos)


def _to_camera(normals: Array, room: _Room) -> Array:
    """Turns vectors "3 b h w" from the world frame into the camera's."""
    cos, sin = np.cos(room.pitch)[:, None, None], np.sin(room.pitch)[:, None, None]
    x, y, z = normals
    return _rows(x, y * cos + z * sin, z * cos - y * sin)


class _Canvas:
    """What each pixel shows so far. Arrays are "b h w", vectors and colours "3 b h w"."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.depth: Array = np.full(shape, np.inf, np.float32)
        self.normal: Array = np.zeros((3, *shape), np.float32)
        self.albedo: Array = np.zeros((3, *shape), np.float32)
        self.label: NDArray[np.uint8] = np.full(shape, WALL, np.uint8)
        self.instance: NDArray[np.int8] = np.full(shape, -1, np.int8)

    def draw(
        self,
        hit: NDArray[np.bool_],
        depth: Array,
        normal: Array,
        albedo: Array,
        label: NDArray[np.uint8],
        instance: int = -1,
    ) -> None:
        """Draws a surface where it is hit and nearer than what is there; arguments may have broadcasting shapes."""
        near = hit & (depth < self.depth) & (depth > 0.05)
        np.copyto(self.depth, depth, where=near)
        np.copyto(self.normal, normal, where=near)
        np.copyto(self.albedo, albedo, where=near)
        np.copyto(self.label, label, where=near)
        np.copyto(self.instance, np.int8(instance), where=near)


def _draw_floor(canvas: _Canvas, room: _Room, rays: Array) -> None:
    eye = room.camera_height[:, None, None]
    t = -eye / np.minimum(rays[1], -1e-6)
    x, z = rays[0] * t, rays[2] * t
    checker = room.checker[:, None, None]
    odd = (np.floor(x / checker) + np.floor(z / checker)) % 2 == 1
    # A soft contact shadow under every garment shows where it stands.
    light = np.ones_like(t)
    for k in range(MAX_OBJECTS):
        base_x, _, base_z = room.base[:, k].T[:, :, None, None]
        distance = ((x - base_x) ** 2 + (z - base_z) ** 2) / (0.35 * room.size[:, k, None, None]) ** 2
        light *= 1 - 0.6 * np.exp(-distance) * room.present[:, k, None, None]
    colours = room.floor_colours.transpose(1, 2, 0)[..., None, None]
    albedo = np.where(odd, colours[1], colours[0]) * light
    up = np.array([0, 1, 0], np.float32)[:, None, None, None]
    canvas.draw(rays[1] < 0, t, up, albedo.astype(np.float32), np.array(FLOOR, np.uint8))


def _draw_walls(canvas: _Canvas, room: _Room, rays: Array) -> None:
    walls = [(2, room.wall_z, [0, 0, -1]), (0, room.wall_x[:, 0], [1, 0, 0]), (0, room.wall_x[:, 1], [-1, 0, 0])]
    for axis, offset, facing in walls:
        # A ray along the wall meets it nowhere: let it meet it farther away than all else.
        t = offset[:, None, None] / np.where(np.abs(rays[axis]) < 1e-6, 1e-6, rays[axis])
        stripes = np.sin(rays[2 - axis] * t * (2 * np.pi / room.stripe[:, None, None])) > 0
        albedo = room.wall_colour.T[:, :, None, None] * np.where(stripes, 1.0, 0.7).astype(np.float32)
        normal = np.array(facing, np.float32)[:, None, None, None]
        canvas.draw(t > 0, t, normal, albedo, np.array(WALL, np.uint8))


def _draw_sphere(canvas: _Canvas, room: _Room, rays: Array) -> None:
    x, y, z, radius = room.sphere.T
    centre = _rows(x, y - room.camera_height, z)
    squared, half_b = _dot(rays, rays), _dot(rays, centre)
    discriminant = half_b**2 - squared * (_dot(centre, centre) - radius**2)[:, None, None]
    t = (half_b - np.sqrt(np.maximum(discriminant, 0))) / squared
    normal = (rays * t - centre[:, :, None, None]) / radius[:, None, None]
    canvas.draw(discriminant > 0, t, normal, room.sphere_colour.T[:, :, None, None], np.array(SPHERE, np.uint8))


def _draw_garment(canvas: _Canvas, room: _Room, rays: Array, sprites: Sprites, k: int) -> None:
    yaw, lean = room.yaw[:, k], room.lean[:, k]
    right = _rows(np.cos(yaw), np.zeros_like(yaw), np.sin(yaw))
    up = _rows(np.sin(yaw) * np.sin(lean), np.cos(lean), -np.cos(yaw) * np.sin(lean))
    base = room.base[:, k].T - _rows(np.zeros_like(yaw), room.camera_height, np.zeros_like(yaw))
    normal = np.cross(up, right, axis=0).astype(np.float32)
    normal *= -np.sign(_dot(normal, base))  # towards the camera
    t = _dot(normal, base)[:, None, None] / _dot(rays, normal)
    offset = rays * t - base[:, :, None, None]
    size = room.size[:, k, None, None]
    column = (_dot(offset, right) / size + 0.5) * 28 - 0.5
    # The garment stands on the floor: its lowest bright row, not the sprite's lower edge, touches the base.
    row = (1 - _dot(offset, up) / size) * 28 - 0.5 - sprites.blank_rows[room.sprite[:, k]][:, None, None]
    hit = (column > -0.5) & (column < 27.5) & (row > -0.5) & (row < 27.5) & room.present[:, k, None, None]
    which = np.broadcast_to(room.sprite[:, k, None, None], hit.shape)
    value = np.zeros(hit.shape, np.float32)
    value[hit] = _bilinear(sprites.images, which[hit], row[hit], column[hit])
    albedo = room.tint[:, k].T[:, :, None, None] * (0.25 + 0.75 * value)
    label = (FIRST_GARMENT + sprites.labels[room.sprite[:, k]]).astype(np.uint8)[:, None, None]
    canvas.draw(hit & (value > ALPHA), t, normal[:, :, None, None], albedo, label, instance=k)


def _bilinear(images: NDArray[np.uint8], which: NDArray[np.int64], row: Array, column: Array) -> Array:
    row, column = np.clip(row, 0, 27), np.clip(column, 0, 27)
    top, left = np.minimum(row.astype(np.int64), 26), np.minimum(column.astype(np.int64), 26)
    down, across = row - top, column - left
    upper = images[which, top, left] * (1 - across) + images[which, top, left + 1] * across
    lower = images[which, top + 1, left] * (1 - across) + images[which, top + 1, left + 1] * across
    result: Array = ((upper * (1 - down) + lower * down) / 255).astype(np.float32)
    return result


def _nearest_object(canvas: _Canvas, room: _Room, sprites: Sprites) -> NDArray[np.int64]:
    """Class of the garment with the nearest visible pixel, "b"; -1 where none shows at least 0.5 % of the image."""
    distances = []
    for k in range(MAX_OBJECTS):
        visible = canvas.instance == k
        nearest = np.where(visible, canvas.depth, np.inf).min(axis=(1, 2))
        distances.append(np.where(visible.mean(axis=(1, 2)) >= 0.005, nearest, np.inf))
    stacked = np.stack(distances, axis=1)
    winner = stacked.argmin(axis=1)
    labels = sprites.labels[room.sprite[np.arange(len(winner)), winner]].astype(np.int64)
    return np.where(np.isfinite(stacked.min(axis=1)), labels, -1)


def render_block(sprites: Sprites, size: int, seed: int, block: int) -> dict[str, NDArray[np.generic]]:
    """Renders one block of `BLOCK` scenes.

    Args:
        sprites: The garments to place, of one split.
        size: Image height and width in pixels.
        seed: Seed of the whole split; the same seed and block give the same bytes.
        block: Which block of the split.

    Returns:
        images: "b h w c", uint8.
        segmentation: "b h w", uint8, 0 floor, 1 wall, 2 sphere, 3 to 12 the garments.
        depth: "b 1 h w", float32, metres along the optical axis.
        normals: "b 3 h w", float16, unit vectors in the camera frame, towards the camera.
        object: "b", int64, class of the nearest garment, -1 where none is visible.
    """
    rng = np.random.default_rng([seed, block])
    room = _sample_room(rng, BLOCK, len(sprites.labels))
    rays = _camera_rays(room, size)
    canvas = _Canvas(rays.shape[1:])
    _draw_floor(canvas, room, rays)
    _draw_walls(canvas, room, rays)
    _draw_sphere(canvas, room, rays)
    for k in range(MAX_OBJECTS):
        _draw_garment(canvas, room, rays, sprites, k)

    # Two-sided Lambert shading: a garment has no back.
    ambient = room.ambient[:, None, None]
    shade = ambient + (1 - ambient) * np.abs(_dot(canvas.normal, room.light.T))
    noise = 0.02 * rng.standard_normal(canvas.albedo.shape, np.float32)
    colour = np.clip(canvas.albedo * shade + noise, 0, 1)
    normals = _to_camera(canvas.normal, room)
    return {
        "images": np.rint(rearrange(colour, "c b h w -> b h w c") * 255).astype(np.uint8),
        "segmentation": canvas.label,
        "depth": rearrange(canvas.depth, "b h w -> b 1 h w"),
        "normals": rearrange(normals, "c b h w -> b c h w").astype(np.float16),
        "object": _nearest_object(canvas, room, sprites),
    }
