"""Fetching, unpacking and verifying: what is refused, what the message says, and that nothing is left behind."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from toy_archives import DATASET, FILES, make_tar, make_zip, nothing_left

from defectlab import files
from defectlab.data import fetch as store
from defectlab.data.fetch import Source
from defectlab.files import DataError, data_dir, weights_dir


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    store.fetch(DATASET, tmp_path / "data", make_zip(tmp_path / "toy.zip", FILES))
    return tmp_path / "data" / "group" / "toy"


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
    deep = {f"./deep/er/{name}": content for name, content in FILES.items()}
    third = store.fetch(DATASET, tmp_path / "3", make_tar(tmp_path / "3.tar.xz", deep))
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
    ("deep_pcb", "DeepPCB/PCBData/group00041/00041_not/00041000.txt", "PCBData/group00041/00041_not/00041000.txt"),
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


def test_changes_that_the_quick_check_lets_pass(fetched: Path) -> None:
    (fetched / "a/.DS_Store").write_bytes(b"a file manager was here")
    (fetched / "a/1.txt").write_bytes(b"eno")  # same size: only verify sees it
    store.quick_check(fetched, "run it")
    with pytest.raises(DataError, match=r"a/1\.txt has sha256 .*, expected .*then run it"):
        store.verify(fetched, "run it")


ONE = hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("a/1.txt", lambda path: path.write_bytes(b"longer"), "has 6 bytes, expected 3: delete .*, then run it"),
        ("a/1.txt", Path.unlink, "is missing: delete .*, then run it"),
        ("a/7.txt", Path.touch, "does not belong to toy set"),
        ("manifest.json", lambda path: path.write_text(path.read_text()[:-20]), "cannot be read .*then run it"),
        ("manifest.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace(ONE, "0" * 64)), "was edited"),
        ("manifest.json", Path.unlink, "is missing"),
        ("", shutil.rmtree, "toy does not exist: run it"),
    ],
)
def test_changes_that_the_quick_check_finds(fetched: Path, name: str, harm: Callable, message: str) -> None:
    harm(fetched / name)
    with pytest.raises(DataError, match=rf"{re.escape(name)} ?{message}"):
        store.quick_check(fetched, "run it")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, root = make_zip(tmp_path / "toy.zip", FILES), str(tmp_path / "data")
    main = store.script(DATASET, None)
    assert main(["--archive", str(archive), "--data-dir", root]) == 0
    out = capsys.readouterr().out
    fingerprint = store.quick_check(tmp_path / "data/group/toy", "").fingerprint
    for part in ("free", "nobody", "toy set: 3 files in", str(tmp_path / "data/group/toy"), fingerprint):
        assert part in out
    assert main(["--verify", "--data-dir", root]) == 0
    assert "every file verified" in capsys.readouterr().out

    (tmp_path / "data/group/toy/a/1.txt").write_bytes(b"eno")
    assert main(["--verify", "--data-dir", root]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "a/1.txt" in captured.err and captured.err.count("\n") == 1
    assert main(["--data-dir", str(tmp_path / "empty")]) == 1
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
    assert store.quick_check(tmp_path / "data/mvtec_ad/tile", "").note == "reduced"
    assert run(archive(64, 3)) == 1
    assert "should have (2, 1, 1)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mvtec.main(["--category", "teapot"])


def test_mvtec_table_adds_up(script) -> None:
    from defectlab.data.anomaly import MVTEC_CATEGORIES

    categories = script("mvtec_ad").CATEGORIES
    assert tuple(sorted(categories)) == tuple(sorted(MVTEC_CATEGORIES))
    assert [sum(values[i] for values in categories.values()) for i in range(3)] == [3629, 467, 1258]
