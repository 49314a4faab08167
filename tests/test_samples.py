"""Committed samples and data cards: the readers read the samples, and the real sets give the same again.

Where a real set is missing, or another copy of it lies there, the others are still drawn and compared.
"""

import json
import tomllib
from pathlib import Path

import pytest

from defectlab.data import cards, fetch, splits
from defectlab.data.anomaly import load_anomaly, plan_of
from defectlab.data.cells import ELPV
from defectlab.data.detection import load_detection, load_images
from defectlab.data.frames import SPLITS, load_frames
from defectlab.data.instances import load_instances
from defectlab.data.masks import load_segmentation
from defectlab.data.own_folder import load_folder
from defectlab.data.splits import here_or_sample, samples_dir
from defectlab.files import DataError

RESULTS = Path(__file__).parents[1] / "results"
SIZE = 64


@pytest.mark.parametrize("name", [name for name in cards.SETS if name not in (*SPLITS, ELPV)])
def test_a_sample_is_read_like_its_set(name: str) -> None:
    """Every class is seen, there is something of each part, and what trains is what the published list trains on."""
    card = cards.card(f"sample/{name}")
    boxes = card["counted"] == "boxes"
    load = load_instances if name == "neu_seg" else load_detection if boxes else load_anomaly
    data = load(f"sample/{name}", SIZE)
    splits_of = [data.train, data.dev, data.test]
    assert data.name == f"sample/{name}" and data.label.startswith(cards.card(name)["label"].split(" (")[0])
    assert "sample of" in data.label and min(map(len, splits_of)) > 0
    names = data.class_names if boxes else data.type_names
    few = name == "aitex"  # eight crops, since no licence is stated: not of all kinds
    assert set(names) < set(card["classes"]) if few else list(names) == card["classes"]
    labels = [split.labels if boxes else split.types for split in splits_of]
    assert {int(label) for part in labels for label in part.unique()} - {-1} == set(range(len(names)))


@pytest.mark.parametrize("name", ["road_depth", "bsdata"])
def test_a_sample_of_frames_has_something_of_each_part(name: str) -> None:
    data = load_frames(f"sample/{name}", {"road_depth": "session_2", "bsdata": "zones"}[name])
    assert "sample of" in data.label and min(len(getattr(data, part)) for part in splits.PARTS) > 0
    assert all(getattr(data, part).masks.flatten(1).any(1).all() for part in splits.PARTS)
    assert (data.train.depth is not None) == (name == "road_depth")


def test_the_other_splits_of_a_sample() -> None:
    """By number, as published (with the turned copy of a test image), stage one of the two-stage paper, one part."""
    assert [len(getattr(load_detection("sample/neu_det_index", SIZE), part)) for part in splits.PARTS] == [6, 1, 1]
    published = load_instances("sample/neu_seg_published", SIZE)
    assert "images/training/001629.jpg" in published.train.names + published.dev.names
    assert len(load_instances("sample/neu_seg", SIZE).train) == len(published.train) - 1
    for target, split in (("nut", "paper"), ("nut", "good"), ("defect", "paper")):
        nuts = load_segmentation("sample/mvtec_ad/metal_nut", target, split, SIZE)
        assert len(nuts.train) >= 3 and nuts.train.masks.any() and len(nuts.dev) and len(nuts.test)
    assert len(load_images("sample/deep_pcb", "test", SIZE)) == 5


def test_a_whole_set_must_hold_all_that_a_list_names(tmp_path: Path) -> None:
    """Only a sample may lack some of it."""
    folder = tmp_path / "magnetic_tile" / "MT_Free" / "Imgs"
    folder.mkdir(parents=True)
    (folder / "exp1_num_19695.jpg").write_bytes(b"")
    fetch.write_manifest(tmp_path / "magnetic_tile", "magnetic tiles", "a test")
    with pytest.raises(DataError, match=r"lists MT_Free/Imgs/exp.*does not hold: fetch the set again"):
        plan_of("magnetic_tile", tmp_path)


def test_the_whole_set_or_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFECTLAB_DATA", str(tmp_path))
    (tmp_path / "neu_det").mkdir()
    (tmp_path / "neu_det" / "manifest.json").write_text("{}")
    names = ["neu_det", "neu_det_index", "neu_seg_published", "mvtec_ad/metal_nut", "synthetic_steel"]
    found = ["neu_det", "neu_det_index", "sample/neu_seg_published", "sample/mvtec_ad/metal_nut", "synthetic_steel"]
    assert [here_or_sample(name) for name in names] == found


def test_a_damaged_sample_names_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "project_root", lambda: tmp_path)
    with pytest.raises(DataError, match="neu_det does not exist: restore it from the repository"):
        load_detection("sample/neu_det", SIZE)


def test_images_of_the_walk_through() -> None:
    folder = samples_dir() / "your_parts"
    assert len(list((folder / "nuts/good").glob("*.jpg"))) == 20
    assert len(list((folder / "nuts/inspect").glob("*.jpg"))) == 6
    data = load_folder(folder / "boards", "yolo", SIZE)
    assert [len(getattr(data, part)) for part in splits.PARTS] == [16, 4, 4] and "leak" not in data.report


def test_samples_are_small_and_say_where_they_are_from() -> None:
    """Of sets without a stated licence at most eight images; the citation and the licence are those of the cards."""
    sources = tomllib.loads((samples_dir() / "SOURCES.toml").read_text(encoding="utf-8"))
    for name, source in sources.items():
        files = [path for path in (samples_dir() / name).rglob("*") if path.is_file()]
        assert 0 < sum(path.stat().st_size for path in files) <= 300_000, name
        images = len(source.get("corners", source.get("images", ())))
        assert images <= (8 if "none stated" in source["licence"] else 24)
    for name in cards.SETS:
        card = cards.card(name)
        assert {key: sources[name][key] for key in ("citation", "licence", "page")}.items() <= card.items()
        fetch.verify(samples_dir() / name, "restore it")


@pytest.mark.parametrize("name", cards.SETS)
def test_cards_are_told_as_tables(name: str) -> None:
    table, card = cards.table(name), cards.card(name)
    assert table.columns.tolist() == ["part", "images", *card["classes"]]
    assert table["images"].tolist() == [card["parts"][part]["images"] for part in splits.PARTS]
    assert card["licence"] in cards.credit(name) and card["name"] in cards.credit(name)
    assert card["label"] in cards.facts(name)["whole set"].tolist()


def test_a_caption_names_the_authors_and_the_year() -> None:
    expected = "Images: committed sample of NEU-DET (Song, Yan 2013; He, Song, Meng, Yan 2020); licence: none stated; "
    assert cards.credit("sample/neu_det_index").startswith(expected)


def test_a_set_without_a_card_is_said() -> None:
    with pytest.raises(DataError, match="no data card of 'synthetic_steel': choose one of magnetic_tile, "):
        cards.card("synthetic_steel")


# ------------------------------------------------------------------------------------------------------- the real sets


@pytest.fixture(scope="module")
def again(real_set, script, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Samples and cards, made anew, and the sets left out with the reason.

    The sets may lie in two folders: links bring them together.
    """
    root, out, left_out = tmp_path_factory.mktemp("all"), tmp_path_factory.mktemp("results"), {}
    (root / "mvtec_ad").mkdir()
    for name in cards.SETS:
        try:
            (root / name).symlink_to((real_set(name) / name).resolve(), target_is_directory=True)
        except pytest.skip.Exception as missing:
            left_out[name] = str(missing)
            continue
        if fetch.read_manifest(root / name, "").fingerprint != cards.card(name)["fingerprint"]:
            left_out[name] = f"another copy of {name} than that of the card lies here"
    if "neu_det" in left_out:  # the card of NEU-Seg says which of its images are NEU-DET's
        left_out.setdefault("neu_seg", left_out["neu_det"])
    if len(left_out) == len(cards.SETS):
        pytest.skip(left_out[cards.SETS[0]])
    without = ["--without", *left_out] if left_out else []
    for name in ("samples", "cards"):
        assert script(name).main(["--data-dir", str(root), "--out", str(out), *without]) == 0
    return out, left_out


@pytest.mark.real_data
def test_the_real_sets_give_the_same_samples(again: tuple[Path, dict[str, str]], script) -> None:
    out, left_out = again
    parts = {name: part for name, (part, _) in script("samples").OWN_PARTS.items()}
    unseen = tuple(f"{folder}/" for name in left_out for folder in (name, parts.get(name, name)))

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    committed = contents(RESULTS / "samples")
    del committed["SOURCES.toml"]
    assert contents(out / "samples") == {
        path: content for path, content in committed.items() if not path.startswith(unseen)
    }


@pytest.mark.real_data
@pytest.mark.parametrize("name", cards.SETS)
def test_the_real_sets_give_the_same_cards(name: str, again: tuple[Path, dict[str, str]]) -> None:
    out, left_out = again
    if name in left_out:
        pytest.skip(left_out[name])
    file = f"{name.rpartition('/')[2]}.json"
    assert json.loads((out / "data" / file).read_text()) == json.loads((RESULTS / "data" / file).read_text())


@pytest.mark.real_data
def test_a_training_image_of_the_sample_is_one_of_the_set(real_set) -> None:
    def parts(name: str, root: Path | None) -> tuple[set[Path], set[Path]]:
        """Training and test images, without suffixes: the copy of metal_nut may have others."""
        plan = plan_of(name, root).parts
        names = {part: {Path(sample.path).with_suffix("") for sample in plan[part]} for part in plan}
        return names["train"] | names["dev"], names["test"]

    for name in ("magnetic_tile", "mvtec_ad/metal_nut"):
        both = zip(parts(f"sample/{name}", None), parts(name, real_set(name)), strict=True)
        assert all(sample <= whole for sample, whole in both)
