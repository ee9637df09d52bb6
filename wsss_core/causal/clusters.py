"""Background clusters as confounders: the stuff that comes with a class and has no name.

Grass, road and floor are tied to classes and are none themselves. A set C made of class masks
cannot hold them, yet they are one of the three failures CONTA is after. Here the cells that the
round's segmenter calls background are grouped by their look in a frozen trunk, and the groups join
the classes as k more confounders:

    c_j  = mean over the photos that show group j of the cells that it takes    where it lies
    z_j  = mean feature of group j, of norm 1                                   what it looks like
    P(c) = 1/(n + k), or photos tagged i and photos that show j, normalised to 1

k-means is the simplest grouping that asks neither tags nor truth for anything. Features are
standardised before it, or the few channels of largest variance would decide alone. To what follows
a group is a confounder like any other, so every control and the exact sum take it as it is.

What can be hoped for differs. Among masks alpha is asked by X_m, a foreground map: it cannot say
which stuff a photo shows, only where objects leave room for it. Under `context: features` every
position asks with its own features, so a patch beside an object has a vector of its own in M: that
is the form in which the classifier can tell the stuff from the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from wsss_core.seeding import torch_generator

MAX_STEPS = 100
"""Of k-means; it usually rests before."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Groups of cells by their look; float64.

    Attributes:
        mean: Of each channel over the cells they were found on, (C,).
        deviation: The same; 1 for a channel that never changes.
        centres: Of the groups, standardised, (k,C).
    """

    mean: np.ndarray
    deviation: np.ndarray
    centres: np.ndarray

    def __len__(self) -> int:
        """k: groups."""
        return len(self.centres)

    def assign(
        self, features: Float32[np.ndarray, "c h w"], background: Bool[np.ndarray, "h w"]
    ) -> Float32[np.ndarray, "k h w"]:
        """1 where a group takes a cell; what is not background is nobody's. Ties: the first."""
        groups = np.zeros((len(self), *background.shape), np.float32)
        if len(self):
            points = (features[:, background].T - self.mean) / self.deviation
            nearest = _nearest(torch.from_numpy(points), torch.from_numpy(self.centres))
            groups[(nearest.numpy(), *background.nonzero())] = 1
        return groups

    def prototypes(self) -> Float32[np.ndarray, "k c"]:
        """z_j; 0 for a group whose mean feature is 0."""
        means = self.centres * self.deviation + self.mean
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        return (means / np.maximum(norms, 1e-12)).astype(np.float32)


def find_clusters(cells: Float32[np.ndarray, "m c"], *, num: int, seed: int) -> Clusters:
    """k-means from a start that is drawn by k-means++ (Arthur and Vassilvitskii 2007).

    A pure function of its arguments where torch has a fixed number of threads.

    Args:
        cells: Features of background cells; none at all gives no group.
        num: k, groups; fewer come out where fewer cells differ.
        seed: Of the draw.
    """
    if not len(cells):
        width = cells.shape[1]
        return Clusters(np.zeros(width), np.ones(width), np.zeros((0, width)))
    mean, deviation = cells.mean(axis=0, dtype=np.float64), cells.std(axis=0, dtype=np.float64)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    points = torch.from_numpy((cells - mean) / deviation)
    centres = _spread(points, num, torch_generator(seed, "clusters"))
    for _ in range(MAX_STEPS):
        members = F.one_hot(_nearest(points, centres), len(centres)).double()
        counts = members.sum(0)[:, None]
        # a group that lost every cell stays where it is
        moved = torch.where(counts > 0, members.T @ points / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return Clusters(mean, deviation, centres.numpy())


def _spread(
    points: Float[Tensor, "m c"], num: int, generator: torch.Generator
) -> Float[Tensor, "_ c"]:
    """Start of k-means: each next centre a point, drawn by its squared distance to those chosen."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < num and distance.max() > 0:
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _nearest(points: Float[Tensor, "m c"], centres: Float[Tensor, "k c"]) -> Int64[Tensor, " m"]:
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(dim=1)
