"""Slow scores, pixel by pixel and rank by rank, from docs/method.md. Numpy only."""

import numpy as np

VOID = 255


def iou_by_class(pairs, num_classes):
    """List of IoU (None for absent classes) over (predicted, truth) pairs of one split."""
    both, either = [0] * num_classes, [0] * num_classes
    for predicted, truth in pairs:
        for guess, true in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if true == VOID:
                continue
            if guess == VOID:
                guess = 0
            for k in range(num_classes):
                both[k] += guess == k and true == k
                either[k] += guess == k or true == k
    return [b / e if e else None for b, e in zip(both, either, strict=True)]


def mean_iou(pairs, num_classes):
    present = [value for value in iou_by_class(pairs, num_classes) if value is not None]
    return sum(present) / len(present)


def label_map(cam, classes, threshold):
    """(k, h, w) scores and 0-based classes to labels: background unless a class exceeds it."""
    labels = np.zeros(cam.shape[1:], np.int64)
    for y in range(cam.shape[1]):
        for x in range(cam.shape[2]):
            best = threshold
            for score, k in zip(cam[:, y, x], classes, strict=True):
                if score > best:
                    best, labels[y, x] = score, k + 1
    return labels


def average_precision(scores, positive):
    """Mean precision at the rank of each positive; equal scores share the last of their ranks."""
    total = 0.0
    for score in scores[positive]:
        ahead = scores >= score
        total += positive[ahead].sum() / ahead.sum()
    return total / positive.sum()
