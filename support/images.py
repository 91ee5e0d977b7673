"""Pictures as people have them -> RGB: every format, grey of any range, turned upright, over white."""

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from support.errors import BadInput
from support.files import open_file

# What photographs and drawings come in. Of the rest that Pillow knows some run other programs (EPS).
PICTURE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def open_picture(picture: Image.Image | str | Path) -> Image.Image:
    """A picture, from its file or opened already, as RGB.

    Turned upright as its EXIF says (what cameras note in a file), the first frame of several, over white
    where it is transparent, grey of more than 8 bits as `grey` has it. Nothing else that a file says about
    its pixels is read: a profile, a comment, another tag of the EXIF.

    BadInput: no picture, a damaged one, or one of more than 2 * Image.MAX_IMAGE_PIXELS (179 million) pixels,
    which Pillow refuses before it decodes any.
    """
    try:
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
        with open_file(picture) as file:
            try:
                with Image.open(file, formats=PICTURE_FORMATS) as image:
                    return to_rgb(image)
            except (ValueError, OSError, SyntaxError):  # perhaps of what a PNG has beside its pixels
                file.seek(0)
                if file.read(len(PNG)) != PNG:
                    raise
                with Image.open(only_pixels(file), formats=("PNG",)) as image:
                    return to_rgb(image)
    except Exception as error:  # what decoders raise of damaged files has a dozen types
        name = getattr(picture, "filename", None) or picture
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(PICTURE_FORMATS)}"
        raise BadInput(f"{name} cannot be read as a picture ({reason}); replace it") from None


BESIDE_PIXELS = b"iCCP tEXt zTXt iTXt gAMA cHRM sRGB pHYs tIME acTL fcTL fdAT".split()
PNG = b"\x89PNG\r\n\x1a\n"  # with which every PNG begins


def only_pixels(file: IO[bytes]) -> IO[bytes]:
    """A PNG, of which PNG has been read, without its texts, its colour profile and the like."""
    kept = [PNG]  # then chunks: length of the content, type, content, checksum
    while len(head := file.read(8)) == 8:
        chunk = head + file.read(int.from_bytes(head[:4], "big") + 4)
        if head[4:] not in BESIDE_PIXELS:
            kept.append(chunk)
    return io.BytesIO(b"".join(kept))


# What turns a picture upright, by EXIF's orientation: 1 is upright already.
UPRIGHT = "- - FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = dict(enumerate(UPRIGHT.split()))


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an open picture upright and make it RGB, as open_picture says."""
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation), "-")
    except Exception:  # an EXIF that cannot be read has no orientation
        turn = "-"
    if image.mode.startswith(("I", "F")):
        image = grey(image)
    if turn != "-":
        image = image.transpose(Image.Transpose[turn])
    if image.has_transparency_data:  # what lies under transparent pixels is arbitrary, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats as 8 bits.

    16 bits are 0..65535. The others do not say their range: it is the first of 0..1, 0..255 and 0..65535 in
    which all their values lie. BadInput: there is none.
    """
    values = np.asarray(image)
    ranges = (1, 255, 65535)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        ranges = (65535,)
    top = next((top for top in ranges if values.min() >= 0 and values.max() <= top), None)
    if top is None:
        raise BadInput(f"its grey is {values.min():g} to {values.max():g}, not within 0 to 65535")
    if getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        values = top - values
    return Image.fromarray((values.astype(np.float32) * (255 / top)).round().astype(np.uint8))
