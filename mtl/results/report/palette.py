"""The colours of a report, light and dark."""

from __future__ import annotations

# By name, the colours of the light and of the dark scheme.
COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#f6f7f8", "#13171b"),
    "card": ("#ffffff", "#1b2026"),
    "text": ("#1c2126", "#e7eaed"),
    "muted": ("#555d67", "#a9b2bc"),
    "rule": ("#dfe3e7", "#343c45"),
    "link": ("#0b5cad", "#7cb8f5"),
    "good": ("#0b6b3c", "#63d297"),
    "bad": ("#b3261e", "#ff938a"),
    "warn": ("#875000", "#f0b862"),
    "shade": ("#eff2f5", "#232a32"),
    "frozen": ("#d9e6f5", "#1e3855"),
    "frozen-text": ("#163a66", "#cfe3fa"),
    "trained": ("#fae3d1", "#4d2c16"),
    "trained-text": ("#6b2f09", "#ffdcc2"),
    "partly": ("#ece6f6", "#38304d"),
    "partly-text": ("#43307a", "#e0d6fb"),
    "idle": ("#eceef0", "#2a3037"),
    "idle-text": ("#545b64", "#adb5be"),
    "cold": ("#8fb8e6", "#2b5f99"),
    "warm": ("#eb9d91", "#9c4438"),
    "line-0": ("#1f5fa8", "#7cb8f5"),
    "line-1": ("#b0480b", "#f5a46b"),
    "line-2": ("#17713c", "#6fd39a"),
    "line-3": ("#7b3fa8", "#cba6f4"),
    "line-4": ("#a8326e", "#f394c2"),
    "line-5": ("#0c6e72", "#5ccdd1"),
    "line-6": ("#755710", "#dcc068"),
    "line-7": ("#525b67", "#b0b9c4"),
}
NUM_LINES = sum(name.startswith("line-") for name in COLOURS)
# A cell of a heat map has at most this share of `cold` or `warm`, so that its text stays legible.
MOST_HEAT = 0.6


def variables(scheme: int) -> str:
    """The colours as CSS variables; 0 is the light scheme, 1 the dark one."""
    return "".join(f"--{name}:{pair[scheme]};" for name, pair in COLOURS.items())
