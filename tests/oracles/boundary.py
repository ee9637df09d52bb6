"""IRNet's affinity loss by brute force: every pair of cells of a map, numpy only."""

import numpy as np

EPSILON = 1e-5


def affinity_loss(boundary, labels, *, radius, ignored=255):
    """(loss, gradient) of boundaries (b,h,w) under labels (b,h,w); the gradient by hand."""
    pairs = {"background": [], "foreground": [], "negative": []}
    cells = list(np.ndindex(boundary.shape[1:]))
    for photo in range(len(boundary)):
        for number, p in enumerate(cells):
            for q in cells[number + 1 :]:
                one, other = labels[photo][p], labels[photo][q]
                near = (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 < radius**2
                if near and ignored not in (one, other):
                    strongest = max(line(p, q), key=lambda cell: boundary[photo][cell])
                    pairs[kind(one, other)].append((photo, *strongest))
    loss, gradient = 0.0, np.zeros_like(boundary)
    for name, share in (("background", 0.25), ("foreground", 0.25), ("negative", 0.5)):
        weight = share / (len(pairs[name]) + EPSILON)
        for place in pairs[name]:
            if name == "negative":
                loss -= weight * np.log(boundary[place] + EPSILON)
                gradient[place] -= weight / (boundary[place] + EPSILON)
            else:
                loss -= weight * np.log(1 - boundary[place] + EPSILON)
                gradient[place] += weight / (1 - boundary[place] + EPSILON)
    return loss, gradient


def kind(one, other):
    """What a pair of two labels teaches."""
    if one != other:
        return "negative"
    return "foreground" if one else "background"


def line(p, q):
    """Cells of the pair's bounding box whose squared distance to the line through both is < 1."""
    (y0, x0), (y1, x1) = p, q
    dy, dx = y1 - y0, x1 - x0
    box = [
        (y, x)
        for y in range(min(y0, y1), max(y0, y1) + 1)
        for x in range(min(x0, x1), max(x0, x1) + 1)
    ]
    return [(y, x) for y, x in box if (dy * (x - x0) - dx * (y - y0)) ** 2 / (dy**2 + dx**2) < 1]
