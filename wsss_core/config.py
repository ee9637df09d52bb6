"""The settings tree: what a recipe may say, with unit, range, default and source of every field.

One YAML a recipe, checked whole before anything runs. Fields are frozen and unknown keys are
refused. Sources: "irn" is jiwoon-ahn/irn, "kazuto" is kazuto1011/deeplab-pytorch, "CONTA" is Zhang
et al. 2020.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsss_core.errors import SettingsError


class _Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_rest_of_groups(cls, tree: Any) -> Any:
        """A group given in part keeps the rest of its own default, not of its class's."""
        if not isinstance(tree, Mapping):
            return tree
        merged = dict(tree)
        for name, value in tree.items():
            default = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(default, BaseModel) and isinstance(value, Mapping):
                merged[name] = default.model_dump() | dict(value)
        return merged


def _check_scales(scales: tuple[float, ...]) -> tuple[float, ...]:
    if not scales or min(scales) <= 0 or max(scales) > 8:
        raise ValueError(f"should be numbers in (0, 8], not {list(scales)}")
    return scales


Scales = Annotated[tuple[float, ...], AfterValidator(_check_scales)]
"""Photo sizes relative to the original; at least one."""


class ScenesConfig(_Settings):
    """The embedded default data: small pictures drawn from a known causal graph."""

    photos: int = Field(300, ge=8, le=100_000, description="Number of training scenes.")
    val_photos: int = Field(96, ge=4, le=100_000, description="Number of scenes of each val split.")
    size_px: int = Field(128, ge=48, le=1024, description="Side of a scene, in pixels.")
    confounding: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="r: strength of every dependence the graph can cut. 1 is not identifiable.",
    )
    seed: int = Field(0, ge=0, description="Seed of the generator; independent of the run's seed.")


class DataConfig(_Settings):
    """Where the photos, their tags and, for scoring alone, their masks are."""

    source: Literal["scenes", "voc", "photos"] = Field("scenes", description="Layout of the data.")
    root: Path | None = Field(
        None, description="Folder of the data; `conta run --data DIR` sets it."
    )
    labels: str = Field(
        "labels.txt",
        description="File below root, one class a line, background first. Without labels.txt: "
        "VOC's 20 (voc), the sorted tags (photos).",
    )
    tags: str | None = Field(
        None,
        description="csv `filename,tags` below root; voc: or `Annotations` for VOC's XML. null: "
        "tags.csv (photos), image_tags.csv, or Annotations where that is absent (voc).",
    )
    train: str = Field(
        "train",
        description="List of training photos: ImageSets/Segmentation/<name>.txt (voc), "
        "<name>.txt (photos).",
    )
    val: tuple[str, ...] = Field(("val",), description="Lists that are scored; never trained on.")
    download: bool = Field(False, description="voc: let torchvision download VOC 2012 into root.")
    limit: int | None = Field(
        None, ge=1, description="Use the first N photos of every split; not of scenes."
    )
    long_side_px: int | None = Field(
        512,
        ge=32,
        description="A larger photo is seen with this long side, and so are its true masks: a "
        "network knows the sizes it was trained on (training.long_side_px), and time and memory "
        "grow with the pixels. Masks of `conta predict` and `conta export` have the photo's own "
        "size. null: every photo as it is.",
    )
    core_classes: tuple[str, ...] = Field(
        (),
        description="Classes of the second, `core` mean; background always counts. Empty: no core "
        "mean.",
    )
    scenes: ScenesConfig = ScenesConfig()


class TrainingConfig(_Settings):
    """One training loop for every model: SGD with poly decay."""

    epochs: int = Field(
        5, ge=1, le=1000, description="Passes over the training list (irn classifier: 5)."
    )
    batch_size: int = Field(16, ge=1, le=4096, description="Photos a step (irn: 16).")
    learning_rate: float = Field(
        0.1, gt=0, le=10, description="Rate of the trunk at step 0 (irn: 0.1)."
    )
    head_rate_ratio: float = Field(
        10.0, gt=0, description="New layers train at this times the trunk's rate (irn: 10)."
    )
    momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="SGD momentum. irn's code really uses its weight decay, 1e-4, here (swapped "
        "argument).",
    )
    weight_decay: float = Field(1e-4, ge=0, le=1, description="L2 decay (irn: 1e-4; kazuto: 5e-4).")
    poly_power: float = Field(
        0.9, gt=0, description="rate = rate_0 * (1 - step / steps) ** power (irn: 0.9)."
    )
    clip_norm: float | None = Field(
        10.0, gt=0, description="Largest global gradient norm; null: no clipping."
    )
    long_side_px: tuple[int, int] = Field(
        (320, 640),
        description="Random resize: the long side is drawn from this range (irn: 320-640).",
    )
    crop_px: int = Field(
        512,
        ge=32,
        le=2048,
        description="Random square crop on a zero canvas (irn: 512). A multiple of 16, as whole "
        "photos are shown: with 16 k + 1 the cells of crops and of photos lie half a cell apart.",
    )

    @model_validator(mode="after")
    def _range_ascends(self) -> TrainingConfig:
        low, high = self.long_side_px
        if not 16 <= low <= high <= 4096:
            raise ValueError(
                f"long_side_px must be an ascending pair in 16..4096, not [{low}, {high}]"
            )
        return self


class ClassifierConfig(_Settings):
    """The multi-label classifier on the photo and its context map."""

    backbone: str = Field(
        "lite0", description="lite0, resnet50, resnet101 or any timm `features_only` name."
    )
    pretrained: bool = Field(True, description="Start from ImageNet weights.")
    output_stride: Literal[8, 16] = Field(16, description="Photo pixels a feature cell (irn: 16).")
    freeze_until: int = Field(
        2,
        ge=0,
        le=5,
        description="Blocks 1..n get no update; the stem is block 1 (irn: stem to layer2 = 3).",
    )
    freeze_bn: bool = Field(
        True, description="BatchNorm uses ImageNet's statistics and affine (irn: yes)."
    )
    init: Literal["imagenet", "previous", "segmenter"] = Field(
        "imagenet",
        description="Start of the next round's classifier: CONTA issue #4 says `segmenter` helps.",
    )
    training: TrainingConfig = TrainingConfig()


_GONE = {"clusters": 0, "x_m": "self"}
"""Settings of 0.1.0 that are no more, at the value that did nothing."""


class CausalConfig(_Settings):
    """The intervention: how the next round's context map M is made (CONTA Eq. 1-4)."""

    context: Literal[
        "none",
        "seg_mask",
        "shuffled_photo",
        "shuffled_cells",
        "uniform_alpha",
        "conta",
        "pasted",
        "pasted_bare",
        "pasted_own",
    ] = Field(
        "conta",
        description="What the classifier is shown. `conta`: a map of where classes lie beside the "
        "photo; `pasted`: objects before the context of other photos (of the settings below it "
        "reads `segmenter_share` alone); "
        "`pasted_bare`: for the classifier, half of these contexts without their own objects. All "
        "others are controls (`pasted_own`: a second copy in the object's own photo).",
    )
    segmenter_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the segmenter's photos that are pasted, under the contexts that "
        "paste. It helps where ties are cut and costs where they hold (decisions/0009).",
    )
    fusion: Literal["block2", "block3", "block4", "block5", "head", "all"] = Field(
        "block5", description="Where M joins the trunk (CONTA: block 5 is best)."
    )
    adjustment: Literal["nwgm", "exact"] = Field(
        "nwgm",
        description="The sum over confounders moved inside the network (CONTA), or Eq. 1 itself: "
        "one pass a confounder behind the fusion.",
    )
    exact_samples: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="exact: draw this many confounders from P(c) for each photo of a step instead "
        "of summing over all. Training alone.",
    )
    scale: Literal["n", "paper"] = Field(
        "n", description="g of f = g alpha c: n, or 1 as the paper writes it."
    )
    prior: Literal["uniform", "frequency"] = Field(
        "uniform", description="P(c): 1/n (CONTA issue #12) or tag counts."
    )
    amplitude: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="What M is multiplied by. One channel of RMS 1 (`scale` n) beside hundreds is "
        "hardly heard; at 30 a context started from zero reaches some percent of the photo's part.",
    )
    slice_init: Literal["zero", "random"] = Field(
        "zero",
        description="Weights of the context channel at the start: zero keeps the pretrained net, "
        "bit for bit; random as PyTorch draws a convolution that is one channel wider.",
    )
    attention_std: float = Field(
        0.02,
        gt=0,
        le=10,
        description="Deviation of W1 and W2 at the start (0.02: VC R-CNN). The dot products grow "
        "with its square: at 0.02 alpha is 1/n for every photo, at 0.1 photos differ.",
    )
    context_size: int = Field(
        32, ge=4, le=128, description="Side of the canonical frame of c_i and X_m, in cells."
    )

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        asked = [name for name, idle in _GONE.items() if given.get(name, idle) != idle]
        if given.get("context") == "features":
            asked.append("context features")
        if asked:
            raise ValueError(f"{asked[0]} was taken out, for it did not help (docs/decisions/0005)")
        return {name: value for name, value in given.items() if name not in _GONE}

    @model_validator(mode="after")
    def _parts_fit(self) -> CausalConfig:
        if self.exact_samples is not None and self.adjustment != "exact":
            raise ValueError("exact_samples is read by adjustment 'exact' alone")
        if self.adjustment == "exact" and (self.context == "seg_mask" or self.pastes):
            raise ValueError(
                f"context {self.context!r} has no confounders that 'exact' could sum over"
            )
        return self

    @property
    def pastes(self) -> bool:
        """Whether objects are put elsewhere: the context is drawn in pixels."""
        return self.context in ("pasted", "pasted_bare", "pasted_own")

    @property
    def segmenter_context(self) -> str:
        """The context of the segmenter's pictures: a bare one would cost it (decisions/0009)."""
        return "pasted" if self.context == "pasted_bare" else self.context

    @property
    def has_map(self) -> bool:
        """Whether the classifier is shown a context map beside the photo."""
        return self.context != "none" and not self.pastes


Auto = Literal["auto"]
"""Chosen from tags and photos, without any truth, by stages `calibrate_seeds`, `calibrate_walk`."""
_Share = Annotated[float, Field(gt=0, lt=1)]


class SeedsConfig(_Settings):
    """Class activation maps."""

    method: Literal["cam", "folder"] = Field(
        "cam", description="`folder` reads anybody's `<photo id>.npz`."
    )
    folder: Path | None = Field(None, description="method folder: where the .npz files are.")
    scales: Scales = Field(
        (1.0, 0.5, 1.5, 2.0), description="Photo sizes, each with its flip (irn)."
    )
    threshold: _Share | Auto = Field(
        0.15,
        description="Score of the background, constant (irn eval: 0.15); or `auto`: what the "
        "classifier needs of its photos.",
    )

    @model_validator(mode="after")
    def _folder_given(self) -> SeedsConfig:
        if (self.method == "folder") != (self.folder is not None):
            raise ValueError("folder is needed by, and only by, method 'folder'")
        if self.method == "folder" and self.threshold == "auto":
            raise ValueError("threshold 'auto' asks the classifier; CAMs of a folder need a number")
        return self


class CrfConfig(_Settings):
    """Dense CRF (Kraehenbuehl and Koltun 2011), pydensecrf; defaults are irn's cam_to_ir_label."""

    iterations: int = Field(10, ge=1, le=100, description="Mean-field steps.")
    gaussian_sxy: float = Field(
        3.0, gt=0, description="Smoothness kernel: position deviation, in pixels."
    )
    gaussian_compat: float = Field(3.0, ge=0, description="Smoothness kernel: weight.")
    bilateral_sxy: float = Field(
        50.0, gt=0, description="Appearance kernel: position deviation, in pixels."
    )
    bilateral_srgb: float = Field(
        5.0, gt=0, description="Appearance kernel: colour deviation, in 0..255."
    )
    bilateral_compat: float = Field(10.0, ge=0, description="Appearance kernel: weight.")


class BoundaryConfig(_Settings):
    """IRNet's boundary network: frozen trunk, edge branch, no displacement branch."""

    backbone: str = Field(
        "lite0", description="lite0, resnet50, resnet101 or any timm `features_only` name."
    )
    pretrained: bool = Field(True, description="The trunk has ImageNet weights; it never trains.")
    radius: int = Field(
        10, ge=2, le=32, description="Pairs closer than this teach it, in cells of 4 px (irn: 10)."
    )
    # irn rescales by 0.5-1.5, which is 250-750 px for VOC's 500; its momentum really is 1e-4
    training: TrainingConfig = TrainingConfig(
        epochs=3,
        batch_size=32,
        learning_rate=0.1,
        head_rate_ratio=1.0,
        momentum=1e-4,
        long_side_px=(250, 750),
        crop_px=512,
    )


class IrnConfig(_Settings):
    """IRNet (Ahn et al. 2019) without its instance step: a walk of the seeds between boundaries."""

    foreground: _Share | Auto = Field(
        0.30,
        description="Confident labels: what scores above may be a class (irn); `auto`: "
        "seeds.threshold + 0.1.",
    )
    background: _Share | Auto = Field(
        0.05,
        description="Confident labels: what scores below may be none (irn); `auto`: "
        "seeds.threshold - 0.1.",
    )
    boundary: BoundaryConfig = BoundaryConfig()
    refine_seeds: bool = Field(
        False,
        description="A dense CRF (expansion.crf) on the seeds before the walk, which then starts "
        "from what both call an object; irn walks the CAMs as they are.",
    )
    scales: Scales = Field(
        (1.0,),
        description="Boundaries are the mean of those found at these scales of the photo (irn: 1).",
    )
    radius: int = Field(
        5, ge=2, le=32, description="A step of the walk is shorter, in cells of 4 px (irn: 5)."
    )
    beta: Annotated[float, Field(gt=0, le=100)] | Auto = Field(
        10.0, description="Power of the affinity: the greater, the shorter the walk; or `auto`."
    )
    log2_steps: Annotated[int, Field(ge=0, le=12)] | Auto = Field(
        8, description="The walk has 2 to this many steps (irn's exp_times: 8); or `auto`."
    )
    threshold: _Share | Auto = Field(
        0.25, description="Score of the background after the walk (irn: 0.25); or `auto`."
    )
    refine: bool = Field(
        False,
        description="A dense CRF (expansion.crf) after the walk, as PSA has it; irn has none.",
    )

    @model_validator(mode="after")
    def _background_is_below(self) -> IrnConfig:
        numbers = [v for v in (self.background, self.foreground) if v != "auto"]
        if numbers != sorted(numbers):
            raise ValueError(
                f"background {self.background} must not exceed foreground {self.foreground}"
            )
        return self


class ExpansionConfig(_Settings):
    """Seeds to pseudo-masks."""

    method: Literal["crf", "irn", "none", "folder"] = Field(
        "crf", description="`folder` reads anybody's mask PNGs."
    )
    folder: Path | None = Field(
        None, description="method folder: where `<photo id>.png` masks are."
    )
    unary: Literal["soft", "hard"] = Field(
        "hard",
        description="method crf: hard labels with a confidence (irn), or normalised scores.",
    )
    hard_confidence: float = Field(
        0.7, gt=0, lt=1, description="Probability of the hard label (irn: 0.7)."
    )
    crf: CrfConfig = CrfConfig()
    irn: IrnConfig = IrnConfig()

    @model_validator(mode="after")
    def _folder_given(self) -> ExpansionConfig:
        if (self.method == "folder") != (self.folder is not None):
            raise ValueError("folder is needed by, and only by, method 'folder'")
        return self


class SegmenterConfig(_Settings):
    """The segmenter trained on the pseudo-masks."""

    backbone: str = Field(
        "lite0", description="lite0, resnet50, resnet101 or any timm `features_only` name."
    )
    pretrained: bool = Field(True, description="Start from ImageNet weights, every round.")
    head: Literal["deeplabv2", "deeplabv3plus"] = Field(
        "deeplabv2", description="DeepLab v2 as CONTA, or v3+."
    )
    output_stride: Literal[8, 16] = Field(
        16, description="Photo pixels a feature cell (kazuto: 8)."
    )
    freeze_until: int = Field(1, ge=0, le=5, description="Blocks 1..n get no update.")
    freeze_bn: bool = Field(
        True, description="BatchNorm uses ImageNet's statistics and affine (kazuto: yes)."
    )
    class_balanced: bool = Field(
        False, description="Background and foreground pixels weigh the same (DSRG)."
    )
    training: TrainingConfig = TrainingConfig(
        epochs=20,
        batch_size=10,
        learning_rate=0.01,
        weight_decay=5e-4,
        long_side_px=(256, 640),
        crop_px=320,
    )


class SegmenterTestConfig(_Settings):
    """How the segmenter is scored; named in every table it enters."""

    scales: Scales = Field((1.0,), description="Photo sizes whose probabilities are averaged.")
    flip: bool = Field(True, description="Average with the mirrored photo.")
    crf: bool = Field(
        False, description="Refine by the dense CRF with `segmenter_test.crf_params`."
    )
    crf_params: CrfConfig = CrfConfig(
        gaussian_sxy=1, gaussian_compat=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4
    )


class EvaluationConfig(_Settings):
    """What is drawn and when rounds may stop; nothing here changes a mask."""

    panel_photos: int = Field(8, ge=1, le=64, description="Photos in the panel of a round.")
    worst_photos: int = Field(20, ge=0, le=200, description="Photos in the list of the worst.")
    stop_stability: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Stop when masks of two rounds agree by this mIoU; null: run every round.",
    )


class RuntimeConfig(_Settings):
    """How it is computed; never part of a key."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N."
    )
    precision: Literal["fp32", "amp"] = Field(
        "fp32", description="amp: bf16 autocast, CUDA alone. Part of keys."
    )
    threads: int = Field(2, ge=1, le=256, description="CPU threads of a training process.")
    devices: int = Field(
        1,
        ge=1,
        le=64,
        description="Share each batch of a training out to the first N GPUs, or to N processes on "
        "a CPU; that changes the last bits.",
    )
    workers: int = Field(
        2, ge=1, le=256, description="Processes for CAM, CRF and prediction, one thread each."
    )
    runner: Literal["none", "thread", "process", "dask"] = Field(
        "none",
        description="Who runs those: conta's own processes, or one of Prefect's task runners.",
    )
    dask_address: str | None = Field(
        None,
        description="runner dask: a scheduler, tls://HOST:PORT or on this machine. null: a cluster "
        "of `workers` processes here.",
    )

    @model_validator(mode="after")
    def _dask_is_closed(self) -> RuntimeConfig:
        if self.dask_address is None:
            return self
        if self.runner != "dask":
            raise ValueError("dask_address is read by runner 'dask' alone")
        scheme, _, place = self.dask_address.rpartition("://")
        with contextlib.suppress(ValueError):
            address = urlsplit(f"//{place}")
            here = scheme in ("", "tcp") and is_loopback(address.hostname or "")
            if address.port is not None and (here or scheme == "tls"):
                return self
        raise ValueError(
            f"dask_address {self.dask_address!r} must be tls://HOST:PORT, or a port of this "
            "machine (tcp://127.0.0.1:8786): a Dask scheduler runs whatever anybody sends it"
        )

    @model_validator(mode="after")
    def _several_devices_are_not_one(self) -> RuntimeConfig:
        if self.devices > 1 and ":" in self.device:
            raise ValueError(
                f"device {self.device!r} is one GPU; for devices {self.devices} say auto, cuda or "
                "cpu, and choose GPUs by CUDA_VISIBLE_DEVICES"
            )
        return self


class TrackingConfig(_Settings):
    """What goes to MLflow."""

    panels: Literal["all", "none"] = Field(
        "all", description="`none` keeps photos out of both databases."
    )


class Config(_Settings):
    """Everything a run depends on."""

    name: str = Field(
        "scenes", pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$", description="The experiment in MLflow."
    )
    seed: int = Field(0, ge=0, description="Seed of every stage.")
    rounds: int = Field(2, ge=0, le=20, description="T: rounds after round 0 (CONTA: 3).")
    supervision: Literal["tags", "truth"] = Field(
        "tags", description="`truth` trains the segmenter on true masks: the fully supervised twin."
    )
    data: DataConfig = DataConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    causal: CausalConfig = CausalConfig()
    seeds: SeedsConfig = SeedsConfig()
    expansion: ExpansionConfig = ExpansionConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    segmenter_test: SegmenterTestConfig = SegmenterTestConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    review: bool = Field(
        False,
        description="After each round but the last, wait until a person has looked at it and says "
        "whether to go on, to stop, or to change seeds.threshold.",
    )
    threshold_changes: dict[Annotated[int, Field(ge=1, le=20)], _Share] = Field(
        {},
        description="Round: seeds.threshold from there on, in the place of the one above. What a "
        "review changes is written here.",
    )
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _trunk_can_be_taken_over(self) -> Config:
        ours, theirs = self.classifier.backbone, self.segmenter.backbone
        if self.classifier.init == "segmenter" and ours != theirs:
            raise ValueError(
                f"classifier.init: a classifier of backbone {ours!r} cannot start from a segmenter "
                f"of {theirs!r}; set classifier.backbone and segmenter.backbone to the same"
            )
        return self

    @model_validator(mode="after")
    def _walk_has_a_judge(self) -> Config:
        irn = self.expansion.irn
        if self.seeds.method == "folder" and "auto" in (irn.beta, irn.log2_steps, irn.threshold):
            raise ValueError(
                "expansion.irn: 'auto' asks the classifier; with CAMs of a folder give numbers"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_sees_whole_batches(self) -> Config:
        for name, free in (
            ("classifier", not self.classifier.freeze_bn),
            ("segmenter", not self.segmenter.freeze_bn),
        ):
            if free and self.runtime.devices > 1:
                raise ValueError(
                    f"{name}.freeze_bn false: it would learn from each device's part of a batch "
                    f"alone; set it true, or runtime.devices {self.runtime.devices} to 1"
                )
        return self

    @model_validator(mode="after")
    def _batch_norm_sees_each_photo_once(self) -> Config:
        if self.causal.adjustment == "exact" and not self.classifier.freeze_bn:
            raise ValueError(
                "classifier.freeze_bn false: causal.adjustment 'exact' passes each photo once a "
                "confounder, in parts, and each pass would move its statistics; set it true"
            )
        return self

    def at_round(self, number: int) -> Config:
        """The settings of one round: those with the latest of `threshold_changes` until it."""
        begun = [start for start in self.threshold_changes if start <= number]
        if not begun:
            return self
        changed = {"threshold": self.threshold_changes[max(begun)]}
        return self.model_copy(update={"seeds": self.seeds.model_copy(update=changed)})

    def digest(self) -> str:
        """Eight hex digits of all that changes a round's result.

        Not in it: where and how fast it is computed, what is tracked, where the data folder lies,
        whether somebody looks at it, and how many rounds there are, so that a run asked for more
        rounds goes on with those it has. Nor a setting that is younger than 0.1.0, as
        long as it has its default: runs from before keep their names.
        """
        young = ("segmenter_share", "amplitude", "slice_init", "attention_std")
        default = CausalConfig()
        same_side = self.data.long_side_px == DataConfig().long_side_px
        irn, irns = self.expansion.irn, IrnConfig()
        tree = self.model_dump(
            mode="json",
            exclude={
                **({} if self.threshold_changes else {"threshold_changes": True}),
                "causal": {n for n in young if getattr(self.causal, n) == getattr(default, n)},
                "expansion": {
                    "irn": {
                        n for n in ("scales", "refine_seeds") if getattr(irn, n) == getattr(irns, n)
                    }
                },
                "rounds": True,
                "tracking": True,
                "review": True,
                "data": {"root", "download"} | ({"long_side_px"} if same_side else set()),
                "evaluation": {"stop_stability"},
                "runtime": {
                    "device",
                    "threads",
                    "devices",
                    "workers",
                    "runner",
                    "dask_address",
                },
            },
        )
        tree["causal"] |= _GONE
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine, which the network does not reach."""
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved settings of a recipe.

    Args:
        path: A YAML file; missing fields take their defaults.
        overrides: `a.b=value` texts that win over the file; the value is read as YAML.

    Raises:
        SettingsError: For a missing file, broken YAML, an unknown name or a value out of range; one
        line each.
    """
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise SettingsError(f"no recipe at {path}; the ones that ship are in recipes/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"{path} cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise SettingsError(
            f"{path} holds {type(tree).__name__}; expected settings as `name: value`"
        )
    if "arms" in tree:
        raise SettingsError(f"{path} is a study of several runs; start it by: conta study {path}")
    for text in overrides:
        _apply_override(tree, text)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a plain tree; every fault is named in one message.

    Raises:
        SettingsError: As `load_recipe`.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("; ".join(explain_faults(error.errors()))) from None


def lay_over(config: Config, tree: Mapping[str, Any]) -> Config:
    """Settings with a plain tree laid over them, which may hold any part of each group.

    Raises:
        SettingsError: As `load_recipe`.
    """
    return parse_config(_merge(config, tree))


def _merge(settings: BaseModel, tree: Mapping[str, Any]) -> dict[str, Any]:
    merged = settings.model_dump()
    for name, value in tree.items():
        group = getattr(settings, name, None)
        if isinstance(group, BaseModel) and isinstance(value, Mapping):
            value = _merge(group, value)
        merged[name] = value
    return merged


def _apply_override(tree: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"--set {text!r} is not of the form a.b=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"--set {name}: {value!r} is not a YAML value") from None
    *path, leaf = name.split(".")
    node = tree
    for part in path:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise SettingsError(f"--set {name}: {part!r} is a value, not a group of settings")
        node = child
    node[leaf] = parsed


def explain_faults(items: Sequence[Any], model: type[BaseModel] | None = None) -> list[str]:
    """Pydantic's errors as sentences, one a setting.

    A setting that may be a number or a word has an error for each, told apart by a tag.

    Args:
        items: What `ValidationError.errors` gave.
        model: Whose settings they are; by default those of a recipe.
    """
    faults: dict[tuple[str, str], list[str]] = {}
    for item in items:
        path = [str(part) for part in item["loc"] if not _UNION_TAG.match(str(part))]
        name, wanted, given = _explain(item, path, model or Config)
        faults.setdefault((name, given), []).append(wanted)
    return [
        f"{name}{' or '.join(dict.fromkeys(wanted)).replace(' or should be ', ' or ')}{given}"
        for (name, given), wanted in faults.items()
    ]


_UNION_TAG = re.compile(r"constrained-|literal\[")


def _explain(item: Any, path: Sequence[str], model: type[BaseModel]) -> tuple[str, str, str]:
    """The setting's name, what it should be, and what it is; together one sentence."""
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], model)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean '{'.'.join([*path[:-1], near[0]])}'?"
            if near
            else f"known here: {', '.join(known)}"
        )
        return f"unknown setting '{name}' ({hint})", "", ""
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    start = f"{name}: " if name else ""  # a fault between two groups names them itself
    if item["type"] in ("value_error", "missing"):  # ours name the value themselves
        return start, message, ""
    return start, message.replace("valid tuple", "list"), f", not {item['input']!r}"


def _fields_at(path: Sequence[str], model: Any) -> list[str]:
    for part in path:
        if not part.isdecimal():  # a place in a list, whose items are groups
            model = model.model_fields[part].annotation
            model = next(iter(get_args(model)), model)
    return list(model.model_fields)
