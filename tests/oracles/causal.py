"""The causal heart in slow loops, written from docs/method.md: one number at a time, float64."""

import math

import numpy as np


def squashed(values, size):
    """Area average of a whole picture in size x size cells: sum over pixels of value x overlap."""
    height, width = values.shape
    out = np.zeros((size, size))
    for i in range(size):
        top, bottom = i * height / size, (i + 1) * height / size
        for j in range(size):
            left, right = j * width / size, (j + 1) * width / size
            total = 0.0
            for y in range(height):
                for x in range(width):
                    tall = max(0.0, min(bottom, y + 1) - max(top, y))
                    wide = max(0.0, min(right, x + 1) - max(left, x))
                    total += float(values[y, x]) * tall * wide
            out[i, j] = total / ((bottom - top) * (right - left))
    return out


def class_average_masks(masks, tags, num_classes, size):
    """c_i: mean over the photos tagged i of class i's own pixels, resized BEFORE averaging."""
    c = np.zeros((num_classes, size, size))
    for k in range(num_classes):
        tagged = [mask for mask, photo_tags in zip(masks, tags, strict=True) if k in photo_tags]
        for mask in tagged:
            own = np.zeros(mask.shape)
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    own[y, x] = 1.0 if mask[y, x] == k + 1 else 0.0
            c[k] += squashed(own, size) / len(tagged)
    return c


def alpha(x_m, c, w1, w2):
    """softmax_i((W1 X_m)^T (W2 c_i) / sqrt(n)) of one photo; x_m (hw), c, w1, w2 (n, hw)."""
    n, hw = c.shape
    logits = []
    for i in range(n):
        dot = 0.0
        for d in range(n):
            query = sum(w1[d, p] * x_m[p] for p in range(hw))
            key = sum(w2[d, p] * c[i, p] for p in range(hw))
            dot += query * key
        logits.append(dot / math.sqrt(n))
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return np.array([weight / sum(weights) for weight in weights])


def context_map(alphas, c, prior, scale):
    """M = sum_i P(c_i) f(X, c_i); under scale `n` over the RMS of the uniform-alpha M."""
    n, hw = c.shape
    m = np.zeros(hw)
    uniform = np.zeros(hw)
    for p in range(hw):
        for i in range(n):
            m[p] += prior[i] * alphas[i] * c[i, p]
            uniform[p] += prior[i] * c[i, p]
    if scale == "paper":
        return m
    rms = math.sqrt(sum(value * value for value in uniform) / hw)
    return n * m / rms


def placed(context, affine, size):
    """M below a feature map: bilinear between four cells, clamped at the border, 0 outside.

    Only for output cells no larger than the frame's, where nothing has to be averaged.
    """
    cells_y, cells_x = context.shape
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            x = affine[0, 0] * ((2 * j + 1) / size[1] - 1) + affine[0, 2]
            y = affine[1, 1] * ((2 * i + 1) / size[0] - 1) + affine[1, 2]
            if abs(x) > 1 or abs(y) > 1:
                continue
            column = ((x + 1) * cells_x - 1) / 2
            row = ((y + 1) * cells_y - 1) / 2
            left, top = math.floor(column), math.floor(row)
            for r, weight_r in ((top, 1 - (row - top)), (top + 1, row - top)):
                for q, weight_q in ((left, 1 - (column - left)), (left + 1, column - left)):
                    cell = context[min(max(r, 0), cells_y - 1), min(max(q, 0), cells_x - 1)]
                    out[i, j] += weight_r * weight_q * cell
    return out


def marginal_probability(logits, prior):
    """p_k = sum_i P(c_i) sigmoid(s_k(X, f(X, c_i))); logits (n confounders, photos, classes)."""
    num, photos, classes = logits.shape
    out = np.zeros((photos, classes))
    for b in range(photos):
        for k in range(classes):
            for i in range(num):
                out[b, k] += prior[i] / (1 + math.exp(-logits[i, b, k]))
    return out
