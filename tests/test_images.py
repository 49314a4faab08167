"""Image files as people have them: found, told apart, and read as a viewer shows them, or refused by name."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from defectlab.data.images import GROUND, MARKER, decode, find_files, find_images, letterbox, others, plain, read_header
from defectlab.files import DataError

UPRIGHT = np.zeros((24, 40, 3), np.uint8)
UPRIGHT[2:8, 3:12] = (250, 40, 40)
UPRIGHT[16:22, 30:36] = 200
# how a viewer turns the stored pixels, as in the Exif standard: 1 not at all, 6 by 90 degrees clockwise
TURN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
BACK = TURN | {6: TURN[8], 8: TURN[6]}  # from upright to stored
FILES = [("a.png", {}), ("a.jpg", {"quality": 98, "subsampling": 0}), ("a.webp", {"lossless": True})]
FILES += [("raw.tif", {}), ("packed.tif", {"compression": "tiff_lzw"})]


@pytest.mark.parametrize(("name", "options"), FILES)
def test_orientation_tags_count_in_every_format(tmp_path: Path, name: str, options: dict) -> None:
    for orientation, back in BACK.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(np.ascontiguousarray(back(UPRIGHT))).save(tmp_path / name, exif=exif, **options)
        read = np.asarray(decode(tmp_path / name)).astype(int)
        assert read.shape == UPRIGHT.shape and abs(read - UPRIGHT).mean() < (2 if name == "a.jpg" else 0.01)
        assert read_header(tmp_path / name, "") == (40, 24, orientation)


def png_16(path: Path, pixels: np.ndarray, colour_type: int) -> None:
    """A PNG of 16 bits a sample: colour type 2 is RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_more_than_8_bits_are_refused_in_every_mode(tmp_path: Path) -> None:
    twelve = np.random.default_rng(0).integers(0, 4096, (8, 8, 4)).astype(np.uint16)
    for colour_type, channels in ((2, 3), (4, 2), (6, 4)):
        png_16(tmp_path / f"png{channels}.png", twelve[..., :channels], colour_type)
    Image.fromarray(twelve[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(twelve[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(twelve[..., 0].astype(np.int32)).save(tmp_path / "grey.pgm")
    for name, options in (("rgb", {}), ("packed", {"compression": "zlib"}), ("planes", {"planarconfig": "separate"})):
        pixels = twelve[..., :3].transpose(2, 0, 1) if name == "planes" else twelve[..., :3]
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, photometric="rgb", **options)
    assert len(find_images(tmp_path)) == 9
    for path in find_images(tmp_path):
        with pytest.raises(DataError, match=rf"{path.name} has more than 8 bits a channel: save it with 8"):
            decode(path)


def test_a_ppm_is_scaled_by_the_maximum_that_it_states(tmp_path: Path) -> None:
    twelve = np.full((4, 4, 3), 2048, ">u2")
    (tmp_path / "a.ppm").write_bytes(b"P6 4 4 4095\n" + twelve.tobytes())
    assert np.asarray(decode(tmp_path / "a.ppm")).max() == 128


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_lies_under_transparent_pixels_does_not_count(tmp_path: Path, mode: str) -> None:
    for name, hidden in (("a", 0), ("b", 255)):
        pixels = np.full((6, 6, 4), 200, np.uint8)
        pixels[:3] = (hidden, hidden, hidden, 0)
        image = Image.fromarray(pixels)
        image = image.convert("P") if mode == "PA" else image.convert(mode)
        image.save(tmp_path / f"{name}.png")
    first, second = (np.asarray(decode(tmp_path / f"{name}.png").convert("L")) for name in "ab")
    assert (first == second).all() and (first[:3] == GROUND).all()


def test_opaque_grey_with_alpha_stays_grey(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    Image.merge("LA", (Image.fromarray(pixels), Image.new("L", (7, 9), 255))).save(tmp_path / "a.png")
    read = decode(tmp_path / "a.png")
    assert read.mode == "L" and (np.asarray(read) == pixels).all()


def test_several_pages_are_refused_but_for_a_telephones_two_images(tmp_path: Path) -> None:
    pages = [Image.new("L", (8, 8), value) for value in (10, 200)]
    for name in ("stack.tif", "film.gif", "phone.mpo"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    (tmp_path / "phone.mpo").rename(tmp_path / "phone.jpg")
    for name in ("stack.tif", "film.gif"):
        with pytest.raises(DataError, match=f"{name} holds 2 pages: save each as a file of its own"):
            decode(tmp_path / name)
    assert abs(int(np.asarray(decode(tmp_path / "phone.jpg")).mean()) - 10) <= 2


def test_a_file_that_is_too_large_or_broken_in_an_odd_way_is_named(tmp_path: Path, monkeypatch) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "large.png")
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    (tmp_path / "odd.png").write_bytes(file.getvalue().replace(b"IDAT", b"IDAX"))
    with pytest.raises(DataError, match=r"odd\.png cannot be decoded .*: replace or remove"):
        decode(tmp_path / "odd.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(DataError, match=r"large\.png is too large \(.*900 pixels.*\): cut it into parts"):
        decode(tmp_path / "large.png")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_an_image_whose_end_was_never_copied_is_refused(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{kind}"
    Image.fromarray(rng.integers(0, 255, (200, 200), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(0 if kind == "webp" else 64))  # zeros after the end harm nothing
    decode(path)
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    for read in (decode, lambda path: read_header(path, "")):
        with pytest.raises(DataError, match=rf"a\.{kind} ends in the middle, the rest is zeros"):
            read(path)


def test_search_follows_links_once_and_leaves_out_hidden_files_and_results(tmp_path: Path) -> None:
    real, folder = tmp_path / "elsewhere", tmp_path / "mine"
    for path in (real / "a.jpg", folder / "b.PNG", folder / ".c.png", folder / "._b.png", folder / ".git" / "d.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (folder / "out").mkdir()
    (folder / "out" / MARKER).write_text("")
    (folder / "out" / "map.png").write_text("x")
    (folder / "old.png").mkdir()
    (folder / "link").symlink_to(real)
    (folder / "loop").symlink_to(folder)
    found = [path.relative_to(folder).as_posix() for path in find_files(folder, {".png", ".jpg"})]
    assert found == ["b.PNG", "link/a.jpg"]
    with pytest.raises(DataError, match="holds results of this program: give the folder of your own images"):
        find_images(folder / "out")


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.webp", "c.heic", "d.heic", "e.npy", "notes"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.webp"]
    assert others(tmp_path) == "4 files of other kinds left out: .heic 2, .npy 1, no extension 1"
    (tmp_path / "images").mkdir()
    assert others(tmp_path / "images") == ""


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    assert plain(os.fsdecode("Prüfling".encode())) == "Prüfling"
    (Path(os.fsdecode(bytes(tmp_path) + b"/Pr\xfcfling.png"))).write_text("x")
    with pytest.raises(DataError, match=r"Pr.udcfcfling\.png' is not UTF-8: rename the file"):
        find_images(tmp_path)


@pytest.mark.parametrize(("width", "height"), [(3000, 7), (7, 3000), (900, 600), (601, 900), (40, 40)])
def test_letterbox_of_a_strip_is_that_of_the_whole_square(width: int, height: int) -> None:
    """The square is never made: 24,000 x 24,000 pixels would take gigabytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(width, height)
    square = Image.new("RGB", (side, side), (GROUND,) * 3)
    square.paste(Image.fromarray(pixels), ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square.resize((96, 96), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert (letterbox(Image.fromarray(pixels), 96)[0] == expected).all()
