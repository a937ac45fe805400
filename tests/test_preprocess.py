"""Pictures become the numbers that the model's own framework would make of them, and the view shows the same."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from onnxcam.errors import UsageError
from onnxcam.preprocess import (
    KEY,
    PRESETS,
    InputSpec,
    Preprocess,
    choose,
    from_metadata,
    guess,
    open_image,
    preset,
    to_metadata,
)


def spec(shape=(1, 3, 224, 224), dtype=np.float32):
    return InputSpec.of("x", shape, dtype)


def picture(width, height, seed=0):
    """Smooth noise, so that resampling differences would show but not alias."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def flat(colour, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, colour)


# What an input wants


@pytest.mark.parametrize(
    ("shape", "layout", "channels", "height", "width"),
    [
        ((1, 3, 224, 200), "NCHW", 3, 224, 200),
        ((1, 224, 200, 3), "NHWC", 3, 224, 200),
        ((1, 1, 28, 28), "NCHW", 1, 28, 28),
        ((1, 28, 28, 1), "NHWC", 1, 28, 28),
        ((1, 3, 3, 3), "NCHW", 3, 3, 3),
        (("n", 3, "h", "w"), "NCHW", 3, None, None),
        (("n", "h", "w", 3), "NHWC", 3, None, None),
        (("n", "c", "h", "w"), "NCHW", None, None, None),
        ((None, None, 224, 224), "NCHW", None, 224, 224),
        ((1, 224, 224, "c"), "NHWC", None, 224, 224),
        ((0, 3, -1, -1), "NCHW", 3, None, None),
    ],
)
def test_layout_and_sizes_are_read_off_the_shape(shape, layout, channels, height, width):
    got = spec(shape)
    assert (got.layout, got.channels, got.height, got.width) == (layout, channels, height, width)
    assert got.shape == shape and got.why_no_image == ""


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 4, 64, 64), np.float32, "4 channels"),
        ((1, 128), np.float32, "2 dimensions"),
        ((), np.float32, "0 dimensions"),
        ((1, 3, 8, 224, 224), np.float32, "5 dimensions"),
        ((1, 3, 224, 224), np.bool_, "bool"),
        ((1, 3, 224, 224), object, "object"),
    ],
)
def test_an_input_that_holds_no_picture_says_why(shape, dtype, reason):
    got = InputSpec.of("tokens", shape, dtype)
    assert got.layout is None and "'tokens'" in got.why_no_image and reason in got.why_no_image
    with pytest.raises(UsageError, match="array"):
        PRESETS["raw"].apply(flat("red"), got)


def test_the_batch_is_known_only_where_the_file_fixes_it():
    assert spec((4, 3, 8, 8)).batch == 4 and spec(("n", 3, 8, 8)).batch is None


# Values


@pytest.mark.parametrize(
    ("name", "expected"),  # for one pixel with R, G, B = 10, 100, 250, in the model's channel order
    [
        ("imagenet", [(10 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (250 / 255 - 0.406) / 0.225]),
        ("tf", [10 / 127.5 - 1, 100 / 127.5 - 1, 250 / 127.5 - 1]),
        ("efficientnet-lite", [(10 - 127) / 128, (100 - 127) / 128, (250 - 127) / 128]),
        ("caffe", [250 - 103.939, 100 - 116.779, 10 - 123.68]),
        ("unit", [10 / 255, 100 / 255, 250 / 255]),
        (
            "clip",
            [
                (10 / 255 - 0.48145466) / 0.26862954,
                (100 / 255 - 0.4578275) / 0.26130258,
                (250 / 255 - 0.40821073) / 0.27577711,
            ],
        ),
        ("raw", [10, 100, 250]),
        ("none", [10, 100, 250]),
    ],
)
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 8, 8, 3)])
def test_each_preset_gives_the_values_of_its_formula(name, expected, shape):
    array = PRESETS[name].apply(flat((10, 100, 250)), spec(shape)).array
    assert array.shape == shape and array.dtype == np.float32
    pixel = array[0, :, 3, 4] if shape[1] == 3 else array[0, 3, 4]
    np.testing.assert_allclose(pixel, expected, rtol=1e-6, atol=1e-6)


def test_every_preset_of_the_table_is_tested_under_its_own_name():
    assert set(PRESETS) == {"imagenet", "tf", "efficientnet-lite", "caffe", "unit", "clip", "raw", "none"}
    assert all(name == p.name for name, p in PRESETS.items())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int32])
def test_the_array_has_the_type_of_the_input(dtype):
    array = PRESETS["raw"].apply(picture(40, 40), spec((1, 3, 20, 20), dtype)).array
    assert array.dtype == dtype and array.flags.c_contiguous


def test_a_uint8_input_gets_the_pixels_themselves():
    image = picture(20, 20)
    np.testing.assert_array_equal(
        PRESETS["raw"].apply(image, spec((1, 20, 20, 3), np.uint8)).array[0], np.asarray(image)
    )


def test_whole_numbers_are_rounded_not_cut():
    limited = Preprocess("video", scale=219 / 255, mean=-16)
    assert limited.apply(flat((100,) * 3), spec((1, 3, 8, 8), np.uint8)).array[0, 0, 0, 0] == round(
        100 * 219 / 255 + 16
    )


@pytest.mark.parametrize("name", ["imagenet", "unit", "tf", "caffe"])
def test_values_that_do_not_fit_an_integer_input_are_refused(name):
    with pytest.raises(UsageError, match=r"uint8.*--preprocess raw"):
        PRESETS[name].apply(flat("red"), spec((1, 3, 8, 8), np.uint8))


def test_a_bgr_model_gets_the_channels_reversed():
    swapped = PRESETS["raw"].override(channel_order="bgr")
    assert swapped.apply(flat((1, 2, 3)), spec((1, 3, 8, 8))).array[0, :, 0, 0].tolist() == [3, 2, 1]


def test_changing_the_channel_order_takes_mean_and_std_along():
    flipped = PRESETS["imagenet"].override(channel_order="bgr")
    assert flipped.mean == (0.406, 0.456, 0.485) and flipped.std == (0.225, 0.224, 0.229)
    assert PRESETS["imagenet"].override(channel_order="bgr", mean=(1, 2, 3)).mean == (1, 2, 3)
    assert PRESETS["caffe"].override(channel_order="rgb").mean == (123.68, 116.779, 103.939)


def test_a_model_of_one_channel_gets_luminance():
    array = PRESETS["raw"].apply(flat((10, 100, 250)), spec((1, 1, 8, 8))).array
    assert array.shape == (1, 1, 8, 8)
    assert abs(array[0, 0, 0, 0] - (0.299 * 10 + 0.587 * 100 + 0.114 * 250)) <= 0.5


def test_a_grey_picture_is_repeated_for_a_model_of_three_channels():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    array = PRESETS["raw"].apply(grey, spec((1, 3, 8, 8))).array[0]
    for channel in array:
        np.testing.assert_array_equal(channel, np.asarray(grey))


def test_order_gray_gives_every_channel_the_luminance():
    array = PRESETS["raw"].override(channel_order="gray").apply(flat((200, 0, 0)), spec((1, 3, 8, 8))).array
    assert np.unique(array).tolist() == [60]


def test_unknown_channels_are_three_or_one_for_grey():
    assert PRESETS["raw"].apply(flat("red"), spec((1, "c", 8, 8))).array.shape == (1, 3, 8, 8)
    assert PRESETS["raw"].override(channel_order="gray").apply(flat("red"), spec((1, "c", 8, 8))).array.shape[1] == 1


def test_three_means_do_not_fit_one_channel():
    with pytest.raises(UsageError, match=r"3 values of mean.*1 channel.*--mean"):
        PRESETS["imagenet"].apply(flat("red"), spec((1, 1, 8, 8)))


def test_bounds_are_the_values_of_black_and_white():
    low, high = PRESETS["imagenet"].bounds(spec())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert low.shape == high.shape == (1, 3, 1, 1) and low.dtype == np.float32
    np.testing.assert_allclose(low.ravel(), (0 - mean) / std, rtol=1e-6)
    np.testing.assert_allclose(high.ravel(), (1 - mean) / std, rtol=1e-6)


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 16, 16, 3)])
def test_no_pixel_lies_outside_the_bounds_and_both_are_reached(name, shape):
    low, high = PRESETS[name].bounds(spec(shape))
    black, white = (PRESETS[name].apply(flat(c, (16, 16)), spec(shape)).array for c in ("black", "white"))
    np.testing.assert_array_equal(np.broadcast_to(low, shape), black)
    np.testing.assert_array_equal(np.broadcast_to(high, shape), white)


def test_bounds_stay_in_order_for_an_inverted_scale():
    low, high = Preprocess("inverted", scale=-1 / 255, mean=-1).bounds(spec((1, 1, 8, 8)))
    assert low.item() == 0 and high.item() == 1


# Geometry


def torchvision_crop(image, size, resized, resample=Image.Resampling.BILINEAR):
    """Resize(resized), CenterCrop(size), from torchvision's documentation: the shorter side, int(), round half even."""
    w, h = image.size
    new = (resized, int(resized * h / w)) if w <= h else (int(resized * w / h), resized)
    image = image.resize(new, resample)
    left, top = int(round((new[0] - size) / 2.0)), int(round((new[1] - size) / 2.0))  # noqa: RUF046
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (100, 90), (1023, 257), (257, 1023), (33, 900)])
def test_crop_is_resize_and_centre_crop_as_in_torchvision(size):
    image = picture(*size)
    got = PRESETS["imagenet"].override(scale=1, mean=0, std=1).apply(image, spec()).array[0]
    want = np.asarray(torchvision_crop(image, 224, 256)).transpose(2, 0, 1)
    assert np.abs(got - want).max() <= 1


def test_warp_stretches_the_whole_picture():
    image = picture(90, 40)
    got = PRESETS["raw"].apply(image, spec((1, 3, 32, 24))).array[0]
    want = np.asarray(image.resize((24, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("size", "bars"), [((80, 40), "rows"), ((40, 80), "columns")])
def test_pad_centres_the_picture_between_bars(size, bars):
    letterbox = PRESETS["raw"].override(resize="pad", pad_colour=(1, 2, 3))
    array = letterbox.apply(flat((200, 201, 202), size), spec((1, 3, 32, 32))).array[0]
    array = array if bars == "rows" else array.transpose(0, 2, 1)
    for channel, (bar, inside) in enumerate(zip((1, 2, 3), (200, 201, 202), strict=True)):
        assert (array[channel, :8] == bar).all() and (array[channel, 24:] == bar).all()
        assert (array[channel, 8:24] == inside).all()


def test_the_crop_window_is_the_region_that_reaches_the_model():
    # 320x240 -> shorter side 16 / 0.5 = 32 -> 42x32; the middle 16x16 starts at (13, 8).
    prepared = PRESETS["raw"].override(resize="crop", crop_fraction=0.5).apply(picture(320, 240), spec((1, 3, 16, 16)))
    sx, sy = 320 / 42, 240 / 32
    np.testing.assert_allclose(prepared.window, (13 * sx, 8 * sy, 29 * sx, 24 * sy))
    assert prepared.view.size == (round(16 * sx), round(16 * sy))


def test_the_view_shows_the_window_at_the_resolution_of_the_picture():
    image = picture(448, 320)  # shorter side to 32, times 10: the window falls on whole pixels
    prepared = PRESETS["raw"].override(resize="crop", crop_fraction=0.5).apply(image, spec((1, 3, 16, 16)))
    left, top, right, bottom = prepared.window
    assert (top, bottom) == (80, 240) and right - left == pytest.approx(448 / 44 * 16)
    square = picture(320, 320)
    view = PRESETS["raw"].override(resize="crop", crop_fraction=0.5).apply(square, spec((1, 3, 16, 16))).view
    np.testing.assert_array_equal(np.asarray(view), np.asarray(square.crop((80, 80, 240, 240))))


@pytest.mark.parametrize("resize", ["warp", "crop", "pad"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (17, 230)])
def test_the_view_scaled_to_the_input_is_the_input(resize, size):
    prepared = PRESETS["raw"].override(resize=resize).apply(picture(*size), spec((1, 32, 32, 3)))
    small = np.asarray(prepared.view.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(small - prepared.array[0])[2:-2, 2:-2].mean() < 6


def test_the_view_of_a_warped_picture_is_the_picture():
    image = picture(90, 40)
    prepared = PRESETS["raw"].apply(image, spec((1, 3, 32, 32)))
    assert prepared.window == (0, 0, 90, 40)
    np.testing.assert_array_equal(np.asarray(prepared.view), np.asarray(image))


def test_the_view_of_a_padded_picture_has_the_bars():
    prepared = PRESETS["raw"].override(resize="pad", pad_colour=9).apply(flat("white", (80, 40)), spec((1, 3, 32, 32)))
    assert prepared.view.size == (80, 80) and prepared.window == (0, -20, 80, 60)
    view = np.asarray(prepared.view)
    assert (view[:20] == 9).all() and (view[20:60] == 255).all() and (view[60:] == 9).all()


def test_the_view_is_at_most_1024_pixels_long():
    assert PRESETS["raw"].apply(flat("red", (3000, 1500)), spec()).view.size == (1024, 512)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (1, 20000), (20000, 1)])
@pytest.mark.parametrize("resize", ["warp", "crop", "pad"])
def test_pictures_one_pixel_thin_are_taken(size, resize):
    prepared = PRESETS["raw"].override(resize=resize, pad_colour=40).apply(flat((40, 40, 40), size), spec())
    assert prepared.array.shape == (1, 3, 224, 224) and (prepared.array == 40).all()
    assert min(prepared.view.size) >= 1 and max(prepared.view.size) <= 1024


def test_none_takes_the_picture_as_it_is_or_not_at_all():
    image = picture(20, 10)
    np.testing.assert_array_equal(PRESETS["none"].apply(image, spec((1, 10, 20, 3))).array[0], np.asarray(image))
    assert PRESETS["none"].apply(image, spec((1, 3, "h", "w"))).array.shape == (1, 3, 10, 20)
    with pytest.raises(UsageError, match=r"20 x 10.*224 x 224"):
        PRESETS["none"].apply(image, spec())


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 3, 64, 48), None, (64, 48)),
        ((1, 3, "h", "w"), None, (224, 224)),
        ((1, 3, "h", "w"), 96, (96, 96)),
        ((1, 3, "h", "w"), (96, 64), (96, 64)),
        ((1, 3, 64, "w"), None, (64, 64)),
        ((1, 3, 64, "w"), (64, 32), (64, 32)),
        ((1, 3, 64, 48), (64, 48), (64, 48)),
    ],
)
def test_the_size_is_the_files_else_what_was_asked_else_224(shape, size, expected):
    array = PRESETS["imagenet"].override(size=size).apply(picture(80, 60), spec(shape)).array
    assert array.shape[2:] == expected


def test_a_size_that_contradicts_the_file_is_an_error():
    with pytest.raises(UsageError, match=r"size 300x300.*fixed to 224x224"):
        PRESETS["imagenet"].override(size=300).apply(picture(80, 60), spec())


# Pictures of all kinds


def test_the_exif_orientation_is_honoured_once(tmp_path):
    image = Image.new("RGB", (20, 10), "blue")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red comes to the top
    image.save(tmp_path / "turned.png", exif=exif)
    for opened in (Image.open(tmp_path / "turned.png"), open_image(tmp_path / "turned.png")):
        prepared = PRESETS["none"].apply(opened, spec((1, 20, 10, 3)))
        assert prepared.array[0, 0, 0].tolist() == [255, 0, 0] and prepared.array[0, -1, 0].tolist() == [0, 0, 255]
        assert prepared.view.size == (10, 20)


def pixel(image):
    return PRESETS["raw"].apply(image, spec((1, 3, 8, 8))).array[0, :, 4, 4].tolist()


def test_a_palette_is_resolved():
    assert pixel(flat((0, 128, 255)).convert("P", palette=Image.Palette.ADAPTIVE)) == [0, 128, 255]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("RGBA", (0, 0, 0, 128), [127, 127, 127]),
        ("LA", (0, 0), [255, 255, 255]),
        ("LA", (50, 255), [50, 50, 50]),
        ("CMYK", (0, 0, 0, 0), [255, 255, 255]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 257 * 12, [12, 12, 12]),
        ("I", 40000, [156, 156, 156]),
        ("I", 200, [200, 200, 200]),
        ("F", 0.5, [128, 128, 128]),
        ("F", 200.4, [200, 200, 200]),
    ],
)
def test_any_mode_becomes_rgb(mode, colour, expected):
    assert pixel(flat(colour, mode=mode)) == expected


def test_a_transparent_palette_colour_is_laid_on_white():
    image = flat(0, mode="P")
    image.putpalette([10, 20, 30])
    image.info["transparency"] = 0
    assert pixel(image) == [255, 255, 255]


def test_a_16_bit_png_is_scaled_to_8(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "deep.png")
    assert pixel(open_image(tmp_path / "deep.png")) == [round(30000 / 257)] * 3


@pytest.mark.parametrize("value", [-1.0, 1e6, float("nan"), float("inf")])
def test_pictures_with_strange_values_are_refused(value):
    with pytest.raises(UsageError, match=r"0\.\.255"):
        pixel(flat(value, mode="F"))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(UsageError, match="no pixels"):
        pixel(Image.new("RGB", (0, 5)))


def test_the_picture_passed_in_is_left_alone():
    image = flat((1, 2, 3, 128), mode="RGBA")
    before = (image.mode, image.size, image.tobytes())
    PRESETS["imagenet"].apply(image, spec())
    assert (image.mode, image.size, image.tobytes()) == before


def test_a_missing_picture_a_directory_an_empty_file_and_text_are_told_apart(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name, message in [
        ("gone.png", "no such picture"),
        (".", "is a directory"),
        ("empty.png", "is empty"),
        ("text.png", "not a picture"),
    ]:
        with pytest.raises(UsageError, match=message) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_a_truncated_picture_is_an_error_of_one_line(tmp_path, kind):
    data = io.BytesIO()
    picture(200, 200).save(data, kind)
    (tmp_path / "cut").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    with pytest.raises(UsageError, match=r"damaged|not a picture") as error:
        open_image(tmp_path / "cut")
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused_and_a_merely_large_picture_is_not(tmp_path, monkeypatch, recwarn):
    flat("red", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    assert open_image(tmp_path / "large.png").size == (100, 100) and not recwarn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UsageError, match="too many pixels"):
        open_image(tmp_path / "large.png")


# Where a preprocessing comes from


def test_an_unknown_preset_names_the_nearest_first():
    with pytest.raises(UsageError, match=r"no preprocessing 'imagnet'; there is imagenet, .*none"):
        preset("imagnet")


@pytest.mark.parametrize(
    "bad",
    [
        {"resize": "squash"},
        {"interpolation": "cubic"},
        {"channel_order": "rbg"},
        {"mean": (1, 2)},
        {"mean": "red"},
        {"std": 0},
        {"std": (1, 0, 1)},
        {"std": float("nan")},
        {"scale": 0},
        {"crop_fraction": 0},
        {"crop_fraction": 1.5},
        {"size": 0},
        {"size": (1, 2, 3)},
        {"size": 2.5},
        {"pad_colour": 300},
    ],
)
def test_values_that_make_no_sense_are_refused(bad):
    with pytest.raises(UsageError):
        PRESETS["imagenet"].override(**bad)


def test_an_override_keeps_the_rest_and_says_in_its_name_what_changed():
    changed = PRESETS["imagenet"].override(mean=0.5, size=None, resize="crop")
    assert changed.mean == (0.5,) and changed.std == PRESETS["imagenet"].std and changed.name == "imagenet+mean"
    assert PRESETS["imagenet"].override(mean=None) is PRESETS["imagenet"]


def test_a_flag_wins_over_metadata_and_metadata_over_a_guess():
    metadata = {KEY: '"tf"'}
    assert choose("caffe", metadata, spec()) == (PRESETS["caffe"], "asked for")
    assert choose(PRESETS["unit"], metadata, spec()) == (PRESETS["unit"], "asked for")
    assert choose(None, metadata, spec()) == (PRESETS["tf"], f"metadata {KEY}")
    found, source = choose(None, {}, spec())
    assert found.name == "imagenet" and source.startswith("guessed imagenet") and "--preprocess" in source


@pytest.mark.parametrize(
    ("shape", "dtype", "name"),
    [
        ((1, 3, 224, 224), np.float32, "imagenet"),
        ((1, 3, 224, 224), np.float16, "imagenet"),
        ((1, 224, 224, 3), np.float32, "tf"),
        ((1, 224, 224, 3), np.uint8, "raw"),
        ((1, 224, 224, 3), np.int8, "raw+mean"),
        ((1, 1, 28, 28), np.float32, "unit"),
        ((1, 3, 32, 32), np.float32, "imagenet+crop_fraction"),
        ((1, 77), np.int64, "none"),
    ],
)
def test_the_guess_follows_type_layout_and_channels_and_can_be_applied(shape, dtype, name):
    found, sentence = guess(spec(shape, dtype))
    assert found.name == name and sentence.startswith("guessed")
    if len(shape) == 4:
        assert found.apply(picture(50, 40), spec(shape, dtype)).array.shape == shape


@pytest.mark.parametrize("how", [*PRESETS.values(), PRESETS["clip"].override(size=(96, 64), pad_colour=(1, 2, 3))])
def test_what_is_written_into_metadata_is_read_back(how):
    assert from_metadata(to_metadata(how)) == how


def test_metadata_may_name_a_preset_bare_or_change_some_of_its_fields():
    assert from_metadata({KEY: "imagenet"}) == PRESETS["imagenet"]
    changed = from_metadata({KEY: json.dumps({"name": "imagenet", "size": 299})})
    assert changed is not None and changed.size == (299, 299) and changed.mean == PRESETS["imagenet"].mean


@pytest.mark.parametrize(
    "text", ["", "{", '"imagnet"', "7", '{"mean": "red"}', '{"means": 1}', '{"size": {}}', '{"resize": 3}', "[1]"]
)
def test_malformed_metadata_of_ours_names_the_key(text):
    with pytest.raises(UsageError, match=r"metadata 'onnxcam\.preprocess'"):
        from_metadata({KEY: text})


@pytest.mark.parametrize(
    ("pixel_format", "pixel_range", "values"),  # of a pixel with R, G, B = 0, 51, 255
    [
        ("Rgb8", "NominalRange_0_255", [0, 51, 255]),
        ("Bgr8", "NominalRange_0_255", [255, 51, 0]),
        ("Rgb8", "Normalized_0_1", [0, 0.2, 1]),
        ("rgb8", "normalized_1_1", [-1, -0.6, 1]),
        ("Rgb8", "NominalRange_16_235", [16, 59.8, 235]),
    ],
)
def test_the_image_keys_of_the_onnx_proposal_are_understood(pixel_format, pixel_range, values):
    metadata = {
        "Image.BitmapPixelFormat": pixel_format,
        "Image.NominalPixelRange": pixel_range,
        "Image.ColorSpaceGamma": "SRGB",
    }
    found, source = choose(None, metadata, spec((1, 3, 8, 8)))
    np.testing.assert_allclose(found.apply(flat((0, 51, 255)), spec((1, 3, 8, 8))).array[0, :, 0, 0], values, atol=1e-5)
    assert source == "metadata Image.NominalPixelRange"


def test_grey_images_of_windows_ml_get_raw_luminance():
    metadata = {"Image.BitmapPixelFormat": "Gray8", "Image.NominalPixelRange": "NominalRange_0_255"}
    found = from_metadata(metadata)
    assert found is not None and found.apply(flat("white"), spec((1, 1, 8, 8))).array.max() == 255


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"Image.BitmapPixelFormat": "Rgb8"},
        {"Image.BitmapPixelFormat": "Rgba8", "Image.NominalPixelRange": "NominalRange_0_255"},
        {"Image.BitmapPixelFormat": "Rgb8", "Image.NominalPixelRange": "?"},
        {
            "Image.BitmapPixelFormat": "Rgb8",
            "Image.NominalPixelRange": "NominalRange_0_255",
            "Image.ColorSpaceGamma": "Linear",
        },
        {"author": "somebody"},
        {"author": "Ultralytics", "task": "classify", "version": "8.0.3"},
        {"author": "Ultralytics", "task": "classify"},
    ],
)
def test_metadata_that_says_too_little_says_nothing(metadata):
    assert from_metadata(metadata) is None


def test_ultralytics_exports_are_letterboxed_or_cropped():
    detector = from_metadata({"author": "Ultralytics", "task": "detect", "version": "8.3.1"})
    classifier = from_metadata({"author": "Ultralytics", "task": "classify", "version": "8.3.1"})
    assert detector is not None and (detector.resize, detector.pad_colour, detector.scale) == (
        "pad",
        (114,) * 3,
        1 / 255,
    )
    assert classifier is not None and (classifier.resize, classifier.crop_fraction) == ("crop", 1.0)
