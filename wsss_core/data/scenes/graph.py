"""The causal graph of the scenes, and how a scene is drawn from it.

Four canvases z, each home to two partner classes (a leader and its company): eight classes, the
partner of i is i ^ 1. `r` is the confounding strength in [0, 1).

    1 canvas   z ~ U(4)
    2 object   i | z: with probability r one of z's two classes, else U(8)
    3 company  is present with probability .75, whatever else is drawn
    4          j | i: with probability r i's partner, else U(8 without i); touches i with
               probability .7
    5 stuff    k | i: with probability r k = i, else U(8); unlabelled
    6 place    z' = z with probability r, else U(4); the centre of i ~ N(mu of z', .08)
    7 part     a quarter of i shows the canvas z, mirrored
    8 look     poses, colours, light, blur, noise and the order of occlusion depend on nothing

By symmetry every marginal (z, i, presence, j, k, z', centre, look) is the same for every r; only
dependence changes. A split that cuts an edge draws that variable with r = 0. Each variable of a
scene has a generator of its own that draws the same numbers whether or not the edge is cut, so
scene q of all val splits differs in nothing else. What follows from several variables, such as
where the company fits beside the object, is computed from them and has no marginal of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from wsss_core.seeding import numpy_generator

CANVASES = ("meadow", "sea", "desert", "night")
CLASSES = ("house", "tree", "boat", "fish", "tent", "cactus", "rocket", "star")
STUFFS = ("flowers", "leaves", "foam", "weed", "planks", "pebbles", "embers", "ice")

COMPANY_RATIO, TOUCH_RATIO = 0.75, 0.7
PLACE_CENTRES = ((0.35, 0.37), (0.65, 0.37), (0.35, 0.63), (0.65, 0.63))  # mu of z', (x, y)
PLACE_DEVIATION = 0.08
PLACE_MARGIN = 0.16  # beyond 2.5 deviations the centre is held inside; the bound knows no class

CUT_EDGES: dict[str, frozenset[str]] = {
    "train": frozenset(),
    "val": frozenset(),
    "val_do": frozenset({"object", "company", "stuff", "place"}),
    "val_do_company": frozenset({"company"}),
    "val_do_stuff": frozenset({"stuff"}),
    "val_do_place": frozenset({"place"}),
}
"""Edges of the graph that each split draws with r = 0; named by the variable they lead to."""


@dataclass(frozen=True)
class Pose:
    """How one object stands in the picture; the same distribution for every class.

    Attributes:
        area: Share of the picture it would cover unhidden, in (0, 1).
        rotation: Radians, clockwise.
        mirrored: Whether left and right are swapped.
        stretch: Width over height, relative to the class's own silhouette.
        bend: Two phases in radians and two amplitudes of the wave that deforms the outline.
        hsv: Hue, saturation and value of its colour, each in [0, 1].
    """

    area: float
    rotation: float
    mirrored: bool
    stretch: float
    bend: tuple[float, float, float, float]
    hsv: tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """What has no cause in the graph.

    Attributes:
        part_direction: Side of the object that shows the canvas, radians.
        stuff_direction: Side of the object that the stuff lies on, radians.
        stuff_ratio: Area of the stuff over that of the object, in [.6, 1).
        company_spot: Which of the allowed spots the company takes, in [0, 1).
        company_in_front: Whether it hides the object where they overlap, or the other way round.
        light_direction: Where the light comes from, radians.
        light: Strength of shading, in [.5, 1).
        exposure: Added to every colour, of 1.
        contrast: Factor about mid-grey.
        blur: Deviation of the lens blur, share of the side.
        noise: Deviation of the sensor noise, of 1.
    """

    part_direction: float
    stuff_direction: float
    stuff_ratio: float
    company_spot: float
    company_in_front: bool
    light_direction: float
    light: float
    exposure: float
    contrast: float
    blur: float
    noise: float


@dataclass(frozen=True)
class Scene:
    """All that decides one picture, but its size.

    Attributes:
        seed: Seed of the generator.
        stream: `train`, or `val` for every val split; with `index` it names the random numbers.
        index: Number of the scene in its split, q.
        canvas: z, an index of `CANVASES`.
        object: i, an index of `CLASSES`.
        company: j, an index of `CLASSES`; None where there is no company.
        touches: Whether the company touches the object; False where there is none.
        stuff: k, an index of `STUFFS`.
        place: z', an index of `PLACE_CENTRES`.
        centre: Of the object, (x, y) in shares of the side.
        object_pose: How the object stands.
        company_pose: How the company stands, if it is there.
        look: Everything else.
    """

    seed: int
    stream: str
    index: int
    canvas: int
    object: int
    company: int | None
    touches: bool
    stuff: int
    place: int
    centre: tuple[float, float]
    object_pose: Pose
    company_pose: Pose
    look: Look

    @property
    def tags(self) -> tuple[int, ...]:
        """What a person would say is in the picture: {i} or {i, j}, ascending."""
        present = {self.object} if self.company is None else {self.object, self.company}
        return tuple(sorted(present))

    def generator(self, variable: str) -> np.random.Generator:
        """A fresh generator for one variable of this scene, the same in every val split."""
        return numpy_generator(self.seed, "scenes", self.stream, self.index, variable)


def sample_scene(split: str, *, index: int, confounding: float, seed: int) -> Scene:
    """Scene `index` of a split, drawn from the graph.

    Args:
        split: A key of `CUT_EDGES`.
        index: q, from 0.
        confounding: r, in [0, 1).
        seed: Seed of the generator.
    """
    stream = "train" if split == "train" else "val"
    draw = partial(numpy_generator, seed, "scenes", stream, index)
    strength = {
        edge: 0.0 if edge in CUT_EDGES[split] else confounding
        for edge in ("object", "company", "stuff", "place")
    }
    canvas = int(draw("canvas").integers(len(CANVASES)))
    centred = _sample_object(draw("object"), canvas, strength["object"])
    company, touches = _sample_company(draw("company"), centred, strength["company"])
    place, centre = _sample_place(draw("place"), canvas, strength["place"])
    return Scene(
        seed=seed,
        stream=stream,
        index=index,
        canvas=canvas,
        object=centred,
        company=company,
        touches=touches,
        stuff=_sample_stuff(draw("stuff"), centred, strength["stuff"]),
        place=place,
        centre=centre,
        object_pose=_sample_pose(draw("object pose"), area=(0.09, 0.15)),
        company_pose=_sample_pose(draw("company pose"), area=(0.06, 0.1)),
        look=_sample_look(draw("look")),
    )


# Each sampler draws all its numbers in one order whatever their values: a cut shifts no later draw.


def _sample_object(generator: np.random.Generator, canvas: int, strength: float) -> int:
    tied = generator.random() < strength
    at_home = 2 * canvas + int(generator.integers(2))
    anyone = int(generator.integers(len(CLASSES)))
    return at_home if tied else anyone


def _sample_company(
    generator: np.random.Generator, centred: int, strength: float
) -> tuple[int | None, bool]:
    present = generator.random() < COMPANY_RATIO
    tied = generator.random() < strength
    other = (centred + 1 + int(generator.integers(len(CLASSES) - 1))) % len(CLASSES)
    touches = generator.random() < TOUCH_RATIO
    if not present:
        return None, False
    return (centred ^ 1 if tied else other), bool(touches)


def _sample_stuff(generator: np.random.Generator, centred: int, strength: float) -> int:
    tied = generator.random() < strength
    anything = int(generator.integers(len(STUFFS)))
    return centred if tied else anything


def _sample_place(
    generator: np.random.Generator, canvas: int, strength: float
) -> tuple[int, tuple[float, float]]:
    tied = generator.random() < strength
    anywhere = int(generator.integers(len(PLACE_CENTRES)))
    offset = PLACE_DEVIATION * generator.standard_normal(2)
    place = canvas if tied else anywhere
    x, y = np.clip(np.add(PLACE_CENTRES[place], offset), PLACE_MARGIN, 1 - PLACE_MARGIN)
    return place, (float(x), float(y))


def _sample_pose(generator: np.random.Generator, *, area: tuple[float, float]) -> Pose:
    uniform: Callable[[float, float], float] = generator.uniform
    return Pose(
        area=uniform(*area),
        rotation=uniform(-0.4, 0.4),
        mirrored=bool(generator.random() < 0.5),
        stretch=float(np.exp(uniform(-0.22, 0.22))),
        bend=(uniform(0, 6.28), uniform(0, 6.28), uniform(-0.1, 0.1), uniform(-0.1, 0.1)),
        hsv=(uniform(0, 1), uniform(0.35, 0.9), uniform(0.45, 0.95)),
    )


def _sample_look(generator: np.random.Generator) -> Look:
    uniform: Callable[[float, float], float] = generator.uniform
    return Look(
        part_direction=uniform(-np.pi, np.pi),
        stuff_direction=uniform(-np.pi, np.pi),
        stuff_ratio=uniform(0.6, 1.0),
        company_spot=uniform(0, 1),
        company_in_front=bool(generator.random() < 0.5),
        light_direction=uniform(-np.pi, np.pi),
        light=uniform(0.5, 1.0),
        exposure=uniform(-0.08, 0.08),
        contrast=uniform(0.85, 1.15),
        blur=uniform(0.0, 0.006),
        noise=uniform(0.005, 0.03),
    )
