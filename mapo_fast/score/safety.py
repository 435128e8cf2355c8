"""Safety: 1 − the probability that Yahoo's open_nsfw gives to explicit content."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mapo_fast.score.scorer import Entry, register_scorer
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import os_error, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST = 2**30
_RESIZED, _CROP = 256, 224
_MEAN_BGR = np.asarray([104, 117, 123], dtype=np.float32)
_EXTERNAL = b"\x0a\x08location"
"""ONNX's field for a file with a tensor's data, which would be read from anywhere."""


class SafetyScorer:
    """Scores in 0 … 1; higher is safer. The prompt does not count.

    Args:
        path: `open-nsfw.onnx`.

    Raises:
        UserError: onnxruntime is not installed, or the file is not that model.
    """

    version = "open_nsfw"

    def __init__(self, path: Path) -> None:
        try:
            data = read_bytes(path, _LARGEST)
        except OSError as error:
            raise os_error(error, f"read {path}") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._session = onnx_session(data, path)
        shape = self._session.get_inputs()[0].shape
        if list(shape[1:]) != [_CROP, _CROP, 3]:
            raise UserError(f"{path} takes inputs {shape}: it is not open_nsfw ({_CROP} × {_CROP} × 3)")

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Score images, (n,) float32."""
        name = self._session.get_inputs()[0].name
        found = [self._session.run(None, {name: _prepared(image)})[0][0, 1] for image in images]
        return 1 - np.asarray(found, dtype=np.float32)


def onnx_session(data: bytes, where: Path) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        UserError: onnxruntime is missing, the model reads other files, or it is damaged.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("this scorer needs onnxruntime: pip install 'mapo_fast[score]'") from None
    if _EXTERNAL in data:
        raise UserError(f"{where} keeps tensors in other files: use a model that is one file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where} is no ONNX model that onnxruntime can load: {why[:200]}") from None


def _prepared(image: Image) -> np.ndarray:
    """(1, 224, 224, 3) fp32 as open_nsfw was trained: resized, cropped, JPEG, BGR less the mean."""
    from PIL import Image as Pillow

    edge = (_RESIZED - _CROP) // 2
    image = image.convert("RGB").resize((_RESIZED, _RESIZED), Pillow.Resampling.BILINEAR)
    image.crop((edge, edge, edge + _CROP, edge + _CROP)).save(buffer := io.BytesIO(), "JPEG")
    pixels = np.asarray(Pillow.open(buffer), dtype=np.float32)[:, :, ::-1]
    return (pixels - _MEAN_BGR)[None]


register_scorer(
    "safety", Entry(lambda paths: SafetyScorer(paths[0]), ("FILE",), "1 − P(explicit) by Yahoo's open_nsfw")
)
