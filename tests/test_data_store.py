"""Fetching, unpacking and verifying: what is refused, what the message says, and that nothing is left behind."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from defectlab import files
from defectlab.data import fetch as store
from defectlab.data.fetch import DataSet, Source
from defectlab.files import DataError, data_dir, weights_dir

FILES = {"a/1.txt": b"one", "a/2.txt": b"two", "b/3.txt": b"three" * 100}
DATASET = DataSet(
    name="toy set",
    folder="group/toy",
    command="python data_scripts/toy.py",
    members=r"(?:.*/)?(?P<path>[ab]/[^/]+\.txt)",
    sources=(),
    page="https://example.org/toy",
    licence="free",
    citation="nobody",
    check=lambda folder: "",
)


def make_zip(path: Path, files: dict[str, bytes], top: str = "top/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def make_tar(path: Path, members: list[tarfile.TarInfo], contents: list[bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as archive:
        for member, content in zip(members, contents, strict=True):
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def nothing_left(root: Path) -> bool:
    """Only lock files and empty folders remain."""
    return not [
        path for path in root.rglob("*") if path.suffix != ".lock" and (path.is_file() or path.suffix == ".part")
    ]


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    return tmp_path / "data" / "group" / "toy"


# ----------------------------------------------------------------------------------------------------- what works


def test_fetch_writes_files_and_manifest(fetched: Path) -> None:
    manifest = json.loads((fetched / "manifest.json").read_text())
    expected = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in FILES.items()}
    assert manifest["files"] == expected
    lines = "".join(f"{name} {expected[name][1]}\n" for name in sorted(expected))
    assert manifest["fingerprint"] == hashlib.sha256(lines.encode()).hexdigest()
    assert manifest["name"] == "toy set" and manifest["source"] == "toy.zip" and manifest["note"] == ""
    assert all((fetched / name).read_bytes() == content for name, content in FILES.items())
    assert store.verify(fetched, "x") == store.quick_check(fetched, "x")
    assert not list(fetched.parent.glob("*.part")) and not list(fetched.parent.glob(".*.part"))


def test_other_archive_same_fingerprint(tmp_path: Path) -> None:
    """Another top-level folder, extra files and another format do not change the content."""
    first = store.fetch(DATASET, tmp_path / "1", make_zip(tmp_path / "1.zip", FILES))
    extra = {**FILES, "README.md": b"hello", "__MACOSX/x.txt": b"junk"}
    second = store.fetch(DATASET, tmp_path / "2", make_zip(tmp_path / "2.zip", extra, top="repository.-cc4eb530/"))
    names = [tarfile.TarInfo(f"./deep/er/{name}") for name in FILES]
    third = store.fetch(DATASET, tmp_path / "3", make_tar(tmp_path / "3.tar.xz", names, list(FILES.values())))
    windows = {name.replace("/", "\\"): content for name, content in FILES.items()}  # as old packers write it
    fourth = store.fetch(DATASET, tmp_path / "4", make_zip(tmp_path / "4.zip", windows, top="东北\\deep\\"))
    assert first.files == second.files == third.files == fourth.files
    assert first.fingerprint == second.fingerprint == third.fingerprint == fourth.fingerprint
    changed = store.fetch(DATASET, tmp_path / "5", make_zip(tmp_path / "5.zip", {**FILES, "a/1.txt": b"eno"}))
    assert changed.fingerprint != first.fingerprint


LAYOUTS = [  # script, member as copies of the set have it, the path in the set; None: left out
    ("neu_det", "NEU-DET/IMAGES/crazing_1.jpg", "IMAGES/crazing_1.jpg"),
    ("neu_det", "NEU-DET/train/images/rolled-in_scale/rolled-in_scale_1.jpg", "IMAGES/rolled-in_scale_1.jpg"),
    ("neu_det", "NEU-DET/validation/annotations/crazing_240.xml", "ANNOTATIONS/crazing_240.xml"),
    ("neu_det", "IMAGES/patches/patches_1.jpg", "IMAGES/patches_1.jpg"),
    ("neu_det", "NEU-DET/annotations/test/patches_1.xml", "ANNOTATIONS/patches_1.xml"),
    ("neu_det", "NEU-DET/JPEGImages/crazing_1.jpg", "IMAGES/crazing_1.jpg"),
    ("neu_det", "NEU-DET\\Annotations\\crazing_1.xml", "ANNOTATIONS/crazing_1.xml"),
    ("neu_det", "__MACOSX/NEU-DET/IMAGES/._crazing_1.jpg", None),
    ("neu_seg", "NEU_Seg-main/NEU_Seg-main/images/test/000001.jpg", "images/test/000001.jpg"),
    ("neu_seg", "__MACOSX/NEU-Seg/images/test/._000001.jpg", None),
    (
        "deep_pcb",
        "DeepPCB-master/PCBData/group00041/00041_not/00041000.txt",
        "PCBData/group00041/00041_not/00041000.txt",
    ),
    ("deep_pcb", "PCBData/PCBData/test.txt", "PCBData/test.txt"),
    ("deep_pcb", "__MACOSX/PCBData/._test.txt", None),
    ("magnetic_tile", "Magnetic-Tile-Defect/MT_Fray/Imgs/exp1.png", "MT_Fray/Imgs/exp1.png"),
    ("magnetic_tile", "__MACOSX/MT_Fray/Imgs/._exp1.png", None),
    ("mvtec_ad", "metal_nut/train/good/000.png", "train/good/000.png"),
    ("mvtec_ad", "mvtec_anomaly_detection/metal_nut/license.txt", "license.txt"),
    ("mvtec_ad", "__MACOSX/metal_nut/train/good/._000.png", None),
    ("mvtec_ad", "screw/train/good/000.png", None),
]


@pytest.mark.parametrize("name", sorted({name for name, *_ in LAYOUTS}))
def test_layouts_that_circulate(tmp_path: Path, script, name: str) -> None:
    module = script(name)
    dataset = module.DATASET if hasattr(module, "DATASET") else module.dataset("metal_nut")
    for number, (member, path) in enumerate(layout[1:] for layout in LAYOUTS if layout[0] == name):
        archive, folder = make_zip(tmp_path / f"{number}.zip", {member: b"x"}, top=""), tmp_path / str(number)
        if path:
            store.unpack(archive, folder, dataset.members)
            assert [found for found in folder.rglob("*") if found.is_file()] == [folder / path]
        else:
            with pytest.raises(DataError, match="holds no file of this data set"):
                store.unpack(archive, folder, dataset.members)


def test_present_set_is_kept_and_archive_replaces_it(tmp_path: Path, fetched: Path) -> None:
    root = tmp_path / "data"
    assert store.fetch(DATASET, root).files.keys() == FILES.keys()  # no address: it would fail to download
    store.fetch(DATASET, root, make_zip(tmp_path / "new.zip", {"a/9.txt": b"nine"}))
    assert [path.name for path in fetched.rglob("*.txt")] == ["9.txt"]


def test_note_of_the_check_is_in_the_manifest(tmp_path: Path) -> None:
    dataset = replace(DATASET, check=lambda folder: "reduced" if (folder / "a/1.txt").stat().st_size == 3 else "")
    assert store.fetch(dataset, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES)).note == "reduced"


def test_several_processes_take_turns(tmp_path: Path) -> None:
    calls = []

    def fill(folder: Path) -> store.Manifest:
        calls.append(folder)
        folder.mkdir()
        (folder / "x.txt").write_text("x")
        return store.write_manifest(folder, "toy", "synthetic")

    def existing() -> store.Manifest | None:
        target = tmp_path / "toy"
        return store.quick_check(target, "draw") if target.exists() else None

    with ThreadPoolExecutor(4) as pool:
        manifests = list(pool.map(lambda _: store.create_folder(tmp_path / "toy", fill, existing), range(8)))
    assert len(calls) == 1 and len({manifest.fingerprint for manifest in manifests}) == 1


def test_download_tries_mirrors_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "toy.zip", FILES)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    asked = []

    def retrieve(url, known_hash, fname, path, downloader):
        asked.append(url)
        if "down" in url:
            raise ConnectionError("no route")
        target = Path(path) / fname
        pages = {"https://wrong.org": b"an error page", "https://login.org": b"<html>please log in</html>"}
        target.write_bytes(pages.get(url) or archive.read_bytes())
        return str(target)

    monkeypatch.setattr(store.pooch, "retrieve", retrieve)
    urls = ["https://down.org", "https://wrong.org", "https://login.org", "https://good.org"]
    dataset = replace(DATASET, sources=tuple(Source(url, None if "login" in url else sha256) for url in urls))
    manifest = store.fetch(dataset, tmp_path / "data")
    assert asked == urls and manifest.source == urls[3] and manifest.archive_sha256 == sha256
    assert not list((tmp_path / "data").rglob("archive"))  # the download is not kept

    with pytest.raises(DataError) as error:
        store.fetch(replace(dataset, sources=dataset.sources[:3]), tmp_path / "other")
    wrong = hashlib.sha256(b"an error page").hexdigest()
    for part in ("down.org: ConnectionError", "wrong.org", wrong, sha256, "is a web page", "toy.py --archive FILE"):
        assert part in str(error.value)
    assert nothing_left(tmp_path / "other")


def test_where_data_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a notebook runs in another folder than the scripts
    monkeypatch.delenv("DEFECTLAB_DATA", raising=False)
    monkeypatch.delenv("DEFECTLAB_WEIGHTS", raising=False)
    assert data_dir() == Path(files.__file__).parents[1] / "data" and weights_dir() is None
    monkeypatch.setattr(files, "__file__", "/usr/lib/python3/site-packages/defectlab/files.py")
    assert data_dir() == tmp_path / "data"
    monkeypatch.setenv("DEFECTLAB_DATA", "/elsewhere")
    monkeypatch.setenv("DEFECTLAB_WEIGHTS", "/weights")
    assert data_dir() == Path("/elsewhere") and weights_dir() == Path("/weights")


# ------------------------------------------------------------------------------------------------ what is refused


def special(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("top/a/1.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def zip_of(folder: Path, name: str, content: bytes = b"x", attributes: int = 0, size: int | None = None) -> Path:
    """A zip of one member; `size`: what its directory says of it, true or not."""
    info, path = zipfile.ZipInfo(name), folder / "bad.zip"
    info.external_attr = attributes << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, content)
    if size is not None:
        whole = path.read_bytes()
        start = whole.rindex(b"PK\x01\x02") + 20  # compressed and uncompressed size in the directory
        path.write_bytes(whole[:start] + struct.pack("<II", size, size) + whole[start + 8 :])
    return path


def cut(path: Path, keep: float, flip: int | None = None) -> Path:
    content = bytearray(path.read_bytes())
    if flip is not None:
        content[flip] ^= 0xFF
    path.write_bytes(content[: int(keep * len(content))])
    return path


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def not_utf8(path: Path) -> Path:
    return raw(path, path.read_bytes().replace("\u00e9".encode(), b"\xb6\xab"))


OUTSIDE = ["/etc/a/1.txt", "../a/1.txt", "top/../../a/1.txt", "..\\a\\1.txt", "C:\\a\\1.txt"]
NOISE, BIG = bytes(range(256)) * 40, b"0" * 100_000  # the latter compresses to almost nothing
TWO = [tarfile.TarInfo("a/1.txt"), tarfile.TarInfo("a/2.txt")]
REFUSED = [
    *((lambda f, n=n: zip_of(f, n), rf"bad\.zip holds {re.escape(repr(n))}, which lies outside") for n in OUTSIDE),
    *(
        (lambda f, n=n: make_tar(f / "bad.tar", [tarfile.TarInfo(n)], [b"x"], "w"), "which lies outside its folder")
        for n in OUTSIDE
    ),
    *(
        (lambda f, k=k: make_tar(f / "bad.tar", [special(k)], [b""], "w"), r"bad\.tar holds 'top/a/1.txt', a link or a")
        for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    ),
    (lambda f: zip_of(f, "top/a/1.txt", b"/etc/passwd", stat.S_IFLNK | 0o777), "a link or a device"),
    (lambda f: make_zip(f / "big.zip", {"a/1.txt": BIG, "a/2.txt": BIG}), "unpacks to more than 150000 bytes"),
    (lambda f: make_tar(f / "big.tar.xz", TWO, [BIG, BIG]), "unpacks to more than 150000 bytes"),
    (lambda f: zip_of(f, "a/1.txt", b"12345", size=3), r"bad\.zip is damaged.*fetch it again"),
    (lambda f: zip_of(f, "a/1.txt", b"12345", size=7), r"bad\.zip is damaged.*fetch it again"),
    (lambda f: cut(make_zip(f / "x", {"a/1.txt": NOISE}), 0.5), r"x is damaged.*fetch it again"),
    (lambda f: cut(make_zip(f / "x", {"a/1.txt": NOISE}), 1, flip=60), r"x is damaged.*fetch it again"),
    (lambda f: cut(make_tar(f / "x", TWO[:1], [NOISE]), 0.5), r"x is damaged.*fetch it again"),
    (lambda f: raw(f / "x", zip_of(f, "a/1.txt").read_bytes()[10:]), r"x is damaged.*fetch it again"),
    (lambda f: raw(f / "x", b"no archive"), r"x is damaged, or neither .*fetch it again, or unpack it and pack"),
    *(
        (lambda f, s=s: raw(f / "x.zip", s + bytes(80)), rf"x\.zip is {message}")
        for s, message in (
            (b"Rar!\x1a\x07\x01\x00", "a rar archive: unpack it and pack the folder as zip"),
            (b"Rar!\x1a\x07\x00", "a rar archive: unpack"),
            (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it and pack the folder as zip"),
            (b"PK\x07\x08PK\x03\x04", "a part of a split zip: with all parts, unpack"),
            (b"\xef\xbb\xbf\r\n<!DOCTYPE html>", "a web page: fetch the archive in a browser.*login"),
        )
    ),
    (lambda f: cut(zip_of(f, "a/1.txt"), 1, flip=-18), r"bad\.zip is a part of a split zip"),  # its last part
    (lambda f: cut(zip_of(f, "a/1.txt"), 1, flip=-67), r"bad\.zip asks for a password: unpack it and pack"),
    (lambda f: cut(zip_of(f, "a/1.txt"), 1, flip=-65), r"bad\.zip .*method is not supported.*or unpack it"),
    (lambda f: raw(f / "x.zip", b""), r"x\.zip is empty: fetch it again"),
    (lambda f: make_zip(f / "x.zip", {}), r"x\.zip holds no file of this data set: check"),
    (lambda f: make_tar(f / "x.tar", [], []), r"x\.tar holds no file of this data set: check"),
    (lambda f: make_zip(f / "x.zip", {"toy.tar.xz": b""}), r"x\.zip holds no file .*: unpack 'top/toy\.tar\.xz' in it"),
    (lambda f: f, "is a folder: pack it as zip, and give the path"),
    (lambda f: make_zip(f / "x.zip", {"x/a/1.txt": b"1", "y/a/1.txt": b"2"}), r"x\.zip holds two files for a/1\.txt"),
    (lambda f: make_zip(f / "x.zip", {"a/x.txt": b"1", "a\\X.txt": b"2"}), r"x\.zip holds two files for a/X\.txt"),
    *(
        (
            lambda f, n=n: make_tar(f / "x.tar", [tarfile.TarInfo(n)], [b"x"]),
            r"x\.tar holds the name 'a/.* too long or not A",
        )
        for n in (f"a/{'x' * 300}.txt", "a/\udcb6\udcab.txt", "a/\u00e9.txt", "a/e\u0301.txt")  # gb2312, NFC, NFD
    ),
    (lambda f: zip_of(f, "a/\u00e9.txt"), r"bad\.zip holds the name 'a/.* too long or not ASCII"),
    (lambda f: not_utf8(zip_of(f, "a/\u00e9.txt")), r"bad\.zip is damaged, or .*'utf-8' codec.*or unpack it"),
    (lambda f: make_zip(f / "other.zip", {"c/1.txt": b"1"}), "holds no file of this data set"),
    (lambda f: f / "none.zip", r"none\.zip is not a file"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_archives_that_are_refused(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        store.fetch(replace(DATASET, unpacked_limit=150_000), tmp_path / "data", make(tmp_path))
    assert nothing_left(tmp_path / "data")


def test_wrong_hash_and_wrong_fingerprint(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "toy.zip", FILES)
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    by_hash = replace(DATASET, check=None, archive_sha256=("0" * 64,))
    with pytest.raises(DataError) as error:
        store.fetch(by_hash, tmp_path / "data", archive)
    for part in ("toy.zip", got, "0" * 64, "https://example.org/toy"):
        assert part in str(error.value)
    assert store.fetch(replace(by_hash, archive_sha256=(got,)), tmp_path / "data", archive).archive_sha256 == got

    with pytest.raises(DataError, match=f"toy.zip does not hold toy set as published.*expected {'1' * 64}"):
        store.fetch(replace(DATASET, fingerprint="1" * 64), tmp_path / "new", archive)
    assert nothing_left(tmp_path / "new")


def test_folder_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "data" / "group" / "toy" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(DataError, match=r"has no manifest\.json: move it away first"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    assert own.read_text() == "mine" and [path.name for path in own.parent.iterdir()] == ["mine.txt"]


def test_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 100))
    members = [tarfile.TarInfo(name) for name in FILES]
    for archive in (
        make_zip(tmp_path / "toy.zip", FILES),
        make_tar(tmp_path / "toy.tar.xz", members, list(FILES.values())),
    ):
        with pytest.raises(DataError, match=r"0 MiB free.*DEFECTLAB_DATA"):
            store.fetch(DATASET, tmp_path / "data", archive)
        assert nothing_left(tmp_path / "data")


def test_disk_fills_up_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(source, sink, *_) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(sink.write(source.read()))

    monkeypatch.setattr(shutil, "copyfileobj", full)  # what zipfile copies with
    with pytest.raises(DataError, match=r"the disk of .* is full; nothing was kept: free some space"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    assert written and nothing_left(tmp_path / "data")


@pytest.mark.parametrize(
    ("place", "name", "code", "message"),
    [
        (store.tempfile, "mkdtemp", errno.EROFS, "could not be filled .*Read-only.*: check that it is writable"),
        (store, "FileLock", errno.EACCES, "could not be filled .*Permission denied.*: check that it is writable"),
        (Path, "write_text", errno.ENOSPC, "the disk of .* is full; nothing was kept: free some space"),
    ],
)
def test_folder_that_takes_nothing(tmp_path: Path, monkeypatch, place, name: str, code: int, message: str) -> None:
    def refuse(*_, **__) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(place, name, refuse)
    with pytest.raises(DataError, match=rf"^.*{message}, or choose another folder with --data-dir"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    assert nothing_left(tmp_path / "data")


def test_data_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(DataError, match=r"could not be filled.*--data-dir"):
        store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))


# ------------------------------------------------------------------------------------------------------- verifying


def test_changes_after_unpacking(fetched: Path) -> None:
    file = fetched / "a/1.txt"
    file.write_bytes(b"eno")  # same size: only verify sees it
    store.quick_check(fetched, "run it")
    with pytest.raises(DataError, match=r"a/1\.txt has sha256 .*, expected .*then run it"):
        store.verify(fetched, "run it")
    file.write_bytes(b"longer")
    with pytest.raises(DataError, match=r"a/1\.txt has 6 bytes, expected 3: delete .*, then run it"):
        store.quick_check(fetched, "run it")
    file.unlink()
    with pytest.raises(DataError, match=r"a/1\.txt is missing: delete .*, then run it"):
        store.quick_check(fetched, "run it")
    file.write_bytes(b"one")
    (fetched / "a/.DS_Store").write_bytes(b"a file manager was here")
    store.quick_check(fetched, "run it")
    (fetched / "a/7.txt").write_bytes(b"new")
    with pytest.raises(DataError, match=r"a/7\.txt does not belong to toy set"):
        store.quick_check(fetched, "run it")


def test_manifest_missing_damaged_edited(fetched: Path, tmp_path: Path) -> None:
    path = fetched / "manifest.json"
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(DataError, match=r"manifest\.json cannot be read .*then run it"):
        store.quick_check(fetched, "run it")
    path.write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        store.quick_check(fetched, "run it")
    fields = json.loads(text)
    fields["files"]["a/1.txt"][1] = "0" * 64
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"manifest\.json was edited"):
        store.quick_check(fetched, "run it")
    path.unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        store.quick_check(fetched, "run it")
    with pytest.raises(DataError, match="nowhere does not exist: run it"):
        store.quick_check(tmp_path / "nowhere", "run it")


# ---------------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, root = make_zip(tmp_path / "toy.zip", FILES), str(tmp_path / "data")
    assert store.main(DATASET, ["--archive", str(archive), "--data-dir", root]) == 0
    out = capsys.readouterr().out
    fingerprint = store.quick_check(tmp_path / "data/group/toy", "").fingerprint
    for part in ("free", "nobody", "toy set: 3 files in", str(tmp_path / "data/group/toy"), fingerprint):
        assert part in out
    assert store.main(DATASET, ["--verify", "--data-dir", root]) == 0
    assert "every file verified" in capsys.readouterr().out

    (tmp_path / "data/group/toy/a/1.txt").write_bytes(b"eno")
    assert store.main(DATASET, ["--verify", "--data-dir", root]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "a/1.txt" in captured.err and captured.err.count("\n") == 1
    assert store.main(DATASET, ["--data-dir", str(tmp_path / "empty")]) == 1
    assert "it has no address" in capsys.readouterr().err


def test_mvtec_script(tmp_path: Path, script, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Counts are checked, small images are called reduced, and only the category leaves an archive of the whole set."""
    from PIL import Image

    mvtec = script("mvtec_ad")
    monkeypatch.setitem(mvtec.CATEGORIES, "tile", (2, 1, 1, 64, "share"))

    def archive(side: int, train: int) -> Path:
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "png")
        names = [f"train/good/{i:03}.png" for i in range(train)]
        names += ["test/good/000.png", "test/crack/000.png", "ground_truth/crack/000_mask.png", "license.txt"]
        both = [f"{category}/{name}" for category in ("tile", "wood") for name in names]
        return make_zip(tmp_path / f"{side}.zip", dict.fromkeys(both, buffer.getvalue()), top="")

    def run(path: Path) -> int:
        return mvtec.main(["--category", "tile", "--archive", str(path), "--data-dir", str(tmp_path / "data")])

    assert run(archive(64, 2)) == 0
    assert "MVTec AD tile: 6 files" in capsys.readouterr().out
    assert not (tmp_path / "data/mvtec_ad/wood").exists()
    assert run(archive(32, 2)) == 0
    assert "MVTec AD tile (reduced): 6 files" in capsys.readouterr().out
    assert run(archive(64, 3)) == 1
    assert "should have (2, 1, 1)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mvtec.main(["--category", "teapot"])


def test_mvtec_table_adds_up(script) -> None:
    from defectlab.data.anomaly import MVTEC_CATEGORIES

    categories = script("mvtec_ad").CATEGORIES
    assert tuple(sorted(categories)) == tuple(sorted(MVTEC_CATEGORIES))
    assert [sum(values[i] for values in categories.values()) for i in range(3)] == [3629, 467, 1258]
