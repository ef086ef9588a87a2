"""Random views of images for contrastive learning, made on the images' device.

CPUs make each view at one go (`viewkernel`), GPUs a batch in one launch (`cuda_views`). Here is what both are
measured by, whole batches by torch's operations: it runs where neither kernel can be had.

SimCLR's augmentation (Chen et al. 2020, appendix A): random resized crop, horizontal flip, colour jitter,
grayscale, Gaussian blur; solarisation (Grill et al. 2020, appendix B); then normalisation. Parameters have
the distributions of torchvision's transforms, and each operation its formula; the crop is resampled
bilinearly with edges clamped to the crop, or bicubically (of square images a crop is never larger than its
output, so that antialiasing would change nothing; crops of photos are antialiased, see `photos`).

Shapes: B images, V views, S image side.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional

from headsearch.config import ViewsConfig
from headsearch.core import cuda_views
from headsearch.core.color import blend_, luma, shift_hue_
from headsearch.core.draws import NUMBERS, SOLARIZE_FROM, Distribution, Draws
from headsearch.core.photos import Images, Photos, cubic
from headsearch.core.randomness import Philox, derive_seed
from headsearch.core.randomness import generator as seeded

FUSED_ON = ("cpu",)
"""Kinds of device for which each view is made at one go, by `viewkernel`."""
KERNEL_ON = ("cuda",)
"""Kinds of device for which a batch of views is made in one launch, by `cuda_views`."""

ViewStream = Generator | Philox
"""A source of the random numbers of views; `Views.stream` makes the kind that is fastest there."""

BlurKernel = Literal["tenth", "pil"]

_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Float values worked on at a time: what a core's cache holds, or a share of a GPU's memory."""


class Views:
    """Makes normalised float views of uint8 images.

    `normalization` is mean and standard deviation per channel, each (3,), in [0, 1] pixel units, on the
    device where the images will be. Views come in `dtype` and, if `channels_last`, in that memory format.
    All randomness comes from the stream that a call is given, and nothing waits for the device. With a
    `Philox` (see `stream`), `pair` is two launches, which a CUDA graph may capture. Of `photos`, whose crops
    are antialiased, the GPU's kernel makes none: whole batches do.
    """

    def __init__(
        self,
        config: ViewsConfig,
        image_size: int,
        normalization: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        photos: bool = False,
    ) -> None:
        self.config = config
        self.image_size = image_size
        self.dtype = dtype
        self.device = normalization[0].device
        self._fused = self.device.type in FUSED_ON
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = (part.float().view(1, 3, 1, 1) for part in normalization)
        self._scale, self._shift = 1 / std, -mean / std
        self._jitters = config.jitter_strength > 0 and config.jitter_probability > 0
        self.distribution = Distribution(config, image_size, mean.device)
        self._blurs, self._solarizes = max(self.distribution.blur) > 0, max(self.distribution.solarize) > 0
        self._kernel = self._load_kernel() if self.device.type in KERNEL_ON and not photos else None

    @property
    def stream_kind(self) -> str:
        """Kind of what `stream` gives: ``cpu``, ``cuda`` (whole batches) or ``cuda-philox`` (the kernel).

        States of two kinds have nothing in common, nor have the views that they draw.
        """
        return self.device.type if self._kernel is None else "cuda-philox"

    def stream(self, seed: int, *purpose: str | int) -> ViewStream:
        """Make the source of random numbers for one purpose, such as ``stream(seed, "views", epoch)``."""
        if self._kernel is None:
            return seeded(self.device, seed, *purpose)
        return Philox(derive_seed(seed, *purpose), self.device)

    def __call__(self, images: Images, stream: ViewStream) -> Tensor:
        """One view of each of the uint8 images (B, 3, S, S), or photos: float (B, 3, S, S)."""
        return self._make(images, len(images), stream)

    def pair(self, images: Images, stream: ViewStream) -> Tensor:
        """Two views of each of the uint8 images (B, 3, S, S): float (2B, 3, S, S).

        Image b's views are numbers b and B + b. Raises ValueError for a `Philox` where there is no kernel.
        """
        return self._make(images, 2 * len(images), stream, firsts=len(images))

    def plain(self, images: Images) -> Tensor:
        """The uint8 images (B, 3, S, S) as they are, normalised: float (B, 3, S, S)."""
        if isinstance(images, Photos) and self._fused:
            return self._plain_fused(images)
        pixels = images.plain() if isinstance(images, Photos) else images.float().mul_(1 / 255)
        pixels.mul_(self._scale).add_(self._shift)
        return pixels.to(self.dtype, memory_format=self.memory_format)

    def draw(
        self, count: int, generator: Generator, firsts: int | None = None, photos: Photos | None = None
    ) -> Draws:
        """Parameters of `count` random views, a multiple of 4; second views from number `firsts` on.

        Boxes are in pixels of the image, or of the originals of `photos`.
        """
        uniform = torch.rand(count, NUMBERS, generator=generator, device=generator.device)
        firsts = count if firsts is None else firsts
        if self._fused:
            from headsearch.core.viewkernel import draw_views  # loads numba

            draws = draw_views(uniform, self.distribution, firsts)
        else:
            draws = self.distribution.draws(uniform, firsts)
        if photos is None:
            return draws
        return replace(draws, box=photos.boxes(uniform, draws.view, self.config.crop_scale_min))

    def apply(self, images: Images, draws: Draws) -> Tensor:
        """Views (V, 3, S, S) that `draws` describes, view v of image v mod B."""
        if self._kernel is not None and not isinstance(images, Photos):
            return self._kernel.apply(images, draws.table())
        return self._apply_fused(images, draws) if self._fused else self._apply_batched(images, draws)

    def _apply_batched(self, images: Images, draws: Draws) -> Tensor:
        out = torch.empty(
            (len(draws), *images.shape[1:]),
            dtype=self.dtype,
            device=images.device,
            memory_format=self.memory_format,
        )
        values = _CHUNK_VALUES.get(images.device.type, _CHUNK_VALUES["cuda"])
        step = max(4, values // math.prod(images.shape[1:]) // 4 * 4)
        for start in range(0, len(draws), step):
            rows = draws.rows(start, start + step)
            pixels = self._crop(images.index_select(0, rows.view % len(images)), rows)
            if self._jitters:
                _jitter_(pixels, rows)
            if self._blurs:
                pixels = _blur(pixels, rows, self.config.blur_kernel)
            if self.config.grayscale_probability > 0:
                pixels.lerp_(luma(pixels)[:, None], rows.grayscale.float()[:, None, None, None])
            if self._solarizes:
                inverted = rows.solarize[:, None, None, None] & (pixels >= SOLARIZE_FROM)
                pixels = torch.where(inverted, 1 - pixels, pixels)
            pixels.mul_(self._scale).add_(self._shift)
            out.index_copy_(0, rows.view, pixels.to(self.dtype))
        return out

    def _apply_fused(self, images: Images, draws: Draws) -> Tensor:
        from headsearch.core.viewkernel import make_views  # loads numba

        size, last = self.image_size, self.memory_format == torch.channels_last
        weights = (
            blur_weights(size, draws, self.config.blur_kernel) if self._blurs else torch.empty(len(draws), 0)
        )
        drawn = (draws.view, draws.box, draws.flip, draws.factors, draws.order, draws.hue, draws.grayscale)
        parts = (*drawn, weights, draws.solarize, self._scale.flatten(), self._shift.flatten())
        arrays = tuple(part.contiguous().numpy() for part in parts)
        out = torch.empty(len(draws), size, size, 3) if last else torch.empty(len(draws), 3, size, size)
        flat, threads = out.flatten(1).numpy(), torch.get_num_threads()
        bicubic, repeat = self.config.interpolation == "bicubic", self.config.blur_kernel == "pil"
        if isinstance(images, Photos):
            from headsearch.core.photo_kernel import make_photo_views

            rest = (arrays[0], *arrays[2:])
            make_photo_views(
                images, draws.box, rest, flat, last=last, bicubic=bicubic, repeat=repeat, threads=threads
            )
        else:
            make_views(
                images.contiguous().numpy(),
                arrays,
                flat,
                last=last,
                bicubic=bicubic,
                repeat=repeat,
                threads=threads,
            )
        return (out.permute(0, 3, 1, 2) if last else out).to(self.dtype)

    def _plain_fused(self, images: Photos) -> Tensor:
        from headsearch.core.photo_kernel import plain_images  # loads numba

        last = self.memory_format == torch.channels_last
        out = plain_images(
            images, self._scale.flatten(), self._shift.flatten(), last=last, threads=torch.get_num_threads()
        )
        return (out.permute(0, 3, 1, 2) if last else out).to(self.dtype)

    def _make(self, images: Images, count: int, stream: ViewStream, firsts: int | None = None) -> Tensor:
        if not count:
            return self.plain(images)
        if isinstance(stream, Philox):
            if self._kernel is None or isinstance(images, Photos):
                raise ValueError(
                    f"views on {self.device} of {self.image_size} pixels have no kernel for a Philox"
                )
            return self._kernel.make(images, count, count if firsts is None else firsts, stream)
        rounded = math.ceil(count / 4) * 4
        if isinstance(images, Photos):
            draws = self.draw(rounded, stream, firsts, images)
        else:
            draws = self.draw(rounded, stream, firsts)
        # A generator's views are the same whether the kernel is there or not.
        return (self._apply_fused if self._fused else self._apply_batched)(images, draws)[:count]

    def _load_kernel(self) -> cuda_views.FusedViews | None:
        half = kernel_size(self.image_size) // 2 if self._blurs else 0
        if self.config.interpolation != "bilinear" or (self._blurs and self.config.blur_kernel != "tenth"):
            return None  # the kernel has neither: whole batches, by torch's operations
        if self.dtype not in cuda_views.DTYPES or not cuda_views.supported(self.image_size, half):
            return None
        launcher = cuda_views.load(self.device)
        if launcher is None:
            return None
        return cuda_views.FusedViews(
            launcher,
            self.distribution,
            half,
            (self._scale, self._shift),
            dtype=self.dtype,
            memory_format=self.memory_format,
        )

    def _crop(self, images: Images, draws: Draws) -> Tensor:
        """Crop, flip and resize uint8 images (V, 3, S, S) to floats in [0, 1] of the same shape."""
        if isinstance(images, Photos):
            return images.crop(draws.box, draws.flip, bicubic=self.config.interpolation == "bicubic")
        size = self.image_size
        if self.config.interpolation == "bicubic":
            pixels = images.float().mul_(1 / 255)
            across, down = (cubic_weights(size, draws.box, axis) for axis in (0, 1))
            across = torch.where(draws.flip[:, None, None], across.flip(1), across)
            return (down[:, None] @ pixels @ across.transpose(1, 2)[:, None]).clamp_(0.0, 1.0)
        center = torch.arange(size, device=images.device) + 0.5
        origin, extent = draws.box[:, :2, None], draws.box[:, 2:, None]
        at = (center * (extent / size) - 0.5).clamp_(min=0.0).minimum(extent - 1).add_(origin)  # (V, 2, S)
        across = torch.where(draws.flip[:, None], at[:, 0].flip(1), at[:, 0])
        grid = torch.empty(len(images), size, size, 2, device=images.device)
        grid[..., 0] = (across * (2 / (size - 1)) - 1)[:, None]
        grid[..., 1] = (at[:, 1] * (2 / (size - 1)) - 1)[:, :, None]
        pixels = images.float().mul_(1 / 255)
        return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=True)


def prepare(device: torch.device) -> None:
    """Load the machine code that views on `device` need; some seconds where this machine has none yet."""
    if device.type in FUSED_ON:
        statistics = torch.zeros(3), torch.ones(3)
        Views(ViewsConfig(), 8, statistics).pair(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), Generator())
    if device.type in KERNEL_ON:
        cuda_views.load(device)


def kernel_size(image_size: int) -> int:
    """Side of the blur's kernel: the odd number nearest to a tenth of the image, at least 3."""
    return max(3, 2 * int(image_size / 20) + 1)


def _jitter_(pixels: Tensor, draws: Draws) -> None:
    """Colour jitter in place, each view's operations in its own order."""
    factors = draws.factors.gather(1, draws.order)
    rest = 1 - factors
    contrast = torch.where(draws.order == 1, rest, 0.0)
    saturation = torch.where(draws.order == 2, rest, 0.0)
    for position in range(4):
        shift_hue_(pixels[position::4], draws.hue[position::4])
        if position < 3:
            blend_(pixels, factors[:, position], contrast[:, position], saturation[:, position])


def blur_weights(image_size: int, draws: Draws, kernel: BlurKernel = "tenth") -> Tensor:
    """Half of each view's blur kernel, (V, half + 1), its middle first; a view without has an impulse."""
    if kernel == "pil":
        weights = _pil_weights(draws.sigma)
    else:
        half = kernel_size(image_size) // 2
        taps = torch.arange(half + 1, device=draws.sigma.device)
        weights = (taps / draws.sigma[:, None]).square_().mul_(-0.5).exp_()
        weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    impulse = torch.arange(weights.shape[1], device=weights.device) == 0
    return torch.where(draws.blur[:, None], weights, impulse.float())


def _pil_weights(sigma: Tensor) -> Tensor:
    """Half, (V, 7), of what Pillow convolves with for each of the deviations (V,) up to 2.

    Three box filters of variance sigma^2 / 3 each, whose outermost taps have part of the others' weight
    (Gwosdek et al. 2011, extended box filter; Pillow, BoxBlur.c).
    """
    variance = sigma.double()[:, None].square() / 3
    whole = ((12 * variance + 1).sqrt().sub_(1) / 2).floor_()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    distance = torch.arange(-2, 3, device=sigma.device).abs()
    box = torch.where(distance <= whole, 1.0, torch.where(distance == whole + 1, part, 0.0))
    box = box / (2 * (whole + part) + 1)
    kernel = box
    for _ in range(2):
        wide = functional.pad(kernel, (2, 2))
        kernel = sum(  # type: ignore[assignment]
            box[:, tap : tap + 1] * wide.roll(tap - 2, 1) for tap in range(5)
        )
    return kernel[:, 6:].float()


def cubic_weights(size: int, box: Tensor, axis: Literal[0, 1]) -> Tensor:
    """Weights (V, S, S) of S input pixels in each of S output pixels along x (axis 0) or y of a crop.

    Catmull-Rom's kernel (a = -0.5) at pixel centres; pixels outside the crop have no weight, the others share
    it, as in Pillow and torchvision.
    """
    origin, extent = box[:, axis, None, None], box[:, 2 + axis, None, None]
    place = torch.arange(size, device=box.device, dtype=box.dtype)
    at = (place + 0.5)[:, None] * (extent / size) + origin
    distance = (place + 0.5 - at).abs()
    inside = (place >= origin) & (place < origin + extent)
    weights = torch.where(inside, cubic(distance), 0.0)
    return weights / weights.sum(2, keepdim=True)


def _blur(pixels: Tensor, draws: Draws, kernel: BlurKernel) -> Tensor:
    """Blur (V, 3, S, S) with each view's own kernel; a view without has an impulse."""
    weights = blur_weights(pixels.shape[-1], draws, kernel)[:, :, None, None, None]
    half = weights.shape[1] - 1
    for dim in (2, 3):
        pad = (half, half, 0, 0) if dim == 3 else (0, 0, half, half)
        edges = "replicate" if kernel == "pil" else "reflect"
        wide, side = functional.pad(pixels, pad, mode=edges), pixels.shape[dim]
        pixels = pixels * weights[:, 0]
        for tap in range(1, half + 1):
            both = wide.narrow(dim, half - tap, side) + wide.narrow(dim, half + tap, side)
            pixels.addcmul_(both, weights[:, tap])
    return pixels
