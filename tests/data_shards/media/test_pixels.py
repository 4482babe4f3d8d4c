"""InternVL's resize and tiling, and the JPEG codec with both libraries."""

import numpy as np
import pytest
from PIL import Image

from data_shards.media import pixels
from data_shards.media.pixels import jpeg_decode, jpeg_encode, resize_frame, tile_grid, tile_image


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def smooth_image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) % 64], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "grid", "num_tiles"),
    [
        (1280, 720, (4, 2), 9),
        (640, 360, (2, 1), 3),
        (800, 600, (4, 3), 13),
        (320, 240, (4, 3), 13),
        (448, 448, (1, 1), 1),
        (700, 701, (2, 2), 5),
        (100, 100, (1, 1), 1),
        (10, 500, (1, 12), 13),
    ],
)
def test_tiling_equals_internvl(
    width: int, height: int, grid: tuple[int, int], num_tiles: int
) -> None:
    assert tile_grid(width, height) == grid
    assert tile_image(smooth_image(height, width)).shape == (num_tiles, 448, 448, 3)


def test_a_tie_goes_to_the_larger_grid_only_with_enough_pixels() -> None:
    """1:1 is met by 1x1, 2x2 and 3x3: more than half of 2x2's pixels are 401,408."""
    assert tile_grid(633, 633) == (1, 1)  # 400,689 pixels
    assert tile_grid(634, 634) == (2, 2)  # 401,956 pixels
    assert tile_grid(951, 951) == (3, 3)  # 904,401 of 1,806,336
    assert tile_grid(951, 951, max_tiles=4) == (2, 2)
    assert tile_grid(100, 100, min_tiles=2) == (2, 2)


def test_tiles_are_crops_of_one_resize_and_a_thumbnail() -> None:
    image = random_image(60, 110)
    tiles = tile_image(image, size=32)
    columns, rows = tile_grid(110, 60, size=32)
    whole = np.asarray(
        Image.fromarray(image).resize((32 * columns, 32 * rows), Image.Resampling.BICUBIC)
    )
    for number in range(columns * rows):
        row, column = divmod(number, columns)
        crop = whole[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        np.testing.assert_array_equal(tiles[number], crop)
    np.testing.assert_array_equal(tiles[-1], resize_frame(image, 32))
    assert len(tile_image(image, size=32, thumbnail=False)) == len(tiles) - 1


def test_resize_is_pillows_bicubic() -> None:
    image = random_image(37, 53)
    expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_frame(image, 64), expected)
    same = random_image(64, 64)
    assert resize_frame(same, 64) is same


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))]
)
def test_only_rgb_bytes_are_images(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], found"):
        resize_frame(image, 8)


def test_a_grid_needs_a_size() -> None:
    with pytest.raises(ValueError, match="at least 1 and max_tiles not below"):
        tile_grid(0, 10)


@pytest.fixture(params=["simplejpeg", "pillow"])
def jpeg_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(pixels, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg", reason="simplejpeg is optional")
    return str(request.param)


def test_jpeg_keeps_the_picture(jpeg_library: str) -> None:
    image = smooth_image(48, 64)
    jpeg = jpeg_encode(image, 95)
    assert jpeg == jpeg_encode(image[:, ::1], 95) and jpeg[:2] == b"\xff\xd8"
    decoded = jpeg_decode(jpeg)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).mean() < 4
    assert len(jpeg_encode(image, 30)) < len(jpeg)


def test_both_libraries_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is optional")
    jpeg = jpeg_encode(smooth_image(48, 64), 90)
    first = jpeg_decode(jpeg).astype(int)
    monkeypatch.setattr(pixels, "simplejpeg", None)
    assert np.abs(jpeg_decode(jpeg) - first).max() <= 4  # their inverse transforms round apart


def test_broken_jpeg_is_refused(jpeg_library: str) -> None:
    jpeg = jpeg_encode(smooth_image(48, 64), 90)
    for broken in (b"", b"no picture", jpeg[: len(jpeg) // 2]):
        with pytest.raises(ValueError, match="cannot decode a JPEG"):
            jpeg_decode(broken)
