"""The fully connected CRF by brute force: every pair of pixels, numpy only.

Kraehenbuehl and Koltun 2011 with Potts labels, in pydensecrf's parameters: positions in pixels and
colours in 0..255 divided by the deviations, Gaussian exp(-d^2 / 2), each kernel normalised
symmetrically, a pixel's message to itself included.
"""

import numpy as np


def refine(
    photo,
    probabilities,
    *,
    iterations,
    gaussian_sxy,
    gaussian_compat,
    bilateral_sxy,
    bilateral_srgb,
    bilateral_compat,
):
    """Mean-field marginals (l,h,w) of unary probabilities (l,h,w) and a photo (h,w,3)."""
    num_labels, height, width = probabilities.shape
    places = np.array([(x, y) for y in range(height) for x in range(width)], np.float64)
    colours = photo.reshape(-1, 3).astype(np.float64)
    appearance = np.concatenate([places / bilateral_sxy, colours / bilateral_srgb], axis=1)
    pull = gaussian_compat * kernel(places / gaussian_sxy) + bilateral_compat * kernel(appearance)

    unary = -np.log(probabilities.reshape(num_labels, -1))
    marginals = normalise(-unary)
    for _ in range(iterations):
        marginals = normalise(marginals @ pull - unary)
    return marginals.reshape(num_labels, height, width)


def kernel(features):
    """D^-1/2 K D^-1/2 over all pairs, K_ij = exp(-|f_i - f_j|^2 / 2), D its row sums."""
    distances = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    weights = np.exp(-distances / 2)
    scale = 1 / np.sqrt(weights.sum(axis=1))
    return scale[:, None] * weights * scale[None]


def normalise(scores):
    """Softmax over labels, axis 0."""
    powers = np.exp(scores - scores.max(axis=0))
    return powers / powers.sum(axis=0)
