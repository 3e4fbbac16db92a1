"""`scenes`: ray-cast rooms with real garments standing in them, labelled exactly for four dense and image-level tasks.

Every image shows a room (checker floor, back wall, two side walls), a sphere, and one to three Fashion-MNIST garments on
tilted billboards. Because the geometry is known, segmentation, depth, surface normals and the nearest object's class
are exact, not annotated. Training and validation scenes use disjoint garment images.

Conventions: camera frame x right, y up, z forward; the ray of a pixel has z = 1, so its ray parameter *is* the depth in
metres along the optical axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtl.data.sprites import ALPHA, Sprites

# Raise it whenever the pictures or labels change: it is part of the disk cache's key.
VERSION = 1
FLOOR, WALL, SPHERE, FIRST_GARMENT = 0, 1, 2, 3
NUM_CLASSES = 13
MAX_OBJECTS = 3
# Scenes are drawn in blocks of this many, each with a generator of its own, so that the first n scenes of a split
# do not depend on how many are asked for.
BLOCK = 50

Array = NDArray[np.float32]


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
    z = np.concatenate([uniform(1.5, 2.4, 1), uniform(2.0, 4.0, k - 1)], axis=1)
    base = np.stack([z * uniform(-0.45, 0.45, k), np.zeros_like(z), z], axis=-1)
    radius = uniform(0.25, 0.6)
    sphere_z = uniform(1.8, 4.0)
    sphere = np.stack([sphere_z * uniform(-0.5, 0.5), radius, sphere_z, radius], axis=-1)
    light = np.stack([uniform(-1, 1), uniform(0.5, 1.2), uniform(-1.2, -0.3)], axis=-1)
    return _Room(
        camera_height=uniform(1.0, 1.5),
        pitch=np.deg2rad(uniform(6, 20)),
        focal=uniform(0.75, 0.9),
        wall_z=uniform(4.5, 7.0),
        wall_x=np.stack([uniform(-4.0, -1.8), uniform(1.8, 4.0)], axis=1),
        light=light / np.linalg.norm(light, axis=-1, keepdims=True),
        ambient=uniform(0.3, 0.6),
        floor_colours=uniform(0.15, 0.95, 2, 3),
        wall_colour=uniform(0.3, 0.95, 3),
        checker=uniform(0.35, 0.8),
        stripe=uniform(0.3, 1.0),
        sphere=sphere,
        sphere_colour=uniform(0.2, 1.0, 3),
        base=base,
        size=uniform(1.0, 1.5, k),
        yaw=uniform(-0.6, 0.6, k),
        lean=uniform(-0.3, 0.3, k),
        tint=uniform(0.35, 1.0, k, 3),
        present=rng.random((num, k)) < np.array([1.0, 0.7, 0.4]),
        sprite=rng.integers(0, num_sprites, (num, k)),
    )


def _camera_rays(room: _Room, size: int) -> tuple[Array, Array]:
    """Rays of all pixels in the world frame, and the world-to-camera rotation of normals ("b 3 3")."""
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x = centre[None, None, :] / room.focal[:, None, None]
    y = -centre[None, :, None] / room.focal[:, None, None]
    x, y = np.broadcast_arrays(x, y)
    cos, sin = np.cos(room.pitch), np.sin(room.pitch)
    c, s = cos[:, None, None], sin[:, None, None]
    rays = np.stack([x, y * c - s, y * s + c], axis=-1)
    zero, one = np.zeros_like(cos), np.ones_like(cos)
    rotation = np.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], axis=-1).reshape(-1, 3, 3)
    return rays.astype(np.float32), rotation.astype(np.float32)


class _Canvas:
    """The depth buffer: what each pixel shows so far. All arrays start with "b h w"."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.depth: Array = np.full(shape, np.inf, np.float32)
        self.normal: Array = np.zeros((*shape, 3), np.float32)
        self.albedo: Array = np.zeros((*shape, 3), np.float32)
        self.label = np.full(shape, WALL, np.uint8)
        self.instance = np.full(shape, -1, np.int8)

    def draw(
        self, hit: NDArray[np.bool_], depth: Array, normal: Array, albedo: Array, label: NDArray[np.uint8] | int
    ) -> NDArray[np.bool_]:
        """Draws a surface where it is hit and nearer than what is there; returns where it was drawn."""
        near = hit & (depth < self.depth) & (depth > 0.05)
        self.depth = np.where(near, depth, self.depth)
        self.normal[near] = np.broadcast_to(normal, self.normal.shape)[near]
        self.albedo[near] = np.broadcast_to(albedo, self.albedo.shape)[near]
        self.label[near] = np.broadcast_to(np.asarray(label, np.uint8), self.label.shape)[near]
        return near


def _draw_room(canvas: _Canvas, room: _Room, rays: Array) -> None:
    eye_y = room.camera_height[:, None, None]
    with np.errstate(divide="ignore"):
        t = -eye_y / rays[..., 1]
        point_x, point_z = rays[..., 0] * t, rays[..., 2] * t
        cell = np.floor(point_x / room.checker[:, None, None]) + np.floor(point_z / room.checker[:, None, None])
        odd = (np.nan_to_num(cell) % 2).astype(np.int64)
        floor_albedo = room.floor_colours[np.arange(len(odd))[:, None, None], odd]
        # A soft contact shadow under every garment tells where it stands.
        for k in range(MAX_OBJECTS):
            base = room.base[:, k, :, None, None]
            gap = ((point_x - base[:, 0]) ** 2 + (point_z - base[:, 2]) ** 2) / (0.35 * room.size[:, k, None, None]) ** 2
            shadow = 0.6 * np.exp(-gap) * room.present[:, k, None, None]
            floor_albedo = floor_albedo * (1 - shadow[..., None])
        canvas.draw(rays[..., 1] < 0, t, np.array([0, 1, 0], np.float32), floor_albedo, FLOOR)

        walls = [(2, room.wall_z, [0, 0, -1]), (0, room.wall_x[:, 0], [1, 0, 0]), (0, room.wall_x[:, 1], [-1, 0, 0])]
        for axis, offset, normal in walls:
            t = offset[:, None, None] / rays[..., axis]
            along = rays[..., 2 - axis] * t
            stripes = 0.85 + 0.15 * np.sign(np.sin(np.nan_to_num(along) * (2 * np.pi) / room.stripe[:, None, None]))
            albedo = room.wall_colour[:, None, None, :] * stripes[..., None]
            canvas.draw(t > 0, t, np.array(normal, np.float32), albedo.astype(np.float32), WALL)


def _draw_sphere(canvas: _Canvas, room: _Room, rays: Array) -> None:
    centre = room.sphere[:, :3] - np.stack([0 * room.camera_height, room.camera_height, 0 * room.camera_height], -1)
    radius = room.sphere[:, 3, None, None]
    a = np.einsum("bhwc,bhwc->bhw", rays, rays)
    half_b = np.einsum("bhwc,bc->bhw", rays, centre)
    c = np.einsum("bc,bc->b", centre, centre)[:, None, None] - radius**2
    discriminant = half_b**2 - a * c
    t = (half_b - np.sqrt(np.maximum(discriminant, 0))) / a
    normal = (rays * t[..., None] - centre[:, None, None, :]) / radius[..., None]
    canvas.draw(discriminant > 0, t, normal, room.sphere_colour[:, None, None, :], SPHERE)


def _draw_garment(canvas: _Canvas, room: _Room, rays: Array, sprites: Sprites, k: int) -> None:
    yaw, lean = room.yaw[:, k], room.lean[:, k]
    zero = np.zeros_like(yaw)
    right = np.stack([np.cos(yaw), zero, np.sin(yaw)], -1)
    up = np.stack([np.sin(yaw) * np.sin(lean), np.cos(lean), -np.cos(yaw) * np.sin(lean)], -1)
    base = room.base[:, k] - np.stack([zero, room.camera_height, zero], -1)
    normal = np.cross(up, right)
    normal = -normal * np.sign(np.einsum("bc,bc->b", normal, base))[:, None]  # towards the camera
    t = (np.einsum("bc,bc->b", normal, base)[:, None, None] / np.einsum("bhwc,bc->bhw", rays, normal)).astype(np.float32)
    offset = rays * t[..., None] - base[:, None, None, :]
    size = room.size[:, k, None, None]
    column = (np.einsum("bhwc,bc->bhw", offset, right) / size + 0.5) * 28 - 0.5
    row = (1 - np.einsum("bhwc,bc->bhw", offset, up) / size) * 28 - 0.5
    # Stand the garment on the floor: its lowest bright row, not the sprite's lower edge, touches the base.
    row = row - sprites.blank_rows[room.sprite[:, k]][:, None, None]
    hit = (column > -0.5) & (column < 27.5) & (row > -0.5) & (row < 27.5) & room.present[:, k, None, None]
    which = np.broadcast_to(room.sprite[:, k, None, None], hit.shape)
    value = np.zeros(hit.shape, np.float32)
    value[hit] = _bilinear(sprites.images, which[hit], row[hit], column[hit])
    hit &= value > ALPHA
    albedo = room.tint[:, k, None, None, :] * (0.25 + 0.75 * value[..., None])
    label = (FIRST_GARMENT + sprites.labels[room.sprite[:, k]]).astype(np.uint8)[:, None, None]
    drawn = canvas.draw(hit, t, normal[:, None, None, :].astype(np.float32), albedo, label)
    canvas.instance[drawn] = k


def _bilinear(images: NDArray[np.uint8], which: NDArray[np.int64], row: Array, column: Array) -> Array:
    row, column = np.clip(row, 0, 27), np.clip(column, 0, 27)
    top, left = np.minimum(row.astype(np.int64), 26), np.minimum(column.astype(np.int64), 26)
    down, across = row - top, column - left
    corner = lambda i, j: images[which, top + i, left + j].astype(np.float32)  # noqa: E731
    upper = corner(0, 0) * (1 - across) + corner(0, 1) * across
    lower = corner(1, 0) * (1 - across) + corner(1, 1) * across
    return ((upper * (1 - down) + lower * down) / 255).astype(np.float32)


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
    rays, rotation = _camera_rays(room, size)
    canvas = _Canvas(rays.shape[:3])
    _draw_room(canvas, room, rays)
    _draw_sphere(canvas, room, rays)
    for k in range(MAX_OBJECTS):
        _draw_garment(canvas, room, rays, sprites, k)

    # Two-sided Lambert shading: a garment has no back.
    facing = np.einsum("bhwc,bc->bhw", canvas.normal, room.light)
    shade = room.ambient[:, None, None] + (1 - room.ambient[:, None, None]) * np.abs(facing)
    noise = rng.normal(0, 0.02, canvas.albedo.shape).astype(np.float32)
    colour = np.clip(canvas.albedo * shade[..., None] + noise, 0, 1)
    normals = np.einsum("bhwc,bdc->bdhw", canvas.normal, rotation)
    return {
        "images": np.rint(colour * 255).astype(np.uint8),
        "segmentation": canvas.label,
        "depth": canvas.depth[:, None],
        "normals": normals.astype(np.float16),
        "object": _nearest_object(canvas, room, sprites),
    }
