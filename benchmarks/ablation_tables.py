"""The paper's tables 1 and 3 to 7: its rows and figures, and what stands for its rows and columns here.

"itg" is the paper's "inability to generation". Figures of the paper are of AudioCaps by VGGish (FAD), PANNs (FD, ISC,
KL) and CLAP, of models of 1.6 billion parameters; nothing here can be compared with them but the order.
"""

from __future__ import annotations

from dataclasses import dataclass

ITG = "itg"
ABSENT = "-"  # the paper gives no figure

# The paper's columns, whether less is better, and the figure of `siren evaluate`, or of the losses, that stands for it.
COLUMNS = {
    "FAD": (True, "FD (aisfx)"),
    "FD": (True, "FD (aisfx)"),
    "ISC": (False, "IS (aisfx)"),
    "KL": (True, "KL (aisfx)"),
    "CLAP": (False, "score (aligner)"),
    "Loss Mean": (True, "Loss Mean"),
    "Loss Ratio": (True, "Loss Ratio"),
}


@dataclass(frozen=True)
class Row:
    """The paper's name of a row, the arm that stands for it, and the paper's figures, one a column."""

    name: str
    arm: str
    paper: tuple[float | str, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper: what it asks, its columns, its rows. `note`: where ours differs in more than scale."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


TABLES = {
    "1": Table(
        "Siren and other language models (the rows trained on the same data)",
        ("FAD", "FD", "ISC", "KL", "CLAP"),
        (
            Row("AudioGen", "1-12-heads", (4.09, 29.65, 7.86, 1.95, 13.24)),
            Row("DelayPattern", "delay-pattern", (2.51, 12.47, 10.62, 1.96, 14.23)),
            Row("Siren", "aligned", (1.35, 10.65, 12.85, 1.33, 24.18)),
        ),
        "The paper's DelayPattern of this size was trained by others on other data, with 4 codebooks.",
    ),
    "3": Table(
        "Single and isolated transformers",
        ("FAD", "FD", "CLAP"),
        (
            Row("Small Single", "1-12-small", (8.22, 40.44, 4.81)),
            Row("Base Single", "1-12", (3.88, 25.18, 7.79)),
            Row("Large Single", "1-12-large", (1.92, 11.12, 15.64)),
            Row("Isolated-Small", "6-2", (1.44, 12.09, 17.07)),
            Row("Isolated-Large", "6-2-large", (1.21, 9.90, 20.24)),
        ),
        "The paper's CLAP of Base Single is 11.43 in its table 6, where 7.79 stands under ISC.",
    ),
    "4": Table(
        "Modules",
        ("FD", "ISC", "CLAP"),
        (
            Row("none", "1-12-heads", (29.65, 7.86, 13.24)),
            Row("isolation", "6-2-none", (ITG, ITG, ITG)),
            Row("+ residual condition", "6-2-residual", (14.66, 8.90, 15.09)),
            Row("+ accumulated condition", "6-2", (12.09, 10.70, 17.07)),
            Row("+ RL alignment", "aligned", (10.65, 12.85, 24.18)),
        ),
    ),
    "5": Table(
        "Conditions between the codes of a frame",
        ("Loss Mean", "Loss Ratio", "FAD"),
        (
            Row("Independent heads", "1-12-heads", (1.19, 1.95, 4.09)),
            Row("Autoregressive", "1-12-residual", (0.88, 2.17, 4.19)),
            Row("Accumulated autoregressive", "1-12", (0.80, 2.15, 3.88)),
            Row("Collaborative", "6-2", (0.29, 1.55, 1.44)),
        ),
    ),
    "6": Table(
        "Transformers and codes of each",
        ("FD", "ISC", "CLAP", "Loss Ratio"),
        (
            Row("1-12", "1-12", (25.18, 7.79, 11.43, 2.15)),
            Row("2-6", "2-6", (23.89, 6.62, 10.84, 2.09)),
            Row("4-3", "4-3", (15.90, 11.03, 13.24, 1.74)),
            Row("6-2", "6-2", (12.09, 10.70, 17.07, 1.55)),
            Row("12-1", "12-1", (ITG, ITG, ITG, ABSENT)),
        ),
    ),
    "7": Table(
        "Reinforcement learning",
        ("CLAP", "ISC", "FD"),
        (
            Row("Anti-causal, 1 model", "aligned", (24.18, 12.85, 10.65)),
            Row("Anti-causal, 2 models", "aligned-two", (25.12, 12.77, 10.80)),
            Row("Causal, 1 model", "aligned-causal", (18.31, 9.55, 12.27)),
        ),
        "The score is the reward that was optimised: the paper's is ImageBind's and CLAP judges, here one model does "
        "both.",
    ),
}
