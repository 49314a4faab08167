"""Does the paper add up? Its printed numbers against each other: no run, no network.

Guo, Lv, Machines 2025, 13(8), 712, doi 10.3390/machines13080712. Everything is computed from the numbers in
`results/papers/amam_kd/*.csv`: metrics in per cent, differences in points. A difference may have an ordinary cause (a
slip in a digit, another run); the tables say what is printed and what follows from it, no more.
"""

from functools import cache

import numpy as np
import pandas as pd

from defectlab.verdicts.audit import ROUNDING, SLACK, compared, framed
from defectlab.verdicts.tables import printed_table

METHODS = ("SPADE", "PaDiM", "RIAD", "CutPaste", "Ours")  # the columns of Table 7
TARGET = "nut"  # Tables 2, 4, 5 and 6 stand twice in the files, once a target, with the same printed numbers


@cache
def _numbers(table: str) -> dict[tuple[str, str, str], float]:
    """(metric, row, column) -> the printed number, in the file's order; of rows that stand twice the first, without
    its target."""
    lines = [line for line in printed_table("amam_kd", table) if line["value"]]
    return {
        (line["metric"], line["row"].removesuffix(f"; {TARGET}"), line["column"]): float(line["value"])
        for line in lines
    }


def printed(metric: str, table: str, row: str, column: str = "all") -> float:
    """One printed number, in per cent or ms. ValueError where there is none at that place."""
    if (metric, row, column) not in _numbers(table):
        raise ValueError(f"amam_kd/{table}.csv prints no {metric} for row {row!r}, column {column!r}")
    return _numbers(table)[metric, row, column]


def _rows(table: str, metric: str) -> list[str]:
    return [row for of, row, _ in _numbers(table) if of == metric and not row.endswith("; defect")]


# --- Said in the text, or twice in the tables ------------------------------------------------------------------------


def stated_gains() -> pd.DataFrame:
    """Gains that the text states against the difference of the two printed numbers they name; `relative` is that
    difference in per cent of the smaller number."""
    lines = []
    for gain in printed_table("amam_kd", "audit/text_gains"):
        if gain["b_row"]:
            a, b = (printed(gain["metric"], gain[f"{side}_table"], gain[f"{side}_row"]) for side in "ab")
            line = {"statement": gain["statement"], "place": gain["place"], **compared(float(gain["printed"]), a - b)}
            lines.append({**line, "relative": 100 * (a - b) / b, "note": gain["note"]})
    return framed(lines, "statement", "place")


FULL_MODEL, GATES = "Ours (gates on three skips, AMAM)", "Baseline with attention (gates on three skips)"  # of Table 5
FULL_METHOD = (("table8", "WResNet50"), ("table9", "Pre + MFF + ViT + Res"))
TWICE = (  # what, metric, the first place (table, row, column), the second
    ("full model, Tables 4 and 5", "miou", ("table4", "Ours"), ("table5", FULL_MODEL)),
    ("full model, Tables 4 and 2", "miou", ("table4", "Ours"), ("table2", "4, 8, 12, 16")),
    ("U-Net, Tables 4 and 5", "miou", ("table4", "U-Net"), ("table5", "Baseline with U-Net (plain skips)")),
    ("full method, Tables 8 and 9", "image_auroc", *FULL_METHOD),
    ("full method, Tables 8 and 9", "pixel_auroc", *FULL_METHOD),
    *(
        (f"full method, {column}, Tables 7 and {number}", "pixel_auroc", ("table7", "Ours", column), (*other, column))
        for column in ("textures_average", "objects_average")
        for number, other in ((10, ("table10", "cosine similarity")), (11, ("table11", "1 × 1")))
    ),
    ("metal nut, Table 7 and section 4.3", "pixel_auroc", ("table7", "Ours", "metal_nut"), ("text", "one stage")),
    ("metal nut, sections 4.3 and 4.2.2", "pixel_auroc", ("text", "one stage"), ("text", "heterogeneous student")),
)


def printed_twice() -> pd.DataFrame:
    """What should be one number and stands in two places: `printed` and `elsewhere`."""
    lines = [{"number": x, "metric": m, **compared(printed(m, *a), printed(m, *b))} for x, m, a, b in TWICE]
    return framed(lines, "number", "metric").rename(columns={"computed": "elsewhere"})


# --- Segmentation: Tables 2, 4 and 6 ---------------------------------------------------------------------------------


def latency_by_dilation() -> pd.DataFrame:
    """Table 2 in the order of its dilation rates; `step` is the change of the latency to the line above, in ms."""
    rows = sorted(_rows("table2", "miou"), key=lambda rates: [int(rate) for rate in rates.split(",")])
    lines = [{"rates": row, **{m: printed(m, "table2", row) for m in ("miou", "latency_ms")}} for row in rows]
    return framed(lines, "rates").assign(step=lambda table: table["latency_ms"].diff().round(2))


def dice_and_iou() -> pd.DataFrame:
    """Table 4's mDic against the foreground IoU and the Dice that its mIoU and MAE imply.

    Dice = 2 IoU / (1 + IoU) is never below IoU of the same masks, yet mDic < mIoU in each row. With mIoU the mean over
    foreground and background, and a background IoU of about 100 - MAE (a small foreground), the foreground IoU is
    2 mIoU - (100 - MAE): the column `computed`; `dice` is what it makes as Dice.
    """
    lines = []
    for model in _rows("table4", "dice"):
        mae, said, miou = (printed(metric, "table4", model) for metric in ("mae", "dice", "miou"))
        iou = 2 * miou - (100 - mae)
        dice = 200 * iou / (100 + iou)
        remark = "nearer to the foreground IoU" if abs(said - iou) < abs(said - dice) else "nearer to the Dice"
        line = {"printed": said, "computed": iou, "difference": said - iou, "remark": remark}
        lines.append({"model": model, "miou": miou, **line, "dice": dice})
    return framed(lines, "model")


def foreground_share(mae: float, iou: float) -> float:
    """The share of foreground pixels (mean of truth and prediction) that a MAE and a foreground IoU imply; all in per
    cent, for hard masks and an IoU over the data set.

    With t and p the shares of truth and prediction: MAE = t + p - 2 overlap and Dice = 2 overlap / (t + p).
    """
    return mae / (2 * (1 - 2 * iou / (100 + iou)))


def expected_mae(share: float, iou: float) -> float:
    """The inverse of `foreground_share`: the MAE, in per cent, of a foreground with this share of the pixels."""
    return 2 * share * (1 - 2 * iou / (100 + iou))


def implied_foreground() -> pd.DataFrame:
    """How much of the picture Table 4 segmented: `foreground_share` with mDic read as the foreground IoU, and the range
    that the rounding of the MAE leaves; `mae_of_a_third` is the MAE if the foreground filled a third of the picture."""
    lines = []
    for model in _rows("table4", "mae"):
        mae, iou = (printed(metric, "table4", model) for metric in ("mae", "dice"))
        low, share, high = (foreground_share(x, iou) for x in (mae - ROUNDING, mae, mae + ROUNDING))
        line = {"model": model, "mae": mae, "iou": iou, "share": share, "low": low, "high": high}
        lines.append({**line, "mae_of_a_third": expected_mae(100 / 3, iou)})
    return framed(lines, "model")


def data_reduction() -> pd.DataFrame:
    """Table 6, the full training set from Table 5: mIoU without and with AMAM, the gain, and what each growth of the
    training set is worth (`step`: points over the line above)."""
    cells = {share: [("table6", f"{share} %, {x} AMAM") for x in ("without", "with")] for share in (10, 20, 50)}
    cells[100] = [("table5", GATES), ("table5", FULL_MODEL)]
    values = {share: [printed("miou", *place) for place in pair] for share, pair in cells.items()}
    table = pd.DataFrame.from_dict(values, orient="index", columns=["without", "with"]).rename_axis("share (%)")
    return table.assign(gain=table["with"] - table["without"]).join(table.diff().add_prefix("step_")).round(2)


def separable_share(channels: int, taps: int = 9) -> float:
    """Parameters of a depthwise separable convolution over those of a standard one with `channels` outputs. The text's
    "one-third" (section 3.1.2) is that of 3 taps (3 × 1), not of 9 (3 × 3)."""
    return 1 / channels + 1 / taps


# --- Anomaly detection: Tables 7, 8, 9 and 10 ------------------------------------------------------------------------


def _table7(method: str) -> dict[str, float]:
    """Column (5 textures, their average, 10 objects, their average, the total) -> the printed pixel AUROC."""
    return {column: value for (_, row, column), value in _numbers("table7").items() if row == method}


def table7_averages() -> pd.DataFrame:
    """Table 7's averages against the means of their rows. Since the rows are rounded too, a mean within 0.1 of the
    printed one can be rounding alone."""
    lines = []
    for method in METHODS:
        values = _table7(method)
        categories = [column for column in values if not column.endswith("average")]
        members = {"textures": categories[:5], "objects": categories[5:], "total": categories}
        for name, columns in members.items():
            line = compared(values[f"{name}_average"], float(np.mean([values[c] for c in columns])))
            if ROUNDING + SLACK < abs(line["difference"]) <= 2 * ROUNDING + SLACK:
                line["remark"] = "differs, but rounding of the rows can hide it"
            lines.append({"method": method, "average": name, **line})
    return framed(lines, "method", "average")


def mean_lead() -> pd.DataFrame:
    """The stated mean lead over the other methods against the leads in Table 7's total averages: over each method, and
    over their mean."""
    said = next(
        float(gain["printed"]) for gain in printed_table("amam_kd", "audit/text_gains") if gain["id"] == "mean_lead"
    )
    totals = {method: _table7(method)["total_average"] for method in METHODS}
    ours = totals.pop("Ours")
    totals["their mean"] = float(np.mean(list(totals.values())))
    return framed([{"lead over": x, **compared(said, ours - total)} for x, total in totals.items()], "lead over")


def categories_behind() -> pd.DataFrame:
    """Categories of Table 7 in which another method's printed number is above the paper's own."""
    lines = []
    for category, ours in _table7("Ours").items():
        best, method = max((_table7(method)[category], method) for method in METHODS[:-1])
        if best > ours:
            lines.append(
                {"category": category, "method": method, "best": best, "ours": ours, "difference": ours - best}
            )
    return framed(lines, "category")


def against_originals() -> pd.DataFrame:
    """Table 7's columns of other methods against these methods' own papers, where their numbers are at hand."""
    lines = []
    for (_, row, column), value in _numbers("audit/table7_originals").items():
        method = row.split(",")[0]
        if method in METHODS:
            lines.append({"original": row, "column": column, **compared(_table7(method)[column], value)})
    return framed(lines, "original", "column").rename(columns={"computed": "published"})


def image_level() -> pd.DataFrame:
    """The printed image AUROC (AD) of the full method against that of two methods that it is not compared with."""
    lines = []
    for (metric, row, _), value in _numbers("audit/table7_originals").items():
        for table, full in FULL_METHOD if metric == "image_auroc" else ():
            ours = printed(metric, table, full)
            lines.append(
                {"method": row, "AD from": table, "published": value, "ours": ours, "difference": ours - value}
            )
    return framed(lines, "method", "AD from")


def module_steps() -> pd.DataFrame:
    """Table 9: what each added module changes, in points over the line above."""
    levels = ("image_auroc", "pixel_auroc")
    rows = _rows("table9", "image_auroc")
    table = framed([{"modules": row, **{m: printed(m, "table9", row) for m in levels}} for row in rows], "modules")
    return table.join(table.diff().add_prefix("step_")).round(2)


def l2_and_mse() -> pd.DataFrame:
    """Table 10: at each layer L2 and MSE are one loss up to a scale: their `difference` tells of the spread of runs."""
    lines = []
    for column in ("textures_average", "objects_average"):
        squared, mean = (printed("pixel_auroc", "table10", row, column) for row in ("L2", "MSE"))
        lines.append({"average": column, "L2": squared, "MSE": mean, "difference": squared - mean})
    return framed(lines, "average")
