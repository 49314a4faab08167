"""Fetch one category of MVTec AD into data/mvtec_ad/<category>.

    python data_scripts/mvtec_ad.py --category metal_nut
    python data_scripts/mvtec_ad.py --category metal_nut --archive FILE    the category's archive, or the whole set's
    python data_scripts/mvtec_ad.py --category metal_nut --verify

What is pinned: the number of images of the category as published, and its image size; smaller images are accepted
and called "reduced". The sha256 of the whole set's archive is the one that other open projects print (anomalib for
one). The hashes of the category archives are not known. No address was fetched for this study, and MVTec has moved
its share links before: if they fail, take the archive from the page and pass it with --archive.
"""

import sys
from pathlib import Path

from defectlab.data import fetch
from defectlab.data.images import read_header
from defectlab.files import DataError

# category: (train good, test good, test anomalous, image side, share and file of its archive). The counts and sides
# are those of Bergmann et al., IJCV 129, 2021; they add up to the 3,629 + 467 + 1,258 images of the whole set.
CATEGORIES = {
    "bottle": (209, 20, 63, 900, "150452/132a93367fb17cdf968dfb5c4013f6e7/download/420937370-1629958698"),
    "cable": (224, 58, 92, 1024, "150453/10f960e07fec2838b2cd512586633a32/download/420937413-1629958794"),
    "capsule": (219, 23, 109, 1000, "150454/e0ce6dd74eb150f46c0d98131b3703f2/download/420937454-1629958872"),
    "carpet": (280, 28, 89, 1024, "150455/eac7fbce84d93a5094e13f391170eca4/download/420937484-1629959013"),
    "grid": (264, 21, 57, 1024, "150456/bb0b2e3dc804ccb8b4485e01f8e4493b/download/420937487-1629959044"),
    "hazelnut": (391, 40, 70, 1024, "150457/51d49f65e84bdc100ff8035d7dd783ea/download/420937545-1629959162"),
    "leather": (245, 32, 92, 1024, "150458/923030ce14e10a7d147e95d0f8885f6b/download/420937607-1629959262"),
    "metal_nut": (220, 22, 93, 700, "150459/c68856a21dca589b0f8ff6d4ee0f18f4/download/420937637-1629959294"),
    "pill": (267, 26, 141, 800, "150460/d4f1c04da67034ccc8d8b5fa3e73f244/download/420938129-1629960351"),
    "screw": (320, 41, 119, 1024, "150461/242f454cc6385e5693c4fd4b94567d1e/download/420938130-1629960389"),
    "tile": (230, 33, 84, 840, "150462/5479f0fdc97bc6fa16eab0cb0cf0109f/download/420938133-1629960456"),
    "toothbrush": (60, 12, 30, 1024, "150463/895a1a5fb84b958f07417784b060434b/download/420938134-1629960477"),
    "transistor": (213, 60, 40, 1024, "150464/99b8ea0332438d64fcc2475ee73f9c29/download/420938166-1629960554"),
    "wood": (247, 19, 60, 1024, "150465/d5b4115b720cdb54d217e75636e6e374/download/420938383-1629960649"),
    "zipper": (240, 32, 119, 1024, "150466/bd155b557520edaf692d9bfdb915c24a/download/420938385-1629960680"),
}
SHARES = "https://www.mydrive.ch/shares"  # where MVTec's download page leads
WHOLE = "mvtec_anomaly_detection.tar.xz"
WHOLE_SIZE = 5_264_982_680
WHOLE_SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
WHOLE_ADDRESSES = (
    f"{SHARES}/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/{WHOLE}",
    f"https://huggingface.co/datasets/micguida1/mvtech_anomaly_detection/resolve/main/{WHOLE}",
)


def _check(folder: Path, category: str) -> str:
    """DataError unless the folder holds as many images as published; "reduced" if they are smaller."""
    expected, side = CATEGORIES[category][:3], CATEGORIES[category][3]
    images = [path for path in folder.glob("t*/*/*") if path.suffix in (".png", ".jpg")]
    train = [path for path in images if path.parent.parent.name == "train"]
    good = [path for path in images if path.parent.parent.name == "test" and path.parent.name == "good"]
    got = (len(train), len(good), len(images) - len(train) - len(good))
    masks = len(list(folder.glob("ground_truth/*/*_mask.png")))
    if got != expected or masks != expected[2]:
        raise DataError(
            f"MVTec AD {category} should have {expected} train, good and anomalous test images and {expected[2]} "
            f"masks, the archive has {got} and {masks}: fetch it again"
        )
    return "reduced" if max(read_header(train[0], "fetch it again")[:2]) < side else ""


def dataset(category: str) -> fetch.DataSet:
    """The description of one of the 15 categories."""
    files = r"(?:train|test|ground_truth)/[^/]+/(?!\.)[^/]+\.(?:png|jpg)|license\.txt|readme\.txt"
    return fetch.DataSet(
        name=f"MVTec AD {category}",
        folder=f"mvtec_ad/{category}",
        command=f"python data_scripts/mvtec_ad.py --category {category}",
        members=rf"(?:.*/)?{category}/(?P<path>{files})",
        sources=(
            fetch.Source(f"{SHARES}/{CATEGORIES[category][4]}/{category}.tar.xz", size=1_000_000_000),
            *(fetch.Source(url, WHOLE_SHA256, WHOLE_SIZE) for url in WHOLE_ADDRESSES),
        ),
        page="https://www.mvtec.com/company/research/datasets/mvtec-ad",
        licence="CC BY-NC-SA 4.0 (no commercial use)",
        citation="Bergmann et al.: The MVTec Anomaly Detection Dataset. IJCV 129, 1038-1059, 2021",
        # metal_nut with images of 512 instead of 700 pixels (Lanczos, JPEG quality 95)
        archive_sha256=("63cfaa8826524f2f2e7833cf243b881e3831180772c7e409e2f52812dfe309d8",)
        if category == "metal_nut"
        else (),
        unpacked_limit=4 * 2**30,
        check=lambda folder: _check(folder, category),
    )


def main(argv: list[str] | None = None) -> int:
    parser = fetch.argument_parser(__doc__)
    parser.add_argument("--category", required=True, choices=sorted(CATEGORIES))
    options = parser.parse_args(argv)
    return fetch.run(dataset(options.category), options)


if __name__ == "__main__":
    sys.exit(main())
