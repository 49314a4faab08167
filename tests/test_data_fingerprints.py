"""The identity of every real set, as the committed records hold it: a change here would orphan records."""

import json
from collections.abc import Callable

import pytest

from defectlab.data.anomaly import data_fingerprint
from defectlab.data.detection import detection_fingerprint
from defectlab.data.instances import instance_fingerprint
from defectlab.data.masks import segmentation_fingerprint
from defectlab.files import project_root

NUT = ("mvtec_ad/metal_nut", "mvtec_ad", "mvtec_metal_nut_512.zip", "--category", "metal_nut")
NEU_DET = ("neu_det", "neu_det", "NEU-DET.zip")
NEU_SEG = ("neu_seg", "neu_seg", "NEU-Seg.zip")
PINNED = [  # function, its arguments, arguments of `real_set`, sha256
    (
        data_fingerprint,
        ("magnetic_tile",),
        ("magnetic_tile", "magnetic_tile", "magnetic-tile.zip"),
        "46f6b0843284c763ee83c649523dcfc25a854f6ca7df7224bf518ebbdf0b00ec",
    ),
    (
        data_fingerprint,
        ("mvtec_ad/metal_nut",),
        NUT,
        "18bc0d08674b016dcc2fbcfe0f4002633616df311d07d59c0b5e1ec4b6b98e33",
    ),
    (
        detection_fingerprint,
        ("neu_det",),
        NEU_DET,
        "649d69a6216bda93fa75778bc54009c65f736c26b1295c7230fdac99c959eee8",
    ),
    (
        detection_fingerprint,
        ("neu_det_index",),
        NEU_DET,
        "d4def8c74c87c3d31e0e05f4ab18615d9073b8f84d7638f2cb504649255254d7",
    ),
    (
        detection_fingerprint,
        ("deep_pcb",),
        ("deep_pcb", "deep_pcb", "DeepPCB.tar.xz"),
        "77d929b352bc060c5b21d85d6ca1b9d8e11a01eb00a764dabcdd42c76887628d",
    ),
    (
        segmentation_fingerprint,
        ("mvtec_ad/metal_nut", "nut", "paper"),
        NUT,
        "e75e2a71850dfec555eaaae88824b6c54e625183c3b6847bcfec77c5b370ebc4",
    ),
    (
        segmentation_fingerprint,
        ("mvtec_ad/metal_nut", "nut", "good"),
        NUT,
        "9778b4180e79437123022e7d6e87bdfe850377d23cb7797fad54a60ddea98030",
    ),
    (
        segmentation_fingerprint,
        ("mvtec_ad/metal_nut", "defect", "paper"),
        NUT,
        "06de86621268d6e42fe9b53d652ca2cd4fa8179d9335dfdbf4cbf551738c0ec8",
    ),
    (
        instance_fingerprint,
        ("neu_seg",),
        NEU_SEG,
        "671ce36e5ab5d6d5ac74e96fbfc5d33fef4327a6abe9f865048ede9ced555b6d",
    ),
    (
        instance_fingerprint,
        ("neu_seg_published",),
        NEU_SEG,
        "958c8ab6703d0622a2157a05a3de921efe4524941c10fa7a8d326242650c51c4",
    ),
]


@pytest.mark.real_data
@pytest.mark.parametrize(("function", "arguments", "archive", "sha256"), PINNED)
def test_identity_of_the_real_sets(function: Callable, arguments, archive, sha256: str, real_set) -> None:
    assert function(*arguments, root=real_set(*archive)) == sha256


def test_records_hold_these_identities() -> None:
    by_set = {arguments: sha256 for _, arguments, _, sha256 in PINNED}
    of_model = {"robustness": {by_set["neu_det",]}, "amam_two_stage": {by_set["mvtec_ad/metal_nut",]}}
    compared = 0
    for path in sorted((project_root() / "results" / "runs").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        settings, found = record["settings"], record["fingerprints"]
        if "masks" in found:  # which nuts stage two sees
            assert found["masks"] in {by_set["mvtec_ad/metal_nut", "nut", split] for split in ("paper", "good")}, path
        if found.get("data", "none") != "none":
            key = tuple(settings[name] for name in ("dataset", "target", "split") if name in settings)
            assert found["data"] in ({by_set[key]} if key else of_model[record["model"]]), path
            compared += 1
    assert compared > 60
