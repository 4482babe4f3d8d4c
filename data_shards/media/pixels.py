"""Frames resized and tiled to the model's image size, exactly as InternVL does; JPEG coding.

In: uint8 RGB [H, W, 3]. Out: uint8 RGB at the model's image size; the model converts to floats, so
that workers transfer bytes. Pillow and numpy only. Flow: video -> here -> stream.
Letters: H, W pixels; P tiles.
"""

import io
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    import simplejpeg
except ImportError:  # optional: about twice as fast as Pillow
    simplejpeg = None

Pixels = NDArray[np.uint8]

MAX_PIXELS: Final = 2**26
"""Most pixels of a stored picture; a header of a few bytes can claim any size."""

# The mean colour of ImageNet in 8 bits: close to zero after the model's normalisation.
BLANK_RGB: Final = (124, 116, 104)


def blank_pixels(num_frames: int, image_size: int) -> Pixels:
    """Grey frames [num_frames, H, W, 3], read-only, without memory of their own."""
    return np.broadcast_to(
        np.array(BLANK_RGB, dtype=np.uint8), (num_frames, image_size, image_size, 3)
    )


def resize_frame(rgb_HW3: Pixels, size: int) -> Pixels:
    """One bicubic resize to [size, size, 3]; it does not keep the aspect ratio (InternVL)."""
    return _resize(rgb_HW3, size, size)


def tile_grid(
    width: int, height: int, *, max_tiles: int = 12, size: int = 448, min_tiles: int = 1
) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is nearest to width / height.

    Candidates come in order of rising number of tiles; on an exact tie the later one wins only if
    the image has more than half of its pixels.
    """
    if width < 1 or height < 1 or not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            "tile_grid: width, height and min_tiles must be at least 1 and max_tiles not below "
            f"min_tiles, found {width}x{height}, tiles {min_tiles} to {max_tiles}"
        )
    grids = sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles // columns + 1)
            if columns * rows >= min_tiles
        ),
        key=lambda grid: grid[0] * grid[1],
    )
    best, best_distance = grids[0], float("inf")
    for columns, rows in grids:
        # Floats on purpose: equality here is what decides a tie in the original.
        distance = abs(width / height - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * size * size * columns * rows:
            best = (columns, rows)
    return best


def tile_image(
    rgb_HW3: Pixels, *, max_tiles: int = 12, size: int = 448, thumbnail: bool = True
) -> Pixels:
    """Dynamic tiling of a still image: uint8 [P, size, size, 3], row by row, left to right.

    With more than one tile the whole image at `size` follows as the last tile (`thumbnail`).
    """
    height, width = rgb_HW3.shape[:2]
    columns, rows = tile_grid(width, height, max_tiles=max_tiles, size=size)
    whole = _resize(rgb_HW3, size * columns, size * rows)
    tiles_P = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if thumbnail and len(tiles_P) > 1:
        tiles_P = np.concatenate([tiles_P, resize_frame(rgb_HW3, size)[None]])
    return np.ascontiguousarray(tiles_P)


def _resize(rgb_HW3: Pixels, width: int, height: int) -> Pixels:
    if rgb_HW3.dtype != np.uint8 or rgb_HW3.ndim != 3 or rgb_HW3.shape[2] != 3:
        raise ValueError(
            f"pixels: an image must be uint8 [H, W, 3], found {rgb_HW3.dtype} {list(rgb_HW3.shape)}"
        )
    if rgb_HW3.shape[:2] == (height, width):
        return rgb_HW3
    image = Image.fromarray(rgb_HW3)
    return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))


def jpeg_encode(rgb_HW3: Pixels, quality: int = 90) -> bytes:
    """Baseline JPEG with 4:2:0 chroma; the bytes depend on the installed library."""
    if simplejpeg is not None:
        contiguous = np.ascontiguousarray(rgb_HW3)
        encoded = simplejpeg.encode_jpeg(contiguous, quality, "RGB", "420")
        return bytes(encoded)
    buffer = io.BytesIO()
    Image.fromarray(rgb_HW3).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def jpeg_decode(jpeg: bytes) -> Pixels:
    """uint8 RGB [H, W, 3] of a JPEG.

    Raises:
        ValueError: not a JPEG, cut short, or with a header that claims more than MAX_PIXELS.
    """
    try:
        if simplejpeg is not None:
            _require_size(*simplejpeg.decode_jpeg_header(jpeg)[:2])
            return np.asarray(simplejpeg.decode_jpeg(jpeg, "RGB"), dtype=np.uint8)
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            _require_size(image.height, image.width)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot decode a JPEG of {len(jpeg)} bytes: {error}") from error


def jpeg_decode_into(jpeg: bytes, out_HW3: Pixels) -> None:
    """Decode a JPEG into an array [H, W, 3], resized if it has another size.

    Raises:
        ValueError: like `jpeg_decode`.
    """
    if simplejpeg is not None:
        try:
            if simplejpeg.decode_jpeg_header(jpeg)[:2] == out_HW3.shape[:2]:
                simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out_HW3)
                return
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot decode a JPEG of {len(jpeg)} bytes: {error}") from error
    rgb_HW3 = jpeg_decode(jpeg)
    out_HW3[:] = _resize(rgb_HW3, out_HW3.shape[1], out_HW3.shape[0])


def _require_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"it claims {width}x{height} pixels, a picture has at most {MAX_PIXELS}")
