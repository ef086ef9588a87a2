"""Photos of any shape: views and plain images are those that torchvision makes of the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CPU, finish, start, tiny_config
from pictures import load, pixels
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import v2

from headsearch.config import ViewsConfig
from headsearch.core import feed
from headsearch.core.autoencoder import train_autoencoder
from headsearch.core.feed import batches, placed
from headsearch.core.images import ImageSet, Split
from headsearch.core.photos import PhotoArray, Photos, squares
from headsearch.core.probe import evaluate
from headsearch.core.views import Views

CROPS = ViewsConfig(jitter_strength=0.0, grayscale_probability=0.0)
IDENTITY = torch.zeros(3), torch.ones(3)
IMPLEMENTATIONS = {"kernel": True, "whole batches": False}


@pytest.fixture(scope="session")
def originals() -> list[Image.Image]:
    """scikit-learn's two photos of 640 x 427, and crops of them at 500 x 375 and 375 x 500."""
    whole = [Image.fromarray(array) for array in load_sample_images().images]
    wide = [photo.crop((70, 26, 570, 401)) for photo in whole]
    return [*whole, *wide, whole[1].crop((100, 0, 475, 427)).resize((375, 500))]


def photos_of(images: list[Image.Image], size: int, **settings: Any) -> Photos:
    """Photos stored as they are."""
    arrays = [np.asarray(image).transpose(2, 0, 1) for image in images]
    shapes = np.array([[*array.shape[1:], *array.shape[1:]] for array in arrays], dtype=np.int32)
    data = np.concatenate([array.ravel() for array in arrays])
    return Photos.of(PhotoArray.packed(data, shapes), size, **settings)


def views_of(size: int, implementation: str, config: ViewsConfig = CROPS) -> Views:
    views = Views(config, size, IDENTITY)
    views._fused = IMPLEMENTATIONS[implementation]
    return views


def unit(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def energy(images: Tensor) -> Tensor:
    """Mean square of the Laplacian, of each image."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return nn.functional.conv2d(images, kernel, groups=3).square().mean((1, 2, 3))


@pytest.mark.parametrize("size", [128, 224])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_crops_are_those_of_torchvision_on_the_originals(
    originals: list[Image.Image], size: int, implementation: str
) -> None:
    """Source pixels an output pixel and the range of aspects within 3 %."""
    photos, views = photos_of(originals, size), views_of(size, implementation)
    ours = views.draw(20_000, torch.Generator().manual_seed(0), photos=photos)
    transform = v2.RandomResizedCrop(size, scale=(CROPS.crop_scale_min, 1.0))
    torch.manual_seed(0)
    for number, original in enumerate(originals):
        theirs = [transform.make_params([original]) for _ in range(3000)]
        area = torch.tensor([float(box["height"] * box["width"]) for box in theirs])
        aspect = torch.tensor([box["width"] / box["height"] for box in theirs])
        box = ours.box[ours.view % len(photos) == number]
        assert len(box) == 4000
        assert (box == box.round()).all()
        assert float((box[:, 0] + box[:, 2]).max()) <= original.width
        assert float((box[:, 1] + box[:, 3]).max()) <= original.height
        mine = box[:, 2] * box[:, 3]
        assert abs(float(mine.mean() / area.mean()) - 1) < 0.03
        for share in (0.01, 0.5, 0.99):
            assert abs(float((box[:, 2] / box[:, 3]).quantile(share) / aspect.quantile(share)) - 1) < 0.03
        places = torch.tensor([[float(one["left"]), float(one["top"])] for one in theirs])
        assert (box[:, :2].mean(0) / places.mean(0) - 1).abs().max() < 0.08


@pytest.mark.parametrize("size", [128, 224])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_are_the_originals_crops_resized_with_antialiasing(
    originals: list[Image.Image], size: int, implementation: str
) -> None:
    """The same crops cut by PIL: equal up to PIL's rounding, so that the Laplacian's energy is the same."""
    photos, views = photos_of(originals, size), views_of(size, implementation)
    draws = views.draw(40, torch.Generator().manual_seed(1), photos=photos)
    made = views.apply(photos, draws)
    for row in range(40):
        number = int(draws.view[row])
        left, top, width, height = map(int, draws.box[row])
        crop = originals[number % len(originals)].crop((left, top, left + width, top + height))
        theirs = unit(crop.resize((size, size), Image.Resampling.BILINEAR))
        theirs = theirs.flip(2) if draws.flip[row] else theirs
        assert (made[number] - theirs).abs().max() < 0.005
        assert abs(float(energy(made[number][None]) / energy(theirs[None])) - 1) < 0.1


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bicubic_views_are_pils_crops(originals: list[Image.Image], size: int, implementation: str) -> None:
    """Up to PIL's rounding, and its clipping of overshoots between its two passes."""
    config = CROPS.model_copy(update={"interpolation": "bicubic"})
    photos, views = photos_of(originals, size), views_of(size, implementation, config)
    draws = views.draw(20, torch.Generator().manual_seed(1), photos=photos)
    made = views.apply(photos, draws)
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    for row in range(20):
        number = int(draws.view[row])
        left, top, width, height = map(int, draws.box[row])
        crop = originals[number % len(originals)].crop((left, top, left + width, top + height))
        theirs = unit(crop.resize((size, size), Image.Resampling.BICUBIC))
        theirs = theirs.flip(2) if draws.flip[row] else theirs
        assert (made[number] - theirs).abs().mean() < 0.6 / 255
        assert (made[number] - theirs).abs().quantile(0.99) < 0.01


@pytest.mark.parametrize("size", [128, 224])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("settings", [{}, {"center_share": 0.875}, {"squeeze": True}])
def test_plain_images_are_torchvisions_resize_and_centre_crop(
    originals: list[Image.Image], size: int, implementation: str, settings: dict[str, Any]
) -> None:
    photos = photos_of(originals, size, **settings)
    if "squeeze" in settings:
        transform = v2.Resize((size, size))
    else:
        transform = v2.Compose(
            [v2.Resize(round(size / settings.get("center_share", 1.0))), v2.CenterCrop(size)]
        )
    theirs = torch.stack([unit(transform(original)) for original in originals])
    assert (views_of(size, implementation).plain(photos) - theirs).abs().mean() <= 0.002
    assert (views_of(size, implementation).plain(photos) - theirs).abs().max() <= 0.02
    assert (squares(photos).int() - (theirs * 255).int()).abs().float().mean() <= 0.51


@pytest.mark.parametrize("pil", [{}, {"blur_kernel": "pil", "interpolation": "bicubic"}])
def test_both_implementations_make_the_same_views(originals: list[Image.Image], pil: dict[str, Any]) -> None:
    config = ViewsConfig(blur_probability=0.5, solarize_probability=0.2, **pil)
    kernel, whole = (views_of(96, name, config) for name in IMPLEMENTATIONS)
    photos = photos_of(originals, 96)
    draws = kernel.draw(20, torch.Generator().manual_seed(2), photos=photos)
    again = whole.draw(20, torch.Generator().manual_seed(2), photos=photos)
    assert torch.equal(draws.box, again.box)
    difference = (kernel.apply(photos, draws) - whole.apply(photos, draws)).abs()
    assert difference.mean() < 1e-4
    assert difference.quantile(0.999) < 2e-3  # solarisation has an edge at half the brightness


@pytest.mark.parametrize(("width", "height"), [(400, 60), (60, 400), (90, 80)])
def test_a_panorama_falls_back_to_its_centre_as_torchvision_does(width: int, height: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    whole = ViewsConfig(
        crop_scale_min=1.0, jitter_strength=0.0, grayscale_probability=0.0, flip_probability=0.0
    )
    photos = photos_of([image], 32)
    box = views_of(32, "kernel", whole).draw(400, torch.Generator(), photos=photos).box
    transform = v2.RandomResizedCrop(32, scale=(1.0, 1.0))
    torch.manual_seed(3)
    names = ("left", "top", "width", "height")
    theirs = [tuple(transform.make_params([image])[name] for name in names) for _ in range(400)]
    ours = {tuple(map(int, row)) for row in box}
    if max(width, height) == 400:
        assert ours == set(theirs)
        assert len(ours) == 1
    else:
        assert (0, 0, width, height) in ours & set(theirs)  # its own ratio is within 3/4 to 4/3


def folder_of(root: Path, originals: list[Image.Image], **save: Any) -> Path:
    for split in ("train", "test"):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for index, original in enumerate(originals):
                original.save(root / split / label / f"{index}.png", **save)
    return root


def test_a_folder_of_photos_keeps_them_whole_in_one_mapped_file(
    tmp_path: Path, originals: list[Image.Image]
) -> None:
    root = folder_of(tmp_path / "data", originals)
    images = load(root, image_size=64, validation_fraction=0.3)
    assert isinstance(images.train.images, Photos)
    assert images.image_size == 64
    stored = {tuple(row.tolist()) for row in images.train.images.shapes}
    assert stored <= {(original.height, original.width) * 2 for original in originals}
    assert "train.npy" in Path("/proc/self/maps").read_text()
    assert images.train.images.data.data_ptr() == images.validation.images.data.data_ptr()
    row = images.test.images[:1]
    height, width = row.shapes[0, :2].tolist()
    begin = int(row.offsets[0])
    kept = row.data[begin : begin + 3 * height * width].view(3, height, width).permute(1, 2, 0)
    assert any(
        original.size == (width, height) and np.array_equal(kept, np.asarray(original))
        for original in originals
    )
    other = load(root, image_size=48, validation_fraction=0.3)
    assert other.fingerprint != images.fingerprint
    assert (
        load(root, image_size=64, validation_fraction=0.3, center_share=0.9).fingerprint != images.fingerprint
    )


def test_larger_photos_are_shrunk_and_cropped_in_the_originals_pixels(
    tmp_path: Path, originals: list[Image.Image]
) -> None:
    root = folder_of(tmp_path / "data", originals[:1])
    for file in root.rglob("*.png"):
        Image.open(file).save(file.with_name("again.png"))
    images = load(root, image_size=64, stored_side=200, validation_fraction=0.5)
    assert isinstance(images.test.images, Photos)
    assert images.test.images.shapes[0].tolist() == [200, 300, 427, 640]
    whole = photos_of(originals[:1], 64)
    views = views_of(64, "kernel")
    draws = views.draw(8, torch.Generator().manual_seed(0), photos=whole)
    assert torch.equal(
        draws.box, views.draw(8, torch.Generator().manual_seed(0), photos=images.test.images).box
    )
    difference = views.apply(images.test.images, draws) - views.apply(whole, draws)
    assert difference.abs().mean() < 0.03
    plain = views.plain(images.test.images[:1]) - views.plain(whole)
    assert plain.abs().mean() < 0.02


def test_photos_that_lie_on_their_side_are_turned(tmp_path: Path, originals: list[Image.Image]) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    root = folder_of(tmp_path / "data", originals[:2], exif=turned)
    images = load(root, image_size=32, validation_fraction=0.5)
    assert images.test.images.shapes[0].tolist() == [640, 427, 640, 427]


def test_squares_of_the_wanted_side_stay_a_plain_array(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "test"):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for index in range(5):
                Image.fromarray(pixels(index, 12)).save(root / split / label / f"{index}.png")
    assert isinstance(load(root).train.images, Tensor)
    assert isinstance(load(root, image_size=12).train.images, Tensor)
    assert isinstance(load(root, image_size=8).train.images, Photos)
    Image.fromarray(pixels(1, 14)).save(root / "train" / "a" / "x.png")
    assert isinstance(load(root).train.images, Photos)


@pytest.fixture
def mixed(tmp_path: Path, originals: list[Image.Image]) -> ImageSet:
    """Small photos of two classes, told apart by brightness, and unlabelled ones."""
    random = np.random.default_rng(0)
    for split, count in (
        ("train/a", 20),
        ("train/b", 20),
        ("test/a", 8),
        ("test/b", 8),
        ("unlabelled/x", 24),
    ):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(count):
            height, width = random.integers(20, 40, 2)
            light = 100 * (split[-1] == "b")
            array = random.integers(light, light + 120, (height, width, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / "data" / split / f"{index}.png")
    return load(tmp_path / "data", image_size=16)


def test_a_training_on_photos_learns_and_repeats_to_the_bit(mixed: ImageSet, tmp_path: Path) -> None:
    assert mixed.counts == {"training": 32, "validation": 8, "test": 16, "unlabelled": 24}
    config = tiny_config(
        data={"image_size": 16, "normalization": "zscore"}, training={"batch_size": 16, "epochs": 3}
    )
    first, trained = finish(start(config, mixed, tmp_path))
    again, _ = finish(start(config, mixed, tmp_path))
    assert [report.loss for report in first] == [report.loss for report in again]
    measured = evaluate(trained, mixed, config, device=CPU)
    assert measured.test_accuracy > 0.8
    assert (measured.train_images, measured.test_images) == (32, 16)
    mean, _ = mixed.normalization("zscore")
    plain = squares(mixed.pretraining.images).double() / 255
    torch.testing.assert_close(mean.double(), plain.mean((0, 2, 3)), atol=1e-6, rtol=0)
    mixed.normalization("zscore-schliebitz2024")
    _, error, _ = train_autoencoder(
        tiny_config(head={"kind": "autoencoder", "embedding_dim": 4, "projection_dim": 4}).autoencoder,
        mixed,
        4,
        4,
        CPU,
    )
    assert 0 < error < 1


def test_streamed_and_packed_photos_are_the_same(mixed: ImageSet) -> None:
    split = mixed.pretraining
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(1))
    here = [squares(images) for images, _ in batches(split, order, 10, CPU)]
    elsewhere = [
        (squares(images), labels)
        for images, labels in feed.streamed_photos(split.images, split.labels, order, 10, CPU)
    ]
    assert [len(one) for one, _ in elsewhere] == [10, 10, 10, 10, 10, 6]
    for images, (streamed, labels), rows in zip(here, elsewhere, order.split(10), strict=True):
        assert torch.equal(images, streamed)
        assert torch.equal(labels, split.labels[rows])


def test_only_the_photos_of_a_split_move_to_a_device(mixed: ImageSet) -> None:
    meta = torch.device("meta")
    moved = mixed.validation.images.to(meta)
    assert len(moved.data) == mixed.validation.images.nbytes
    scattered = mixed.pretraining.images[torch.tensor([5, 1, 30])]
    assert len(scattered.to(meta).data) == scattered.nbytes
    assert placed(mixed, CPU).train.images.data.data_ptr() == mixed.train.images.data.data_ptr()
    empty = Split(mixed.train.images[:0], mixed.train.labels[:0])
    assert len(empty.to(meta).images) == 0


@pytest.mark.parametrize(
    ("file", "place"),
    [("train.npy", 3), ("test.npy", 700), ("train_shapes.npy", 16), ("train_labels.npy", 8 * 30)],
)
def test_photos_in_the_cache_are_checked_as_well(
    mixed: ImageSet, tmp_path: Path, file: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = squares(mixed.pretraining.images)
    (entry,) = [path for path in (tmp_path / "home" / "cache" / "images").iterdir() if path.is_dir()]
    content = bytearray((entry / file).read_bytes())
    content[-place] ^= 1
    (entry / file).write_bytes(content)
    again = load(tmp_path / "data", image_size=16)
    assert torch.equal(squares(again.pretraining.images), expected)
    assert again.fingerprint == mixed.fingerprint
    assert any("will be made again" in message for message in caplog.messages)
