"""The code of a registered segmenter: MLflow keeps this file beside the weights and runs it.

It is what `mlflow models serve` answers with, photos and masks as base64. There is no pickle in it
or beside it: MLflow calls this models-from-code. `conta serve` does without it.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from wsss_core.errors import DataError
from wsss_core.stages.package import open_package
from wsss_core.stages.predict import LIMIT_PX


class PhotosToMasks(PythonModel):
    """Photos as base64 in, palette PNGs of their size as base64 out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights; MLflow calls it once, with the model's files."""
        (folder,) = context.artifacts.values()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._predictor = open_package(Path(folder), device=device)

    def predict(
        self,
        context: PythonModelContext | None,
        model_input: list[str],
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """A mask a photo.

        Args:
            context: MLflow's; what `load_context` read is enough.
            model_input: Files of photos as base64.
            params: MLflow's; none are known.

        Raises:
            DataError: If one cannot be read; none of them gets a mask then.
        """
        return [self._segment(photo) for photo in model_input]

    def _segment(self, photo: str) -> str:
        try:
            content = base64.b64decode(photo, validate=True)
        except binascii.Error as error:
            raise DataError(f"the photo is not base64 ({error}); encode the file's bytes") from None
        mask = self._predictor.segment_file(content, limit_px=LIMIT_PX)
        return base64.b64encode(mask).decode()


mlflow.models.set_model(PhotosToMasks())
