"""Does the paper add up? Its printed numbers against each other: no run, no data, no network.

Yu, "D3N: Bring the Power of Diffusion Model to Defect Detection", arXiv 2408.13845: Tables I to VII and what sections
IV-B and IV-C say of them. Everything is computed from the numbers in `results/papers/d3n/*.csv`: mAP at IoU 0.5 in per
cent, differences in points. A difference may have an ordinary cause (a slip in a digit, another run); the tables say
what is printed and what follows from it, no more. `results/papers/d3n/audit/points.csv` lists, too, what cannot be
computed.
"""

from collections.abc import Sequence
from functools import cache

import pandas as pd
import torch

from defectlab.metrics import costs
from defectlab.verdicts.audit import SLACK, compared, framed
from defectlab.verdicts.tables import printed_table

DATA = {"NEU-DET": "table6", "Tianchi fabric": "table5", "GC10-DET": "table7"}
FUSED = "dual self-att, weighted sum, residual, norm"  # the last row of Table I
AS_TICKED = "PCA, ResVAE, noise filter, dynamic cross-fusion (as ticked)"  # the last row of Table III
CLASSES = {"Tianchi fabric": 9, "as published": 80}  # the paper's selection of types (section IV-A); COCO


@cache
def _numbers(table: str) -> dict[tuple[str, str], float]:
    """(metric, row) -> the printed number, in the file's order."""
    lines = [line for line in printed_table("d3n", table) if line["value"]]
    return {(line["metric"], line["row"]): float(line["value"]) for line in lines}


def printed(table: str, row: str, metric: str = "map50") -> float:
    """One printed number, in per cent or a cost's unit. ValueError where there is none at that place."""
    if (metric, row) not in _numbers(table):
        raise ValueError(f"d3n/{table}.csv prints no {metric} for row {row!r}")
    return _numbers(table)[metric, row]


def _rows(table: str, metric: str = "map50") -> dict[str, float]:
    return {row: value for (of, row), value in _numbers(table).items() if of == metric}


# --- Said in the text, or twice in the tables ------------------------------------------------------------------------


def stated_gains() -> pd.DataFrame:
    """What the text says of the tables against the tables: levels, and differences of two printed numbers."""
    lines = []
    for said in printed_table("d3n", "audit/text_gains"):
        follows = printed(said["a_table"], said["a_row"])
        follows -= printed(said["b_table"], said["b_row"]) if said["b_row"] else 0
        line = {"statement": said["statement"], "place": said["place"]}
        lines.append({**line, **compared(float(said["printed"]), follows), "note": said["note"]})
    return framed(lines, "statement", "place")


HYBRID = ("table1", FUSED)
TWICE = (  # what, whether one model or two, the first place (table, row), the second
    ("hybrid, Tables I and II", "one model", HYBRID, ("table2", "Dynamic cross-fusion")),
    ("hybrid, Tables I and III", "one model", HYBRID, ("table3", AS_TICKED)),
    ("hybrid, Table I, and student, Table VI", "two models", HYBRID, ("table6", "Ours")),
    (
        "weighted sum with residual, Table I, and weighted sum, Table II",
        "two models",
        ("table1", "weighted sum, residual"),
        ("table2", "Weighted sum"),
    ),
    (
        "noise filter without dynamic fusion, Table III, and sum, Table II",
        "one model if Table III sums",
        ("table3", "ResVAE, noise filter"),
        ("table2", "Sum"),
    ),
)


def printed_twice() -> pd.DataFrame:
    """Numbers that stand in two places: `printed` and `elsewhere`, and whether they are of one model by the text."""
    lines = [{"number": name, "of": of, **compared(printed(*a), printed(*b))} for name, of, a, b in TWICE]
    return framed(lines, "number").rename(columns={"computed": "elsewhere"})


# --- Ablations: Tables I to IV ---------------------------------------------------------------------------------------


def fusion_steps() -> pd.DataFrame:
    """Table I: mAP, what each row changes over the row above and over cross-attention alone (the first), in points."""
    values = pd.Series(_rows("table1"), name="map50").rename_axis("components")
    return pd.DataFrame({"map50": values, "step": values.diff(), "over_first": values - values.iloc[0]}).round(2)


def fusions() -> pd.DataFrame:
    """Every printed fusion of Tables I and II, the highest first: points over YOLOv5s (Table VI) and over the sum."""
    baseline, plain = printed("table6", "YOLOv5s"), printed("table2", "Sum")
    lines = [
        {"fusion": row, "table": table, "map50": value, "over_yolov5s": value - baseline, "over_sum": value - plain}
        for table in ("table1", "table2")
        for row, value in _rows(table).items()
    ]
    return framed(sorted(lines, key=lambda line: -line["map50"]), "fusion")


def third_row_fusion() -> pd.DataFrame:
    """Which fusion the third row of Table III (ResVAE, noise filter, no dynamic fusion) can have: it against every
    other fusion of Table II and against cross-attention alone; `difference` is that row less the fusion."""
    row = printed("table3", "ResVAE, noise filter")
    others = {x: value for x, value in _rows("table2").items() if x != "Dynamic cross-fusion"}
    others["Cross-attention alone (Table I)"] = next(iter(_rows("table1").values()))
    lines = [{"fusion": x, **compared(row, value)} for x, value in others.items()]
    return framed(lines, "fusion").rename(columns={"computed": "of_the_fusion"})


def component_steps() -> pd.DataFrame:
    """Table III from YOLOv5s (Table VI) on: mAP, change over the row above and over YOLOv5s, in points."""
    rows = {"YOLOv5s (Table VI)": printed("table6", "YOLOv5s"), **_rows("table3")}
    values = pd.Series(rows).rename_axis("components")
    return pd.DataFrame({"map50": values, "step": values.diff(), "over_yolov5s": values - values.iloc[0]}).round(2)


def multitask() -> pd.DataFrame:
    """Table IV: precision, recall and mAP50 of boxes and masks, in per cent, and what the method changes."""
    lines = [
        {"metric": metric, "YOLOv5": value, "Proposed": printed("table4", "Proposed", metric)}
        for (metric, row), value in _numbers("table4").items()
        if row == "YOLOv5"
    ]
    return framed(lines, "metric").assign(gain=lambda table: (table["Proposed"] - table["YOLOv5"]).round(2))


# --- Comparisons: Tables V to VII ------------------------------------------------------------------------------------


def gains_over_yolov5s() -> pd.DataFrame:
    """The gain of the method over YOLOv5s on each data set; NaN where no YOLOv5s is printed (GC10-DET)."""
    lines = []
    for data, table in DATA.items():
        baseline = next((value for row, value in _rows(table).items() if row in ("YOLOv5s", "YOLOv5-s")), float("nan"))
        ours = printed(table, "Ours")
        lines.append({"data": data, "YOLOv5s": baseline, "ours": ours, "gain": ours - baseline})
    return framed(lines, "data")


def ahead_of_ours(margin: float = 0.0) -> pd.DataFrame:
    """Methods of Tables V to VII whose printed mAP reaches the paper's own on the same data set, or lies at most
    `margin` points below."""
    lines = []
    for data, table in DATA.items():
        ours = printed(table, "Ours")
        for row, value in sorted(_rows(table).items(), key=lambda item: -item[1]):
            if row != "Ours" and ours - value <= margin + SLACK:
                lines.append({"data": data, "method": row, "map50": value, "ours": ours, "difference": ours - value})
    return framed(lines, "data", "method")


def scales() -> pd.DataFrame:
    """YOLO families that are printed in several sizes, smallest first: how mAP goes with size on each data set."""
    lines = []
    for data, table in DATA.items():
        values = {row.replace("-", ""): value for row, value in _rows(table).items()}
        for family in ("YOLOv5", "YOLOX", "YOLOv8"):
            found = {size: values[family + size] for size in "nsml" if family + size in values}
            if len(found) < 2:
                continue
            rising = sorted(found, key=found.get) == list(found)
            falling = sorted(found, key=found.get, reverse=True) == list(found)
            order = "rises" if rising else "falls" if falling else "neither"
            lines.append({"data": data, "family": family, **{x: found.get(x) for x in "nsml"}, "with_size": order})
    return framed(lines, "data", "family")


def es_net() -> pd.DataFrame:
    """ES-Net on the Tianchi fabric: "we have twice the speed and 1/10 the number of parameters of ES-Net, while the
    accuracy is comparable" (section IV-C), from Table V.

    `ratio` is ours over ES-Net's, `said` what the sentence gives. Param is the size of a file, ours at two bytes a
    parameter (`file_sizes`); what ES-Net's file has is not said, hence the parameters in three readings, in millions.
    """
    quantities = [("speed", "fps", 2.0), ("Param", "size_mb", 0.1), ("mAP50", "map50", 1.0)]
    pairs = [(name, [printed("table5", row, m) for row in ("Ours", "ES-Net")], said) for name, m, said in quantities]
    ours, other = pairs[1][1]
    pairs += [(f"parameters, ES-Net's at {b} bytes", [ours / 2, other / b], 0.1) for b in (2, 4, 8)]
    lines = [{"quantity": name, "ours": a, "ES-Net": b, "ratio": a / b, "said": said} for name, (a, b), said in pairs]
    return framed(lines, "quantity")


# --- Costs: Table V against our own detectors ------------------------------------------------------------------------


def _own_yolo(row: str, classes: int) -> torch.nn.Module:
    """The detector of a row such as "YOLOv5-s" as it is trained (not fused), without memory for its weights."""
    from defectlab.networks.yolo.model import Detector  # the other tables need no detector

    with torch.device("meta"):
        return Detector(f"v{row[5]}", row[-1], classes).eval()


def _others(classes: int) -> dict[str, torch.nn.Module]:
    from torchvision.models import detection

    nothing = {"weights": None, "weights_backbone": None}
    with torch.device("meta"):
        return {
            "Faster R-CNN, ResNet-50": detection.fasterrcnn_resnet50_fpn(num_classes=classes + 1, **nothing),
            "RetinaNet, ResNet-50": detection.retinanet_resnet50_fpn(num_classes=classes, **nothing),
        }


YOLOS = tuple(f"YOLOv{family}-{size}" for family in (5, 8) for size in "sml")


def file_sizes() -> pd.DataFrame:
    """Table V's Param ("14.5M") read as the size of a file in MB: the bytes that it has for each parameter of our own
    or torchvision's network (9 classes, as the paper's Tianchi fabric; Faster R-CNN has one more, the background), with
    MB as 10^6 bytes (`bytes`) and as 2^20 bytes (`bytes_mib`).

    Two bytes are weights in half precision; eight are weights and momentum in single precision, as a checkpoint of a
    training has them. Read as a number of parameters Param would be about 2 and 7.6 times what the networks have.
    """
    classes = CLASSES["Tianchi fabric"]
    networks = {row: _own_yolo(row, classes) for row in YOLOS} | _others(classes)
    lines = []
    for row, network in networks.items():
        said, count = printed("table5", row, "size_mb"), costs.parameters(network)
        line = {"row": row, "Param": said, "parameters_m": count / 1e6}
        lines.append({**line, "bytes": said * 1e6 / count, "bytes_mib": said * 2**20 / count})
    return framed(lines, "row")


def model_costs(rows: Sequence[str] = YOLOS) -> pd.DataFrame:
    """Table V's Param and FLOPs (640 px) of YOLOv5 and YOLOv8 against our own detectors with the paper's 9 classes and
    with the 80 of the published models: MB of fp16 weights, and 2 x multiply-accumulates of convolutions in 1e9.

    The printed FLOPs are those of 80 classes; YOLOv5-m's and -l's files are smaller than weights for 80 classes are.
    """
    lines = []
    picture = torch.zeros(1, 3, 640, 640, device="meta")
    for row in rows:
        line = {"row": row, "size_mb": printed("table5", row, "size_mb"), "gflops": printed("table5", row, "gflops")}
        for classes in CLASSES.values():
            network = _own_yolo(row, classes)
            line[f"size_mb_{classes}"] = costs.parameters(network) * 2 / 1e6
            line[f"gflops_{classes}"] = costs.flops(network, picture) / 1e9
        lines.append(line)
    return framed(lines, "row")
