"""Class activation maps written out in loops (irn, step/make_cam.py), numpy only."""

import numpy as np


def resize_bilinear(plane, size):
    """A plane (h,w) at another size; cell centres at (k + 1/2), borders held, no antialiasing."""
    height, width = plane.shape
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(v), int(u)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = v - top, u - left
            upper = (1 - dx) * plane[top, left] + dx * plane[top, right]
            lower = (1 - dx) * plane[below, left] + dx * plane[below, right]
            out[y, x] = (1 - dy) * upper + dy * lower
    return out


def activation_maps(views, size):
    """Each class's rectified maps, brought to stride 4 and summed over scales and flips.

    Args:
        views: A scale each, (maps, maps of the mirrored photo), both (n,h,w) and unrectified.
        size: (H, W) of the photo.
    """
    target = (int(np.ceil(size[0] / 4)), int(np.ceil(size[1] / 4)))
    total = np.zeros((len(views[0][0]), *target))
    for plain, mirrored in views:
        for k in range(len(plain)):
            total[k] += resize_bilinear(np.maximum(plain[k], 0), target)
            total[k] += resize_bilinear(np.maximum(mirrored[k][:, ::-1], 0), target)
    return total


def normalise(maps):
    """Each class by its own maximum + 1e-5."""
    return np.stack([plane / (plane.max() + 1e-5) for plane in maps])


def full_size(cam, size):
    """A stored map at the photo's size: every cell is 4 x 4 pixels, what lies beyond is cut."""
    full = (cam.shape[1] * 4, cam.shape[2] * 4)
    return np.stack([resize_bilinear(plane, full)[: size[0], : size[1]] for plane in cam])


def labels(scores, classes, threshold):
    """Per pixel the best class + 1, or 0 where none is above the background's score."""
    out = np.zeros(scores.shape[1:], np.uint8)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            best, winner = threshold, 0
            for score, k in zip(scores[:, y, x], classes, strict=True):
                if score > best:
                    best, winner = score, k + 1
            out[y, x] = winner
    return out
