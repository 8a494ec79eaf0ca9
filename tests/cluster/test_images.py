"""Image files: what is read and how, and what is refused, by name and before memory is spent."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import ChatMessage, ImageFile, ImageUrl
from ostro.cluster.images import check_images, image_of_uri, read_image
from ostro.configs.deployment import ServingConfig

LIMITS = ServingConfig()
WHERE = "messages[0].content[1]"


def picture(width: int = 20, height: int = 10, mode: str = "RGB") -> Image.Image:
    rows = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(rows).convert(mode)


def file_bytes(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def read(data: bytes | str, serving: ServingConfig = LIMITS) -> Image.Image:
    return read_image(ImageFile(data=data, where=WHERE), serving)


def refusal(data: bytes | str, serving: ServingConfig = LIMITS) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        read(data, serving)
    assert caught.value.param == WHERE
    assert caught.value.message.startswith(f"{WHERE}: ")
    return caught.value


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def png_header(width: int, height: int, *, depth: int = 8) -> bytes:
    """A PNG of so many pixels that holds none."""
    body = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", body), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


# ---- data URIs


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:;BASE64,", "data:a/b;c=d;base64,"]
)
def test_image_of_uri_takes_a_data_uri(head: str) -> None:
    file = image_of_uri(head + "iVBORw0=", WHERE, at=3)
    assert (file.data, file.where, file.at) == ("iVBORw0=", WHERE, 3)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://example.com/a.png",
        "https",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "ftp://a/b",
        "/etc/passwd",
        "iVBORw0KGgo=",
        "javascript:alert(1)",
    ],
)
def test_image_of_uri_takes_no_other_uri_and_tells_the_way_out(uri: str) -> None:
    with pytest.raises(InvalidRequestError, match="send the file as a data URI") as caught:
        image_of_uri(uri, WHERE, at=0)
    assert (caught.value.param, caught.value.code) == (WHERE, "unsupported_value")


@pytest.mark.parametrize("url", ["https://example.com/a.png", "HTTPS://example.com/a.png"])
def test_image_of_uri_leaves_an_https_url_to_be_fetched_and_none_is_read(url: str) -> None:
    file = image_of_uri(url, WHERE, at=3)
    assert file == ImageFile(data=ImageUrl(url), where=WHERE, at=3)
    with pytest.raises(InvalidRequestError, match="nothing is fetched unless") as caught:
        read_image(file, LIMITS)
    assert (caught.value.param, caught.value.code) == (WHERE, "unsupported_value")


@pytest.mark.parametrize(
    "uri", ["data:", "data:image/png,abc", "data:image/png;base64", "data:" * 999]
)
def test_image_of_uri_wants_base64(uri: str) -> None:
    with pytest.raises(InvalidRequestError, match="must begin as in 'data:image/png;base64,'"):
        image_of_uri(uri, WHERE, at=0)


def test_an_image_file_does_not_tell_its_content() -> None:
    assert "secret" not in repr(ImageFile(data=b"secret", where=WHERE))


# ---- what is read


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "JPEG"])
def test_every_form_is_read(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = file_bytes(picture(), form, **options)
    assert pixels(read(data)).tolist() == pixels(Image.open(io.BytesIO(data))).tolist()


def test_base64_is_read() -> None:
    data = file_bytes(picture())
    assert pixels(read(base64.b64encode(data).decode())).tolist() == pixels(picture()).tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_a_png_becomes_colours(mode: str) -> None:
    image = picture(mode=mode)
    found = read(file_bytes(image))
    assert found.mode in ("RGB", "RGBA")
    assert pixels(found).tolist() == pixels(image).tolist()


def test_cmyk_becomes_rgb() -> None:
    data = file_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = pixels(read(data))[4, 4]
    assert (red > 200, green < 60, blue < 60) == (True, True, True)


def test_sixteen_bits_of_grey_are_scaled_not_clipped() -> None:
    grey = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert pixels(read(file_bytes(Image.fromarray(grey))))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_transparent_palette_keeps_its_transparency() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0
    assert read(file_bytes(image, transparency=0)).getpixel((0, 0)) == (255, 0, 0, 0)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = file_bytes(frames[0], form, save_all=True, append_images=frames[1:])
        red, _, blue = pixels(read(data))[0, 0]
        assert red > 200 > 50 > blue


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_camera_that_was_held_sideways_is_put_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_bytes(picture(), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert pixels(read(data)).tolist() == pixels(upright).tolist()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read(file_bytes(picture(), exif=exif)).size == (20, 10)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
def test_broken_exif_is_ignored() -> None:
    data = file_bytes(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert read(data).size == (20, 10)


# ---- what is refused


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"\xff\xd8\xff",
        png_header(0, 5),
        png_header(5, 0),
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert "send PNG, JPEG, WEBP or GIF" in refusal(data).message


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "ICO", "PDF", "EPS", "TGA"])
def test_other_forms_are_refused(form: str) -> None:
    assert refusal(file_bytes(picture(64, 64), form)).code == "invalid_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_cut_short_is_refused(form: str) -> None:
    data = file_bytes(picture(200, 200), form)
    for share in (0.02, 0.3, 0.9):
        assert refusal(data[: int(len(data) * share)]).code == "invalid_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_noise_in_a_file_is_read_or_refused_and_nothing_else(form: str) -> None:
    data = file_bytes(picture(64, 64), form)
    random = np.random.default_rng(1)
    for _ in range(300):
        noisy = bytearray(data)
        for place in random.integers(0, min(len(data), 2000), 3):
            noisy[place] = random.integers(256)
        try:
            read(bytes(noisy))
        except InvalidRequestError as error:
            assert error.param == WHERE  # noqa: PT017  either way is well


@pytest.mark.parametrize(
    "text", ["iVBOR", "iVBO Rw0=", "iVBO\nRw0=", "iVBO-_w=", "%69", "é" * 4, "===="]
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    assert "no valid base64" in refusal(text).message


@pytest.mark.parametrize("as_text", [False, True])
def test_a_large_file_is_refused_unread(as_text: bool) -> None:
    data = b"x" * 3001
    found = refusal(
        base64.b64encode(data).decode() if as_text else data, ServingConfig(max_image_bytes=3000)
    )
    assert found.code == "image_too_large"
    assert "3000 bytes" in found.message


def test_many_pixels_are_refused_before_they_take_memory() -> None:
    tracemalloc.start()
    try:
        found = refusal(png_header(6000, 6000))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert (found.code, "6000 x 6000" in found.message) == ("image_too_large", True)


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused(size: tuple[int, int]) -> None:
    assert refusal(png_header(*size)).code in ("image_too_large", "invalid_image")


@pytest.mark.parametrize("side", [6000, 12_000, 16_384])
def test_a_canvas_larger_than_its_frames_is_refused(side: int) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    webp = bytearray(file_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    sizes = webp.index(b"VP8X") + 12
    webp[sizes : sizes + 6] = (side - 1).to_bytes(3, "little") * 2
    gif = bytearray(file_bytes(frames[0], "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    for data in (webp, gif):
        assert refusal(bytes(data)).code == "image_too_large"


def test_a_png_whose_text_is_a_bomb_is_refused() -> None:
    text = b"k\0\0" + zlib.compress(b"\0" * 80 * 2**20)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + text))
    whole = file_bytes(picture())
    assert refusal(whole[:33] + chunk + whole[33:]).code == "invalid_image"


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = file_bytes(picture(64, 64), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert "scans" in refusal(data[:-2] + scan * 300 + data[-2:]).message


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (20_100, 100)])
def test_a_strip_is_refused(size: tuple[int, int]) -> None:
    assert "crop it" in refusal(file_bytes(Image.new("RGB", size))).message


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200)])
def test_small_and_long_images_are_read(size: tuple[int, int]) -> None:
    assert read(file_bytes(Image.new("RGB", size))).size == size


# ---- how many, and where


def message(role: str, num_images: int) -> ChatMessage:
    images = [ImageFile(data=b"", where=f"{role}[{i}]") for i in range(num_images)]
    return ChatMessage(role=role, images=tuple(images))


def test_too_many_images_are_refused_by_the_first_too_many() -> None:
    check_images([message("user", 2), message("tool", 2)], ServingConfig(max_images=4))
    with pytest.raises(InvalidRequestError, match="at most 3 images") as caught:
        check_images([message("user", 2), message("tool", 2)], ServingConfig(max_images=3))
    assert caught.value.param == "tool[1]"


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_images_stand_in_messages_of_the_user_and_of_tools(role: str) -> None:
    with pytest.raises(InvalidRequestError, match="put it in a user message") as caught:
        check_images([message(role, 1)], LIMITS)
    assert caught.value.param == f"{role}[0]"
