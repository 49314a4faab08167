"""Which images of the magnetic tiles show one tile, from the files' names, and a split with whole tiles on one side.

Names are exp<exposure>_num_<frame>: a tile was photographed under exposures 1 to 6 (a few also under 0), one after the
other, so its frames lie side by side. That some tiles came back later, names do not tell: `AGAIN` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from defectlab.data.splits import draw_split

GAP = 400  # ours: frames between two exposures of one tile, at most; nearly all have under 60, one has 356
# A frame of each time that a tile was seen, as `leaks.near_duplicates` of all images shows; a test looks again.
# fmt: off
AGAIN = (
    (5874, 5907, 13526), (8676, 9196, 10334), (36246, 36290), (37056, 37243), (53011, 65001),
    (85602, 85781, 86828, 88149), (108719, 108889), (306586, 309352), (320808, 320895), (355636, 358102),
    (306425, 309648), (337646, 349824),  # turned by 180 degrees
)
# fmt: on
TEST = 191  # good tiles to test on in the published split


def tile_groups(names: Iterable[str]) -> dict[str, int]:
    """Name or path of each image -> number of its group, rising by frame. ValueError for a name of another kind.

    By frame, an image joins the first series whose last exposure is below its own and not `GAP` frames past, or else
    begins one. Series that interleave are two tiles photographed in turn; which image is of which is not always
    told by the names, so they are one group.
    """
    shots = []
    for name in names:
        if not (found := re.search(r"exp(\d)_num_(\d+)", name)):
            raise ValueError(f"{name} is no image of a magnetic tile: its name should hold exp<exposure>_num_<frame>")
        shots.append((int(found[2]), int(found[1]), name))
    series: list[list[tuple[int, int, str]]] = []
    for shot in sorted(shots):
        fits = (one for one in series if one[-1][1] < shot[1] and shot[0] - one[-1][0] <= GAP)
        if (own := next(fits, None)) is None:
            series.append([shot])
        else:
            own.append(shot)
    groups: list[list[tuple[int, int, str]]] = []
    for one in series:  # by first frame
        if groups and one[0][0] < max(groups[-1])[0]:
            groups[-1] += one
        else:
            groups.append(one)
    number = {frame: index for index, group in enumerate(groups) for frame, _, _ in group}
    first = {number[f]: number[seen[0]] for seen in AGAIN if seen[0] in number for f in seen if f in number}
    return {name: first.get(number[frame], number[frame]) for frame, _, name in sorted(shots)}


def draw_grouped(names: Iterable[str]) -> list[str]:
    """The good images to train on, sorted, so that no tile is on both sides; about 191 good ones are left to test on.

    `names`: paths of all images of the set, MT_<kind>/Imgs/<name>.jpg. A tile of which any image shows a defect is
    for testing, with its good images; the others are drawn by hash until there are 191.
    """
    group = tile_groups(names)
    defective = {number for name, number in group.items() if not name.startswith("MT_Free/")}
    good = {name: str(number) for name, number in group.items() if name.startswith("MT_Free/")}
    free = {name: number for name, number in good.items() if group[name] not in defective}
    left = max(0, TEST - (len(good) - len(free)))
    test = draw_split(dict.fromkeys(free, "good"), left / len(free), "magnetic_tile grouped", free)
    return sorted(free.keys() - set(test))
