"""What identifies data: fingerprints of the real sets as records hold them, and digests of what is computed or drawn.

A digest that changes names another content. Where that is meant, write the new digest into the module: fingerprints
follow, and records made with the old content are no longer found. A change of names or comments alone changes none.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defectlab.data import anomaly, fetch, instances, masks, splits
from defectlab.data import synthetic as synthetic_sets
from defectlab.data.anomaly import Sample, data_fingerprint, hold_out, paste_defect
from defectlab.data.detection import detection_fingerprint
from defectlab.data.domains import SETS, THREE_DOMAINS, domains_fingerprint
from defectlab.data.fabric import fabric_fingerprint
from defectlab.data.frames import frames_fingerprint
from defectlab.data.images import letterbox, letterbox_maps
from defectlab.data.instances import instance_fingerprint
from defectlab.data.marked import marked_fingerprint
from defectlab.data.masks import nut_mask, segmentation_fingerprint
from defectlab.data.pictures import pictures_fingerprint
from defectlab.data.pooled import POOLS, pooled_fingerprint
from defectlab.data.stages import pits_fingerprint
from defectlab.data.synthetic import SYNTHETIC, ensure_synthetic
from defectlab.files import project_root

METAL_NUT = "mvtec_ad/metal_nut"
PINNED = [  # function, its arguments: the set first, sha256
    (data_fingerprint, ("magnetic_tile",), "46f6b0843284c763ee83c649523dcfc25a854f6ca7df7224bf518ebbdf0b00ec"),
    (data_fingerprint, ("magnetic_tile_grouped",), "7368c66432da79cca7f4f2ee9c5e81fa4355bdd7b424bb95af7bd6345771936d"),
    (data_fingerprint, (METAL_NUT,), "18bc0d08674b016dcc2fbcfe0f4002633616df311d07d59c0b5e1ec4b6b98e33"),
    (data_fingerprint, ("aitex",), "dd7f27672076cbe8f8eb80ebaa4bd618739414acd8a21437a7d1c43d63946265"),
    (fabric_fingerprint, ("aitex",), "f44ba9d9eb142709ae171e9a275c679884e52c2342ab7959c7aa9d8f548885e9"),
    (detection_fingerprint, ("neu_det",), "649d69a6216bda93fa75778bc54009c65f736c26b1295c7230fdac99c959eee8"),
    (pictures_fingerprint, ("neu_det",), "77c9ebefd8fa2e3463c167ffb8396821c447999e3e13fe692717e68102e3b9cd"),
    (pictures_fingerprint, ("elpv",), "bb4d280ba51e607d5e0b70fec5fae843558e7e75e1e38efa9aa68b3d1efa7239"),
    (detection_fingerprint, ("neu_det_index",), "d4def8c74c87c3d31e0e05f4ab18615d9073b8f84d7638f2cb504649255254d7"),
    (detection_fingerprint, ("deep_pcb",), "77d929b352bc060c5b21d85d6ca1b9d8e11a01eb00a764dabcdd42c76887628d"),
    (detection_fingerprint, ("deep_pcb_pair",), "77d929b352bc060c5b21d85d6ca1b9d8e11a01eb00a764dabcdd42c76887628d"),
    (
        segmentation_fingerprint,
        (METAL_NUT, "nut", "paper"),
        "e75e2a71850dfec555eaaae88824b6c54e625183c3b6847bcfec77c5b370ebc4",
    ),
    (
        segmentation_fingerprint,
        (METAL_NUT, "nut", "good"),
        "9778b4180e79437123022e7d6e87bdfe850377d23cb7797fad54a60ddea98030",
    ),
    (
        segmentation_fingerprint,
        (METAL_NUT, "defect", "paper"),
        "06de86621268d6e42fe9b53d652ca2cd4fa8179d9335dfdbf4cbf551738c0ec8",
    ),
    (
        frames_fingerprint,
        ("road_depth", "session_1"),
        "b36a35874c480ef959e9294255175e9b3b63ae6c521500426f58f48b817aa2f0",
    ),
    (
        frames_fingerprint,
        ("road_depth", "session_2"),
        "27daaf471745d27e30c923b143a2c2a5faf029b80f9de9bc43339d1bfc11d0e3",
    ),
    (pits_fingerprint, ("bsdata", "zones"), "545b61675501f6e0cc1c3eb6d69b1349d8e06b08fbabe1f48d8621a3d7fa8fe2"),
    (marked_fingerprint, ("bsdata", "zones"), "c8cba5147f157b1a2767eccca2f63f9d9f1bc47ad6b71e720e6f47dc6c8924ad"),
    (marked_fingerprint, ("bsdata", "official"), "3ea4e75103406d758f2c732d31ddc2ebb0b3994653a95885bdb3dd447e49c0d4"),
    (marked_fingerprint, ("bsdata", "zones_mixed"), "f3692617e251b613e52de8f223c15e464659b1e0b4a3d54931148c69967b821d"),
    (marked_fingerprint, ("neu_seg", "apart"), "27704e5d81600e94858cbfc4bb02a689a88284a7ee71b5f55c58ebcfa84f9e2c"),
    (instance_fingerprint, ("neu_seg",), "671ce36e5ab5d6d5ac74e96fbfc5d33fef4327a6abe9f865048ede9ced555b6d"),
    (instance_fingerprint, ("neu_seg_published",), "958c8ab6703d0622a2157a05a3de921efe4524941c10fa7a8d326242650c51c4"),
]

PINNED_POOL = "92ab016c4684379c2e057402d338e9958ba70720daaae1340ee9ac7146a1785b"
PINNED_DOMAINS = "39bba65f80665228e1b8733ac9698a528bbf9f9c7fea1b03b6690179329dca31"


@pytest.mark.real_data
def test_identity_of_the_pooled_sets(real_set) -> None:
    roots = {real_set(splits.folder_of(name)) for name in (*POOLS["pooled"], *SETS[THREE_DOMAINS])}
    root = roots.pop()
    assert not roots and pooled_fingerprint("pooled", root) == PINNED_POOL
    assert domains_fingerprint(THREE_DOMAINS, root) == PINNED_DOMAINS


@pytest.mark.real_data
@pytest.mark.parametrize(("function", "arguments", "sha256"), PINNED)
def test_identity_of_the_real_sets(function: Callable, arguments: tuple[str, ...], sha256: str, real_set) -> None:
    folder = splits.folder_of(arguments[0])
    assert function(*arguments, root=real_set(folder)) == sha256


def test_records_hold_these_identities() -> None:
    by_set: dict[tuple[str, ...], set[str]] = {}
    for _, arguments, sha256 in PINNED:
        by_set.setdefault(arguments, set()).add(sha256)
    by_set["pooled",], by_set[THREE_DOMAINS,] = {PINNED_POOL}, {PINNED_DOMAINS}
    of_model = {
        "robustness": "neu_det",
        "amam_two_stage": METAL_NUT,
        "light": "magnetic_tile_grouped",
        "flutter": "aitex",
    }
    compared = 0
    for path in sorted((project_root() / "results" / "runs").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        settings, found = record["settings"], record["fingerprints"]
        if "masks" in found:  # which nuts stage two sees
            assert found["masks"] in by_set[METAL_NUT, "nut", "paper"] | by_set[METAL_NUT, "nut", "good"], path
        if found.get("data", "none") != "none":
            told = settings.get("colour", settings)  # of two networks, what the first one saw
            while record["model"] in ("other_end", "gated_detector", "classified_boxes") and "of" in told:
                told = told["of"]
            key = tuple(told[name] for name in ("dataset", "target", "split") if name in told)
            assert found["data"] in by_set[key or (of_model[record["model"]],)], path
            compared += 1
    assert compared > 60


def texture(height: int, width: int) -> np.ndarray:
    """Whole numbers 0..255 that need no random numbers: the same everywhere."""
    row, column = np.mgrid[:height, :width]
    return ((row * row * 7 + column * 13 + row * column * 3) % 97 + 60).astype(np.uint8)


def pasted_defects() -> Iterator[object]:
    """Every type on a grey and on a colour image, and which images are held out."""
    grey = Image.fromarray(texture(96, 70))
    for seed in range(6):
        for image in (grey, Image.merge("RGB", (grey, grey.rotate(180), grey))):
            yield from paste_defect(image, seed)
    yield hold_out([Sample(f"{i}.png") for i in range(60)], anomaly.TILE_TYPES)


def nut_masks() -> Iterator[object]:
    row, column = np.mgrid[:96, :96] - 47.5
    radius = np.hypot(row, column)
    for light in (60, 120):  # a ring with a dim side, a mark and a scratch
        image = np.where((radius < 40) & (radius > 12), light + column / 2, 25) + texture(96, 96) % 5
        image[60:64, 20:24] = image[40:42, :30] = 25
        yield nut_mask(np.repeat(image.astype(np.uint8)[..., None], 3, 2))


def detection_splits() -> Iterator[object]:
    strata = {f"{kind}_{i}.jpg": kind for kind, count in (("a", 40), ("b", 23), ("c", 5)) for i in range(count)}
    content = {name: name for name in strata} | {"a_1.jpg": "twin", "a_7.jpg": "twin"}
    test = splits.draw_split(strata, 0.2, "a test", content)
    yield from (test, splits.last_fifth(strata), splits.with_dev(strata, test, content))
    colour = np.stack([texture(64, 40), texture(64, 40)[::-1], texture(64, 40)], 2)
    for image in (texture(40, 64), colour):
        yield from letterbox(Image.fromarray(image), 32)


def instance_maps() -> Iterator[object]:
    row, column = np.mgrid[:60, :90]
    mask = np.where(texture(60, 90) > 150, 0, (row // 12 + column // 15) % 4).astype(np.uint8)
    mask[5::14, 5::22] = 3  # specks, and dots on larger parts
    found = instances.instances(mask)
    yield from (*found, letterbox_maps(torch.from_numpy(found[2])[None], 48))


def digest(parts: Iterator[object]) -> str:
    """The first 16 digits of a sha256 over arrays (shape, type, bytes) and the text of everything else."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | torch.Tensor | Image.Image):
            array = np.asarray(part)
            found.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:16]


DIGESTS = [
    (pasted_defects, anomaly, "PASTED_DEFECTS"),
    (nut_masks, masks, "NUT_MASKS"),
    (detection_splits, splits, "DETECTION_SPLITS"),
    (instance_maps, instances, "INSTANCES"),
]


@pytest.mark.parametrize(("probe", "module", "name"), DIGESTS)
def test_what_is_computed_has_its_digest(probe: Callable, module, name: str) -> None:
    found = digest(probe())
    assert getattr(module, name) == found, f"{name}: if the change is meant, write {found!r}; old records are left out"


def test_records_know_a_content_by_its_number_and_a_new_one_is_another() -> None:
    for _, module, name in DIGESTS:
        assert splits.content_id(getattr(module, name)) == "1"
    assert splits.content_id("0" * 16) == "0" * 16


def test_fingerprints_follow_digests(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each digest enters the fingerprints of its sets; a nut's masks of the sets without nuts do not."""
    known = (
        lambda: data_fingerprint("synthetic_tile", synthetic),
        lambda: segmentation_fingerprint("synthetic_nut", "nut", "paper", synthetic),
        lambda: detection_fingerprint("synthetic_steel", synthetic),
        lambda: instance_fingerprint("synthetic_steel_masks", synthetic),
    )
    before = [fingerprint() for fingerprint in known]
    for number, (_, module, name) in enumerate(DIGESTS):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0" * 16)
            changed = [fingerprint() != old for fingerprint, old in zip(known, before, strict=True)]
        assert changed == [number == other for other in range(4)], name


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_sets_are_known_by_their_content(name: str, synthetic: Path) -> None:
    manifest = fetch.verify(synthetic / name, "")
    assert manifest.fingerprint[:16] == SYNTHETIC[name].content, f"{name} is drawn otherwise: write the new one"
    assert SYNTHETIC[name].content[:12] in manifest.source


def test_a_synthetic_set_is_written_again_only_for_another_content(tmp_path: Path, monkeypatch) -> None:
    """What the code's files say (a comment, say) does not matter; a set of another content does."""
    listed = tmp_path / "synthetic_nut" / fetch.MANIFEST
    ensure_synthetic(tmp_path, "synthetic_nut")
    before = listed.stat().st_mtime_ns
    monkeypatch.setattr(Path, "read_bytes", None)  # no source file is looked at
    ensure_synthetic(tmp_path, "synthetic_nut")
    assert listed.stat().st_mtime_ns == before
    other = synthetic_sets.Synthetic("synthetic nuts", SYNTHETIC["synthetic_nut"].write, "0" * 64)
    monkeypatch.setitem(SYNTHETIC, "synthetic_nut", other)
    ensure_synthetic(tmp_path, "synthetic_nut")
    assert listed.stat().st_mtime_ns != before
