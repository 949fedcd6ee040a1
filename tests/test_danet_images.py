"""Image files and what a data set makes of them: labels as they are, and a clear line for whatever is wrong."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from danet.data.images import read_image, read_labels, write_image
from danet.data.palette import distinct_palette, voc_palette
from danet.data.sample import IGNORE, Item, SegmentationDataset

LABELS = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)
COLOURS = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]


def photograph(height=2, width=3):
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def dataset(folder, mask, image=None, **options):
    """A set of one, with three classes; `mask`: an array, or a function that writes the file."""
    write_image(folder / "image.png", photograph() if image is None else image)
    if callable(mask):
        mask(folder / "mask.png")
    else:
        Image.fromarray(mask).save(folder / "mask.png")
    return SegmentationDataset([Item("x", folder / "image.png", folder / "mask.png")], "abc", COLOURS, **options)


def bomb(path, width=60000, height=60000):
    """The head of a PNG of that size, and a little of its data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize("read", [read_image, read_labels])
def test_a_bomb_is_refused_before_it_is_unpacked(read, tmp_path, monkeypatch):
    bomb(tmp_path / "bomb.png")
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"bomb.png is refused: 60000 x 60000 pixels are more than the 64,000,000"):
        read(tmp_path / "bomb.png")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_on_pixels(tmp_path):
    write_image(tmp_path / "image.png", photograph())
    assert read_image(tmp_path / "image.png", max_pixels=6).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="3 x 2 pixels are more than the 5"):
        read_image(tmp_path / "image.png", max_pixels=5)


def test_a_palette_image_is_read_as_its_indices(tmp_path):
    write_image(tmp_path / "mask.png", LABELS, COLOURS)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((1, 0)) == COLOURS[1]
    assert np.array_equal(read_labels(tmp_path / "mask.png"), LABELS)
    assert dataset(tmp_path, lambda path: write_image(path, LABELS, COLOURS))[0].mask.tolist() == LABELS.tolist()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_labels_of_16_bits_stay_whole(suffix, tmp_path):
    labels = np.array([[0, 2, 300, 65535]], np.uint16)
    Image.fromarray(labels).save(tmp_path / f"mask.{suffix}")
    got = read_labels(tmp_path / f"mask.{suffix}")
    assert got.dtype == np.uint16
    assert got.tolist() == labels.tolist()


def test_a_label_of_16_bits_is_not_cut_to_a_class(tmp_path):
    with pytest.raises(ValueError, match=r"mask.png: the value 258 at row 1, column 0 is no label"):
        dataset(tmp_path, np.array([[0, 1, 2], [258, 0, 0]], np.uint16))[0]
    good = dataset(tmp_path, LABELS.astype(np.uint16))[0].mask
    assert good.dtype == np.uint8
    assert good.tolist() == LABELS.tolist()


def test_a_label_out_of_range_is_named(tmp_path):
    wrong = LABELS.copy()
    wrong[1, 1] = 77
    with pytest.raises(ValueError, match=r"mask.png: the value 77 at row 1, column 1 .* expected 0 to 2, 255$"):
        dataset(tmp_path, wrong)[0]


@pytest.mark.parametrize("strange", [65539, -1])
def test_a_label_of_32_bits_is_not_cut_to_16(strange, tmp_path):
    Image.fromarray(np.array([[0, strange]], np.int32)).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match=rf"mask.tif holds numbers from .*{strange}.*; labels are 0 to 65535"):
        read_labels(tmp_path / "mask.tif")
    Image.fromarray(np.array([[0, 700]], np.int32)).save(tmp_path / "mask.tif")
    assert read_labels(tmp_path / "mask.tif").tolist() == [[0, 700]]


def test_a_photograph_of_16_bits_is_not_cut_to_8(tmp_path):
    Image.fromarray(np.array([[0, 40000]], np.uint16)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"image.png is no photograph of 8 bits a colour \(mode I;16\)"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("read", [read_image, read_labels])
def test_no_program_is_started_for_a_file(read, tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    Image.fromarray(photograph(8, 8)).save(tmp_path / "image.eps")
    (tmp_path / "image.eps").rename(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"image.png is no image, or none of a known format"):
        read(tmp_path / "image.png")


def test_the_table_of_labels_is_applied(tmp_path):
    made = dataset(tmp_path, LABELS, labels={0: IGNORE, 1: 0, 2: 1, 255: 2})
    assert made[0].mask.tolist() == [[255, 0, 1], [1, 0, 2]]
    with pytest.raises(ValueError, match=r"the value 255 .* expected 0 to 2$"):
        dataset(tmp_path, LABELS, labels={0: 0, 1: 0, 2: 0})[0]


def test_a_black_and_white_image_holds_0_and_1(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "mask.png")
    assert read_labels(tmp_path / "mask.png").tolist() == [[0, 1]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_no_labels(mode, tmp_path):
    made = dataset(tmp_path, lambda path: Image.fromarray(photograph()).convert(mode).save(path))
    with pytest.raises(ValueError, match=rf"mask.png is no label image: it holds colours \(mode {mode}\)"):
        made[0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_photographs_of_all_modes_become_rgb(mode, tmp_path):
    suffix = "tif" if mode == "CMYK" else "png"
    grey = Image.fromarray(np.full((2, 3), 102, np.uint8)).convert("RGB")
    grey.convert(mode).save(tmp_path / f"image.{suffix}")
    got = read_image(tmp_path / f"image.{suffix}")
    assert got.dtype == np.uint8
    assert got.tolist() == [[[102] * 3] * 3] * 2


def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, 16:] = 255  # the right half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    got = read_image(tmp_path / "turned.jpg")
    assert got.shape == (32, 16, 3)
    assert got[:14].max() < 20  # the left half is above now
    assert got[18:].min() > 235


@pytest.mark.parametrize("read", [read_image, read_labels])
def test_damaged_files_are_one_clear_line(read, tmp_path):
    write_image(tmp_path / "good.png", np.random.default_rng(0).integers(0, 3, (40, 40)).astype(np.uint8))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "turned.png").write_bytes(whole[:60] + bytes(b ^ 255 for b in whole[60:90]) + whole[90:])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in (("cut", "damaged"), ("turned", "damaged"), ("text", "no image"), ("empty", "no image")):
        with pytest.raises(ValueError, match=rf"{name}.png is {message}"):
            read(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing.png"):
        read(tmp_path / "missing.png")


def test_sizes_that_disagree_name_both_files(tmp_path):
    with pytest.raises(ValueError, match=r"mask.png has 3 x 2 pixels, its image .*image.png 3 x 4"):
        dataset(tmp_path, LABELS, photograph(4, 3))[0]


def test_a_mask_that_is_gone_is_named(tmp_path):
    made = dataset(tmp_path, LABELS)
    (tmp_path / "mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*mask.png"):
        made[0]


def test_a_set_needs_images_and_colours(tmp_path):
    with pytest.raises(ValueError, match="SegmentationDataset: there are no images"):
        SegmentationDataset([], "abc", COLOURS)
    with pytest.raises(ValueError, match="3 classes need as many colours, got 2"):
        SegmentationDataset([Item("x", tmp_path, None)], "abc", COLOURS[:2])
    with pytest.raises(ValueError, match="256 classes are more than the 255 that a mask can tell apart"):
        SegmentationDataset([Item("x", tmp_path, None)], ["a"] * 256, [COLOURS[0]] * 256)


def test_without_a_mask_there_is_none(tmp_path):
    write_image(tmp_path / "image.png", photograph())
    sample = SegmentationDataset([Item("x", tmp_path / "image.png", None)], "abc", COLOURS)[0]
    assert sample.mask is None
    assert sample.name == "x"
    assert np.array_equal(sample.image, photograph())


def test_an_image_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    write_image(tmp_path / "a" / "image.png", photograph())

    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        write_image(tmp_path / "a" / "image.png", photograph() + 1)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["image.png"]
    assert np.array_equal(read_image(tmp_path / "a" / "image.png"), photograph())


def test_the_palette_of_voc():
    palette = voc_palette(256)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    known |= {20: (0, 64, 128), 64: (32, 0, 0), 128: (0, 32, 0), 255: (224, 224, 192)}
    assert {number: palette[number] for number in known} == known
    assert len(set(palette)) == 256


def test_colours_of_classes_without_any_are_all_different():
    assert len(set(distinct_palette(255))) == 255
    assert distinct_palette(3) == distinct_palette(255)[:3]
