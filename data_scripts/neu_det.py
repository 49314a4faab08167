"""Unpack NEU-DET (1,800 grey images of hot-rolled steel strip with boxes, 28 MB) into data/neu_det.

    python data_scripts/neu_det.py --archive FILE   use a local zip
    python data_scripts/neu_det.py --verify         check every file

No public address of the archive is known for certain, so nothing is downloaded: get NEU-DET.zip from the authors' page.
Its folders IMAGES and ANNOTATIONS may lie below any other folder, and may be divided further, as the copy on Kaggle has
them (train/images/<class>, train/annotations, validation/...): the files decide, not where they lie.

What is pinned: the fingerprint of the 1,800 images and 1,800 xml files, computed from the archive whose sha256 is in
`archive_sha256`. The files are kept as published, with their own defects: 3 of the 4,189 boxes stand twice, 174 xml
have a <filename> without ".jpg", patches_101 and patches_105 are one image, and 123 images have boxes of another
class than their file name (the readers go by the boxes).
"""

import sys
from collections import Counter
from pathlib import Path

from defectlab.data import fetch
from defectlab.data.detection import NEU_CLASSES
from defectlab.files import DataError

FILE = rf"(?:{'|'.join(NEU_CLASSES)})_\d+"


def _check(folder: Path) -> str:
    """DataError unless there are 300 images of each class in the file names, each with its xml."""
    images, annotations = (
        {path.stem for path in folder.glob(pattern)} for pattern in ("IMAGES/*.jpg", "ANNOTATIONS/*.xml")
    )
    counts = Counter(stem.rpartition("_")[0] for stem in images)
    if images != annotations or counts != dict.fromkeys(NEU_CLASSES, 300):
        raise DataError(
            f"NEU-DET should have 300 images of each of its six classes, each with an xml; the archive has "
            f"{len(images)} images ({dict(counts)}) and {len(annotations)} xml: fetch it again"
        )
    return ""


DATASET = fetch.DataSet(
    name="NEU-DET",
    folder="neu_det",
    command="python data_scripts/neu_det.py",
    members=(
        rf"(?:.*/)?(?:(?i:(?:jpeg)?images)/(?:[^/]+/)?(?P<IMAGES>{FILE}\.jpg)"
        rf"|(?i:annotations)/(?:[^/]+/)?(?P<ANNOTATIONS>{FILE}\.xml))"
    ),
    sources=(),
    page="http://faculty.neu.edu.cn/songkechen/zh_CN/zdylm/263270/list/",
    licence="none stated; offered for research, the authors ask to be cited",
    citation=(
        "Song, Yan: A noise robust method based on completed local binary patterns for hot-rolled steel strip surface "
        "defects. Applied Surface Science 285, 858-864, 2013; He, Song, Meng, Yan: An end-to-end steel surface defect "
        "detection approach via fusing multiple hierarchical features. IEEE TIM 69(4), 1493-1504, 2020"
    ),
    archive_sha256=("f524ff77c0d06fbd038615dd61c2f7ef51cc7119da4a421420ef2953fedeee15",),
    unpacked_limit=200_000_000,
    fingerprint="6abd8e33a7829fc8bebb2328edfee5c11d6f0de1082b29760e8725d1e76453ad",
    check=_check,
)
main = fetch.script(DATASET, __doc__)


if __name__ == "__main__":
    sys.exit(main())
