"""Outlines of the shapes that scenes draw, as polygons in a unit square; no pixels and no colours here."""

import math

import numpy as np


def rotation_matrix(angle: float) -> np.ndarray:
    """Turns column vectors by `angle` radians, clockwise on a picture whose y points down; float64 [2, 2]."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def _star() -> np.ndarray:
    angles = -math.pi / 2 + np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.52, 0.22)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.03], axis=1)


# Corners of each shape in a unit square around the origin, y down.
UNIT_SHAPES = {
    "square": np.array([(-0.46, -0.46), (0.46, -0.46), (0.46, 0.46), (-0.46, 0.46)]),
    "triangle": np.array([(0.0, -0.46), (0.5, 0.42), (-0.5, 0.42)]),
    "star": _star(),
    "cross": np.array(
        [
            *((-0.17, -0.5), (0.17, -0.5), (0.17, -0.17), (0.5, -0.17), (0.5, 0.17), (0.17, 0.17)),
            *((0.17, 0.5), (-0.17, 0.5), (-0.17, 0.17), (-0.5, 0.17), (-0.5, -0.17), (-0.17, -0.17)),
        ]
    ),
    "diamond": np.array([(0.0, -0.52), (0.4, 0.0), (0.0, 0.52), (-0.4, 0.0)]),
}


def inside_polygon(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Even-odd rule: which of the points [N, 2] lie inside the polygon [V, 2]; bool [N]."""
    x, y = points[:, :1], points[:, 1:]
    x1, y1 = vertices.T
    x2, y2 = np.roll(vertices, -1, axis=0).T
    rise = np.where(y2 == y1, 1.0, y2 - y1)  # a level edge is crossed by no level ray, whatever we divide by
    crossed = ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / rise + x1)
    return crossed.sum(axis=1) % 2 == 1
