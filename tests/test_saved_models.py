"""Model files that are not what this program writes: one error that names the file, before memory is asked for."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from defectlab.files import DataError
from defectlab.networks.feature_baselines import PatchCoreSettings
from defectlab.networks.yolo.settings import DetectorSettings
from defectlab.own import detect, saved, score
from defectlab.papers import bsdrd, yolo_dcf

SETTINGS = {
    "bsdrd": bsdrd.Settings(teacher="resnet18_random", size=64, low_channels=8, high_channels=8),
    "patchcore": PatchCoreSettings(teacher="resnet18_random", size=64),
    "detector": DetectorSettings(dataset="parts", scale="t", size=64, family="v5"),
    "yolo_dcf": yolo_dcf.Settings(dataset="synthetic_steel", scale="t", size=64),
}


def load(path: Path) -> Any:
    """As the two commands do."""
    if path.stem in score.SETTINGS:
        return score.scorer(saved.read(path, score.SETTINGS, score.REMEDY), "cpu")
    return detect.read_detector(path, "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name, settings in SETTINGS.items():
        bank = {"bank": torch.zeros(7, 384)}
        made = detect.BUILD[name](settings, 6) if name in detect.BUILD else score.fresh(settings, bank)
        names = {"class_names": list("abcdef")} if name == "detector" else {}
        saved.write(folder / f"{name}.safetensors", settings, {"threshold": 0.5}, made.state_dict(), **names)
        load(folder / f"{name}.safetensors")
    return folder


def with_setting(**values: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, tensors: header["settings"].update(values)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        *(("bsdrd", with_setting(size=value)) for value in (7, 128.5, None, 1_000_000, "64", True)),
        ("detector", with_setting(size=-64)),
        ("yolo_dcf", with_setting(colours=False)),
        *(("bsdrd", with_setting(teacher=value)) for value in ("resnet99", 18)),
        *(("bsdrd", with_setting(students=value)) for value in (["struct", "tutor"], "struct")),
        *(("bsdrd", with_setting(low_channels=value)) for value in (10**7, -1)),
        ("bsdrd", with_setting(wavelet="nonsense")),
        ("patchcore", with_setting(teacher="wide_resnet50_2")),
        *(("detector", with_setting(scale=value)) for value in ("s", "huge")),
        ("detector", with_setting(family=["v5"])),
        ("yolo_dcf", with_setting(fusion="nonsense")),
        ("yolo_dcf", with_setting(teacher_seed={})),
        ("bsdrd", lambda header, tensors: header.update(settings=[])),
        ("bsdrd", lambda header, tensors: header.update(settings="[" * 100_000)),
        ("bsdrd", lambda header, tensors: header.update(dev=[0.5])),
        *(("bsdrd", lambda header, _, v=v: header.update(dev={"threshold": v})) for v in ("0.5", math.nan, None)),
        ("bsdrd", lambda header, tensors: tensors.popitem()),
        ("bsdrd", lambda header, tensors: [v.fill_(math.nan) for v in tensors.values() if v.is_floating_point()]),
        ("patchcore", lambda header, tensors: tensors.clear()),
        *(("patchcore", lambda _, tensors, s=s: tensors.update(bank=torch.zeros(s))) for s in ((0, 384), (7, 300), ())),
        *(("detector", lambda header, _, n=n: header.update(class_names=n)) for n in ([1, 2], "abcdef", ["a"] * 10**6)),
        ("detector", lambda header, tensors: None),  # a set whose classes nobody knows
    ],
)
def test_settings_header_or_tensors_that_no_model_has(models: Path, tmp_path: Path, name: str, edit: Callable) -> None:
    tensors, path = load_file(models / f"{name}.safetensors"), tmp_path / f"{name}.safetensors"
    header = {"model": name, "dev": {"threshold": 0.5}, "settings": asdict(SETTINGS[name])}
    edit(header, tensors)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_file(tensors, path, texts)
    with pytest.raises(DataError) as caught:
        load(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and len(said.splitlines()) == 1 and "train" in said.rsplit(":", 1)[1]
