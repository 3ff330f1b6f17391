"""Photos in all file formats: each is read the same way, and each bad one raises an error of one sentence."""

import io
import struct
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image, PngImagePlugin

from geotoken_jax.backbone import preprocess
from geotoken_jax.settings import SettingsError

RED_LEFT = np.zeros((40, 60, 3), np.uint8)
RED_LEFT[:, :30] = (200, 30, 40)
RED_LEFT[:, 30:] = (20, 60, 180)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG whose header has this size, without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_reads_every_format_from_path_bytes_and_image(form, tmp_path):
    data = encoded(Image.fromarray(RED_LEFT), form)
    path = tmp_path / "photo.any"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(path)):
        image = preprocess.open_image(source)
        assert (image.mode, image.size) == ("RGB", (60, 40))
        np.testing.assert_allclose(np.asarray(image)[20, 5], RED_LEFT[20, 5], atol=12)


def test_reads_arrays():
    np.testing.assert_array_equal(preprocess.open_image(RED_LEFT), RED_LEFT)
    gray = preprocess.open_image(RED_LEFT[..., 0])
    np.testing.assert_array_equal(np.asarray(gray)[..., 2], RED_LEFT[..., 0])
    for wrong in (RED_LEFT.astype(np.float32), RED_LEFT[None], RED_LEFT[..., :2], RED_LEFT[:0]):
        with pytest.raises(preprocess.ImageError, match="uint8"):
            preprocess.open_image(wrong)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_sets_photos_upright(orientation, form):
    backwards = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(RED_LEFT)
    if orientation > 1:
        stored = stored.transpose(preprocess._UPRIGHT[backwards])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = preprocess.open_image(encoded(stored, form, exif=exif))
    np.testing.assert_allclose(np.asarray(image)[20, [5, 55]], RED_LEFT[20, [5, 55]], atol=12)


def test_orientation_6_is_a_quarter_turn_to_the_right():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = preprocess.open_image(encoded(Image.fromarray(RED_LEFT), "PNG", exif=exif))
    assert image.size == (40, 60)
    np.testing.assert_array_equal(np.asarray(image)[5, 20], RED_LEFT[20, 5])  # left becomes top


def test_lays_alpha_over_white():
    rgba = np.dstack([RED_LEFT, np.full((40, 60), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    palette = Image.fromarray(RED_LEFT).quantize(4)
    palette.info["transparency"] = palette.getpixel((5, 5))
    for image, point in (
        (Image.fromarray(rgba), (5, 5)),
        (Image.fromarray(rgba).convert("LA"), (5, 5)),
        (palette, (20, 5)),
    ):
        pixels = np.asarray(preprocess.open_image(encoded(image)))
        assert pixels[point].tolist() == [255, 255, 255]
        assert pixels[20, 55, 0] < 100


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_scales_16_bit_gray(form):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(preprocess.open_image(encoded(Image.fromarray(ramp), form)))
    np.testing.assert_array_equal(pixels[..., 1].ravel(), np.arange(256))


def test_reads_cmyk_and_the_first_frame():
    cmyk = encoded(Image.fromarray(RED_LEFT).convert("CMYK"), "JPEG")
    np.testing.assert_allclose(np.asarray(preprocess.open_image(cmyk))[20, 5], RED_LEFT[20, 5], atol=12)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert preprocess.open_image(moving).getpixel((4, 4)) == (255, 0, 0)


def test_decodes_a_large_jpeg_small_when_that_suffices():
    data = encoded(Image.new("RGB", (1600, 800), "green"), "JPEG")
    assert preprocess.open_image(data).size == (1600, 800)
    assert preprocess.open_image(data, min_side=64).size == (200, 100)
    assert preprocess.open_image(data, min_side=600).size == (1600, 800)


def test_refuses_in_one_sentence(tmp_path):
    photo = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    (tmp_path / "text.jpg").write_text("not a photo")
    (tmp_path / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    (tmp_path / "header.jpg").write_bytes(photo[:10])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "icon.ico").write_bytes(encoded(Image.new("RGB", (16, 16)), "ICO"))
    cases = {
        "missing.jpg": "does not exist",
        "text.jpg": "is not a JPEG, PNG",
        "cut.jpg": "damaged or cut short",
        "header.jpg": "damaged or cut short",
        "empty.jpg": "is empty",
        "icon.ico": "is not a JPEG, PNG",
        ".": "is a folder",
    }
    for name, reason in cases.items():
        with pytest.raises(preprocess.ImageError, match=reason) as error:
            preprocess.open_image(tmp_path / name)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    for source, reason in ((b"", "is empty"), (photo[:-100], "damaged or cut short"), (7, "not int")):
        with pytest.raises(preprocess.ImageError, match=reason):
            preprocess.open_image(source, whole=True)


def test_a_jpeg_without_its_last_bytes_is_used_with_a_warning(caplog):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 64, 3), np.uint8))
    photo = encoded(image, "JPEG")
    found = np.asarray(preprocess.open_image(photo[:-300]))
    np.testing.assert_array_equal(found[:160], np.asarray(preprocess.open_image(photo))[:160])
    assert "lacks its last bytes" in caplog.text
    with pytest.raises(preprocess.ImageError, match=r"lacks [3-9].% of its rows"):
        preprocess.open_image(photo[: len(photo) // 2])


@pytest.mark.parametrize(("top", "dtype"), [(4095, np.uint16), (65_535, np.uint16), (2**31 - 1, np.int32)])
def test_gray_of_more_than_8_bits_is_scaled_by_its_full_scale(top, dtype):
    gray = (np.linspace(0, 1, 64) * top).round().astype(dtype).reshape(8, 8)
    expected = (gray / (top if top < 2**31 - 1 else 2**32 - 1) * 255).round()
    found = np.asarray(preprocess.open_image(Image.fromarray(gray)))
    assert abs(found[..., 0] - expected).max() <= 1


def test_float_gray_from_0_to_1_is_not_black():
    gray = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.asarray(preprocess.open_image(Image.fromarray(gray))).max() == 255


def test_a_callers_image_is_not_changed(tmp_path):
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    small = preprocess.open_image(image, min_side=32)
    assert image.size == (400, 300) and small.size == preprocess.open_image(tmp_path / "a.jpg", 32).size
    image.close()
    with pytest.raises(preprocess.ImageError, match="the image is closed: pass it before"):
        preprocess.open_image(image)


def test_a_png_with_2_mb_of_text_is_read():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG", pnginfo=info)
    assert preprocess.open_image(file.getvalue()).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_reads_what_phones_write(kind):
    image = Image.fromarray(np.full((40, 60, 3), (200, 30, 60), np.uint8))
    if kind == "HEIF":
        file = io.BytesIO()
        pillow_heif.from_pillow(image).save(file, quality=90)
        photo = file.getvalue()
    else:
        photo = encoded(image, kind)
    found = preprocess.open_image(photo)
    assert found.size == (60, 40) and abs(np.asarray(found).mean((0, 1)) - (200, 30, 60)).max() < 6


@pytest.mark.parametrize("size", [(40_000, 40_000), (12_000, 12_000), (30_001, 1), (100_000, 2)])
def test_refuses_bombs_by_their_header(size):
    with warnings.catch_warnings(), pytest.raises(preprocess.ImageError, match=f"{size[0]:,} x"):
        warnings.simplefilter("error")
        preprocess.open_image(png_header(*size))


def test_names_a_place():
    assert preprocess.place_text("Lyon", "Rhône", "France") == "A street view photo taken in Lyon, Rhône, France"
    assert preprocess.place_text("", "", "France") == "A street view photo taken in France"
    assert preprocess.place_text("", "", "") == ""


#: Settings of published CLIP and SigLIP 2 checkpoints, at another size.
CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 3}
CLIP |= {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.25, 0.5, 1.0]}
SIGLIP = {"size": {"height": 16, "width": 16}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_clip_sees_the_center_of_a_photo_and_siglip_all_of_it():
    photo = noise(41, 20)
    clip, siglip = (preprocess.Processor.read(config, 16) for config in (CLIP, SIGLIP))
    whole = np.asarray(photo.resize((32, 16), Image.Resampling.BICUBIC))  # 32.8 is rounded down, as published
    np.testing.assert_array_equal(clip.fit(photo), whole[:, 8:24])
    np.testing.assert_array_equal(siglip.fit(photo), np.asarray(photo.resize((16, 16), Image.Resampling.BILINEAR)))


def test_pixels_are_normalized_by_channel():
    clip = preprocess.Processor.read(CLIP, 16)
    found = clip.normalize(np.array([[[[0, 51, 255]]]], np.uint8))
    np.testing.assert_allclose(found, [[[[-2, -0.1, 0.25]]]], atol=1e-6)
    assert found.dtype == np.float32
    raw = preprocess.Processor.read({**CLIP, "do_normalize": False, "do_rescale": False}, 16)
    np.testing.assert_array_equal(raw.normalize(np.uint8([7])), [7, 7, 7])


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (30_000, 1), (3, 30_000)])
@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_a_photo_of_any_shape_fills_its_square(config, size, monkeypatch):
    processor = preprocess.Processor.read(config, 16)
    plain = processor.fit(Image.new("RGB", size, (200, 30, 40)))
    assert plain.shape == (16, 16, 3) and (plain == (200, 30, 40)).all()
    found = processor.fit(noise(*size)).astype(int)
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 0)  # resizes only the visible part
    assert np.abs(processor.fit(noise(*size)) - found).mean() < 1


def test_gray_and_transparent_photos_are_seen_as_rgb():
    processor = preprocess.Processor.read(CLIP, 16)
    gray = processor.fit(preprocess.open_image(Image.new("L", (20, 20), 90)))
    assert (gray == 90).all() and gray.shape == (16, 16, 3)
    clear = processor.fit(preprocess.open_image(Image.new("RGBA", (20, 20), (0, 0, 0, 0))))
    assert (clear == 255).all()  # over white, as in transformers since version 5


def test_older_forms_of_a_processors_settings_are_read():
    old = preprocess.Processor.read({**CLIP, "size": 16, "crop_size": 16}, 16)
    assert old == preprocess.Processor.read(CLIP, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": {"height": 15, "width": 16}},
        {"size": {"shortest_edge": 15}},
        {"do_center_crop": False},
        {"do_resize": False},
        {"size": {"height": 20, "width": 20}, "do_center_crop": True},
    ],
    ids=str,
)
def test_a_processor_that_does_not_fit_its_tower_is_refused(changes):
    with pytest.raises(SettingsError, match="does not make the 16 x 16 pixels that config"):
        preprocess.Processor.read({**CLIP, **changes}, 16)
