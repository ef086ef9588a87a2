"""Photos of different shapes, kept whole: views and plain images are made of all of their pixels.

torchvision crops the original photo and resizes the crop, with antialiasing where it shrinks; so do these.
Crops are drawn in the original's pixels. A photo is stored as it is, or shrunk to a shorter side of
`data.stored_side`. This file has the formulas for whole batches on any device; `photo_kernel` for a CPU.

Shapes: N photos, V views, S view side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headsearch.core.draws import ATTEMPTS, RATIO

CHUNK_VALUES: Final = 1 << 24
"""Values of an intermediate result that are made at a time."""


@dataclass(frozen=True)
class PhotoArray:
    """N photos in one array, as they lie in the cache."""

    data: NDArray[np.uint8]
    """Bytes; a photo is (3, height, width)."""
    shapes: NDArray[np.int32]
    """(N, 4): height and width as stored, then of the original."""
    offsets: NDArray[np.int64]
    """(N,): where each begins in `data`."""

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> PhotoArray:
        return PhotoArray(self.data, self.shapes[rows], self.offsets[rows])

    @classmethod
    def packed(cls, data: NDArray[np.uint8], shapes: NDArray[np.int32]) -> PhotoArray:
        """Photos that lie one after the other in `data`."""
        return cls(data, shapes, np.concatenate([[0], np.cumsum(sizes_of(shapes))[:-1]]).astype(np.int64))

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> PhotoArray:
        """Images (N, 3, H, W) of one size, kept whole. Shares their memory where it is contiguous."""
        count, _, height, width = images.shape
        shapes = np.tile(np.array([height, width] * 2, dtype=np.int32), (count, 1))
        return cls.packed(np.ascontiguousarray(images).reshape(-1), shapes)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes of each photo."""
        for offset, size in zip(self.offsets.tolist(), sizes_of(self.shapes).tolist(), strict=True):
            yield self.data[offset : offset + size]


def sizes_of(shapes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Bytes of each photo, (N,)."""
    return 3 * shapes[:, 0].astype(np.int64) * shapes[:, 1]


@dataclass(frozen=True)
class Photos:
    """N photos, on one device. Stands where other sets have a tensor of images (N, 3, S, S).

    Rows are picked without copying any pixel.
    """

    data: Tensor
    """uint8, of one dimension."""
    shapes: Tensor
    """int32 (N, 4), as in `PhotoArray`."""
    offsets: Tensor
    """int64 (N,)."""
    image_size: int
    """S, of the views and plain images that are made of them."""
    longest: int
    """No stored side is longer."""
    squeeze: bool = False
    """A plain image is all of the photo, its proportions lost, in place of its centre."""
    center_share: float = 1.0
    """Of the photo's shorter side that the side of a plain image's centre is."""

    @classmethod
    def of(
        cls, array: PhotoArray, image_size: int, *, squeeze: bool = False, center_share: float = 1.0
    ) -> Photos:
        """Photos on the CPU; the array's memory is shared."""
        return cls(
            torch.from_numpy(array.data),
            torch.from_numpy(np.ascontiguousarray(array.shapes)),
            torch.from_numpy(np.ascontiguousarray(array.offsets)),
            image_size,
            int(array.shapes[:, :2].max(initial=1)),
            squeeze,
            center_share,
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows: slice | Tensor) -> Photos:
        return replace(self, shapes=self.shapes[rows], offsets=self.offsets[rows])

    @property
    def shape(self) -> torch.Size:
        """Of the images that are made of them: (N, 3, S, S)."""
        return torch.Size((len(self), 3, self.image_size, self.image_size))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Of these photos, not of all that `data` holds. Waits for the device."""
        return int((3 * self.shapes[:, 0].long() * self.shapes[:, 1]).sum())

    def index_select(self, dim: int, rows: Tensor) -> Photos:
        """Pick rows, as of a tensor; `dim` is 0."""
        assert dim == 0  # noqa: S101
        return self[rows]

    def split(self, size: int) -> Iterator[Photos]:
        """Yield so many at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def followed_by(self, others: Photos) -> Photos:
        """These, then others out of the same `data`."""
        return replace(
            self,
            shapes=torch.cat([self.shapes, others.shapes]),
            offsets=torch.cat([self.offsets, others.offsets]),
            longest=max(self.longest, others.longest),
        )

    def to(self, device: torch.device) -> Photos:
        """These photos, and no others, on `device`; itself if they are there already."""
        if self.data.device.type == device.type:
            return self
        sizes = 3 * self.shapes[:, 0].long() * self.shapes[:, 1]
        ends = self.offsets + sizes
        if len(self) and bool((self.offsets[1:] == ends[:-1]).all()):
            data = self.data[int(self.offsets[0]) : int(ends[-1])]
        elif len(self):
            pairs = zip(self.offsets.tolist(), ends.tolist(), strict=True)
            data = torch.cat([self.data[start:end] for start, end in pairs])
        else:
            data = self.data[:0]
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])[:-1]
        return replace(self, data=data.to(device), shapes=self.shapes.to(device), offsets=offsets.to(device))

    def boxes(self, uniform: Tensor, view: Tensor, least: float) -> Tensor:
        """Crops (V, 4): left, top, width and height in the original's pixels.

        As torchvision's RandomResizedCrop draws them of shares from `least` to 1 of the area, with its
        fallback for photos whose own ratio is outside of 3/4 to 4/3. `uniform` (V, numbers) ends with four
        times `ATTEMPTS` numbers; row i is for photo ``view[i] mod N``.
        """
        original = self.shapes.index_select(0, view % len(self))[:, 2:].float()
        height, width = original[:, :1], original[:, 1:]
        draws = uniform[:, -4 * ATTEMPTS :].unflatten(1, (4, ATTEMPTS))
        area = height * width * (least + draws[:, 0] * (1 - least))
        log_ratio = math.log(RATIO[0]) + draws[:, 1] * (math.log(RATIO[1]) - math.log(RATIO[0]))
        half = (log_ratio / 2).exp()
        across, down = (area.sqrt() * half).round(), (area.sqrt() / half).round()
        fits = (across > 0) & (across <= width) & (down > 0) & (down <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        left = (draws[:, 2] * (width - across + 1)).floor().minimum(width - across)
        top = (draws[:, 3] * (height - down + 1)).floor().minimum(height - down)
        drawn = torch.stack([left, top, across, down], -1)
        chosen = drawn.gather(1, first[:, :, None].expand(-1, -1, 4)).squeeze(1)
        across = torch.minimum(width, (height * RATIO[1]).round()).squeeze(1)
        down = torch.minimum(height, (width / RATIO[0]).round()).squeeze(1)
        left, top = ((width[:, 0] - across) / 2).floor(), ((height[:, 0] - down) / 2).floor()
        whole = torch.stack([left, top, across, down], -1)
        return torch.where(fits.any(1, keepdim=True), chosen, whole)

    def crop(self, box: Tensor, flip: Tensor, *, bicubic: bool = False) -> Tensor:
        """Resize crop `box` (N, 4) of each photo, mirrored where `flip`, to floats (N, 3, S, S) in [0, 1]."""
        made = self._resampled(*self.crop_axes(box), flip, bicubic=bicubic)
        return made.clamp_(0.0, 1.0) if bicubic else made

    def plain(self) -> Tensor:
        """Plain images, floats (N, 3, S, S) in [0, 1]: torchvision's Resize, then CenterCrop."""
        flip = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        return self._resampled(*self.plain_axes(), flip)

    def crop_axes(self, box: Tensor) -> tuple[Tensor, Tensor]:
        """Compute how crops are read across and down, (N, 4) each, in stored pixels.

        Where the crop begins, source pixels an output pixel, the first pixel that is read and the one after
        the last: none outside of the crop.
        """
        sides = self.shapes.float()
        axes = []
        for place, stored, original in ((0, sides[:, 1], sides[:, 3]), (1, sides[:, 0], sides[:, 2])):
            scale = stored / original
            start, extent = box[:, place] * scale, box[:, 2 + place] * scale
            end = (start + extent - 1e-3).ceil().minimum(stored)
            axes.append(torch.stack([start, extent / self.image_size, (start + 1e-3).floor(), end], 1))
        return axes[0], axes[1]

    def plain_axes(self) -> tuple[Tensor, Tensor]:
        """Likewise for plain images, which may read all of the photo."""
        size, sides = self.image_size, self.shapes.float()
        stored = sides[:, 1], sides[:, 0]
        zero = torch.zeros_like(stored[0])
        if self.squeeze:
            axes = [torch.stack([zero, side / size, zero, side], 1) for side in stored]
            return axes[0], axes[1]
        shorter = round(size / self.center_share)
        originals = sides[:, 3], sides[:, 2]
        least = torch.minimum(*originals)
        axes = []
        for side, original in zip(stored, originals, strict=True):
            # torchvision truncates the longer side and rounds the crop's place, halves to even
            resized = torch.where(original == least, float(shorter), (shorter * original / least).floor())
            scale, start = side / resized, ((resized - size) / 2).round()
            axes.append(torch.stack([start * scale, scale, zero, side], 1))
        return axes[0], axes[1]

    def _resampled(self, across: Tensor, down: Tensor, flip: Tensor, *, bicubic: bool = False) -> Tensor:
        size = self.image_size
        out = torch.empty(len(self), 3, size, size, device=self.device)
        reach = 2 if bicubic else 1
        taps = 2 * math.ceil(reach * max(1.0, self.longest / size)) + 1
        step = max(1, CHUNK_VALUES // (3 * self.longest * size))
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            out[rows] = self[rows]._chunk(across[rows], down[rows], flip[rows], taps, bicubic=bicubic)
        return out

    def _chunk(self, across: Tensor, down: Tensor, flip: Tensor, taps: int, *, bicubic: bool) -> Tensor:
        size, count = self.image_size, len(self)
        height, width = self.shapes[:, 0].long(), self.shapes[:, 1].long()
        column, share = weights(across, size, taps, bicubic=bicubic)
        column = torch.where(flip[:, None, None], column.flip(1), column)
        share = torch.where(flip[:, None, None], share.flip(1), share)
        line = torch.arange(self.longest, device=self.device).minimum(height[:, None] - 1)
        starts = self.offsets[:, None] + torch.arange(3, device=self.device) * (height * width)[:, None]
        at = starts[:, :, None] + (line * width[:, None])[:, None]  # (N, 3, H)
        narrow = torch.zeros(count, 3, self.longest, size, device=self.device)
        for tap in range(taps):
            index = at[..., None] + column[:, None, None, :, tap].minimum(width[:, None, None, None] - 1)
            narrow.addcmul_(self.data[index].float(), share[:, None, None, :, tap])
        row, share = weights(down, size, taps, bicubic=bicubic)
        row = row.minimum(height[:, None, None] - 1)
        out = torch.zeros(count, 3, size, size, device=self.device)
        for tap in range(taps):
            index = row[:, None, :, None, tap].expand(-1, 3, -1, size)
            out.addcmul_(narrow.gather(2, index), share[:, None, :, None, tap])
        return out.mul_(1 / 255)


def weights(axis: Tensor, size: int, taps: int, *, bicubic: bool = False) -> tuple[Tensor, Tensor]:
    """Source pixels, int64 (N, S, taps), and their weights in each output pixel.

    PIL's triangle filter, or its `bicubic` (Catmull-Rom, a = -0.5), scaled where it shrinks.
    """
    start, scale, low, high = (axis[:, place, None] for place in range(4))
    center = start + (torch.arange(size, device=axis.device) + 0.5) * scale
    support = scale.clamp(min=1.0)
    reach = 2 * support if bicubic else support
    first = (center - reach + 0.5).floor().maximum(low)
    last = (center + reach + 0.5).floor().minimum(high)
    at = first[..., None] + torch.arange(taps, device=axis.device)
    distance = ((at + 0.5 - center[..., None]) / support[..., None]).abs()
    share = cubic(distance) if bicubic else (1 - distance).clamp(min=0.0)
    share = torch.where(at < last[..., None], share, 0.0)
    return at.long(), share / share.sum(2, keepdim=True)


def cubic(distance: Tensor) -> Tensor:
    """Catmull-Rom's kernel, a = -0.5, at distances in pixels, none negative."""
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


Images = Tensor | Photos
"""What a split holds: square images of one size, uint8 (N, 3, S, S), or photos."""


def squares(images: Images) -> Tensor:
    """Plain images as uint8 (N, 3, S, S)."""
    if isinstance(images, Tensor):
        return images
    return images.plain().mul_(255).round_().to(torch.uint8)
