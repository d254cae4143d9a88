"""Decoded frames as RGB pictures: right colours, square pixels, upright, all of one size.

Shape suffixes beside those of `stts.tokens`: H, W = pixels of the finished picture."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stts.data.video.container import PYAV_17

_PQ, _HLG = 16, 18  # transfer characteristics in the numbers of ITU-T H.273
_BT709 = 1  # primaries and matrix there
_SDR_WHITE = 203.0  # cd/m2 of diffuse white in HDR video (ITU-R BT.2408)
_PEAK = 1000.0  # cd/m2 of the brightest highlight that stays apart from white
_KNEE = 0.7  # of SDR white: up to here brightness is kept
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


class PictureMaker:
    """Pictures of one video stream; the first picture decides the size of all."""

    def __init__(self, stream: VideoStream, shape: tuple[int, ...] | None = None) -> None:
        """shape: (H, W, 3) that all pictures get; None: that of the first one."""
        self.shape = shape
        context = stream.codec_context
        self._is_hdr = getattr(context, "color_trc", 0) in (_PQ, _HLG)
        self._transfer, self._primaries = getattr(context, "color_trc", 0), getattr(context, "color_primaries", 0)
        # Width of a pixel by its height. Under 1 %: an encoder rounded, not worth an interpolation. Beyond 10: broken.
        aspect = float(stream.sample_aspect_ratio or 1)
        self._aspect = aspect if 0.1 <= aspect <= 10 and abs(aspect - 1) >= 0.01 else 1.0

    def __call__(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """uint8 (H, W, 3), with the file's colour matrix and range, HDR brought to SDR, turned the way it is meant to
        be seen. A frame of another size than the first picture is scaled to that one, as players do.

        Untagged video is read as BT.601 limited range, as every public loader does through swscale."""
        (a, b), (c, d) = _turn(frame)
        lies = abs(b) > abs(a)  # by a quarter turn
        size = round(frame.width * self._aspect) or 1, frame.height
        if self.shape is not None:
            size = (self.shape[0], self.shape[1]) if lies else (self.shape[1], self.shape[0])
        image = self._rgb(frame, *size)
        if lies:
            image, a, d = image.transpose(1, 0, 2), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        self.shape = self.shape or image.shape
        return image

    def _rgb(self, frame: VideoFrame, width: int, height: int) -> npt.NDArray[np.uint8]:
        if PYAV_17:
            options: dict[str, Any] = {"threads": 1}
        elif frame.colorspace == _BT709:  # read as BT.601 unless the target's matrix is named, which RGB has not
            options = {"src_color_range": frame.color_range, "dst_color_range": 2, "dst_colorspace": "ITU601"}
        else:
            options = {}
        if (width, height) != (frame.width, frame.height):
            options |= {"width": width, "height": height, "interpolation": "BICUBIC"}
        if not self._is_hdr:
            return np.asarray(frame.to_ndarray(format="rgb24", **options), np.uint8)
        image = np.asarray(frame.to_ndarray(format="rgb48le", **options), np.uint16)
        return tone_map(image, self._transfer, self._primaries)


def _turn(frame: VideoFrame) -> tuple[tuple[int, int], tuple[int, int]]:
    """(a, b), (c, d) of the display matrix: quarter turns and mirrors are swaps and sign changes."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return (1, 0), (0, 1)
    # x' = a x + c y and y' = b x + d y in 16.16 fixed point.
    (a, b, _), (c, d, _) = np.frombuffer(cast(bytes, matrix), np.int32).reshape(3, 3)[:2].tolist()
    return (a, b), (c, d)


def tone_map(rgb: npt.NDArray[np.uint16], transfer: int, primaries: int) -> npt.NDArray[np.uint8]:
    """HDR to SDR: uint16 (H, W, 3) in PQ (SMPTE ST 2084) or HLG (ITU-R BT.2100), to uint8 for a BT.1886 display.

    Without it, HDR looks washed out: mid-grey and white come out alike. Light is scaled so that diffuse white,
    203 cd/m2, is SDR white; above 70 % of that, highlights up to 1000 cd/m2 are compressed smoothly:

        y = k + (1 - k) x (1 + x / w^2) / (1 + x),   x = (m - k) / (1 - k),   w = x at the peak

    with m the largest of the three colours, all of which are scaled by y / m, so that hue stays (Reinhard's curve, put
    on a straight line). Primaries go from BT.2020 to BT.709; colours outside those are clipped."""
    light = _linear(transfer)[rgb]
    if transfer == _HLG:  # the display's share: luminance to the power of 1.2 on a screen of 1000 cd/m2
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = light * (_PEAK / _SDR_WHITE) * (luminance**0.2)[..., None]
    if primaries != _BT709:
        light = light @ _BT2020_TO_BT709.T
    light = np.maximum(light, 0)
    most = np.maximum(light.max(-1, keepdims=True), 1e-6)
    x, w = (most - _KNEE) / (1 - _KNEE), (_PEAK / _SDR_WHITE - _KNEE) / (1 - _KNEE)
    curve = np.where(most > _KNEE, _KNEE + (1 - _KNEE) * x * (1 + x / w**2) / (1 + x), most)
    signal = np.clip(light * (curve / most), 0, 1) ** (1 / 2.4)
    return np.asarray(np.rint(signal * 255), np.uint8)


@lru_cache(maxsize=2)
def _linear(transfer: int) -> npt.NDArray[np.float32]:
    """Light of each uint16 code: of the display, SDR white being 1 (PQ), or of the scene, in [0, 1] (HLG)."""
    signal = np.arange(65536) / 65535
    if transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        root = signal ** (1 / m2)
        light = 10000 / _SDR_WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    return light.astype(np.float32)
