"""The random walk with the dense matrix, squared (irn, misc/indexing.py), numpy only."""

import numpy as np


def affinity(boundary, *, radius, beta):
    """A (hw,hw): (1 - max on the line)^beta of each pair nearer than the radius, 1 on itself."""
    height, width = boundary.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    matrix = np.zeros((len(cells), len(cells)))
    for i, start in enumerate(cells):
        for j, end in enumerate(cells):
            if i == j:
                matrix[i, j] = 1.0
            elif (end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2 < radius**2:
                strongest = max(boundary[cell] for cell in between(start, end))
                matrix[i, j] = (1.0 - strongest) ** beta
    return matrix


def between(start, end):
    """Cells of the bounding box whose squared distance to the line is below 1."""
    rows, columns = sorted((start[0], end[0])), sorted((start[1], end[1]))
    along = np.array([end[0] - start[0], end[1] - start[1]], float)
    normal = np.array([-along[1], along[0]]) / np.sqrt(along @ along)
    return [
        (y, x)
        for y in range(rows[0], rows[1] + 1)
        for x in range(columns[0], columns[1] + 1)
        if round(float(normal @ (y - start[0], x - start[1])) ** 2, 9) < 1
    ]


def propagate(seeds, boundary, *, radius=5, beta=10, log2_steps=8):
    """Seeds (k,h,w) times (1 - boundary), as row vectors times T^(2^log2_steps)."""
    a = affinity(boundary, radius=radius, beta=beta)
    transition = a / a.sum(axis=0)[None, :]
    for _ in range(log2_steps):
        transition = transition @ transition
    rows = (seeds * (1.0 - boundary)).reshape(len(seeds), -1)
    return (rows @ transition).reshape(seeds.shape)
