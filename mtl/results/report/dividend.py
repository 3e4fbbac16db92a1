"""The dividend: what a freeze saved, against a loop that sets `requires_grad` and runs the whole model all the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtl.results.report.markup import DASH, Html, Piece, joined, left_title, seconds, table, tag, text_cell
from mtl.results.report.run import PhaseSpan, RunFiles

_NOTE = (
    "The estimate of the naive loop is the measured time, plus what computing the features that were read would have"
    " taken: seconds an image, measured in this run. The estimate with nothing frozen is that of the naive loop, times"
    " the ratio of the plan's FLOPs; it takes both to do as many FLOPs a second, and validation to grow alike."
    " mtl bench measures such loops."
)


@dataclass(frozen=True)
class Saving:
    """A phase.

    Attributes:
        train_s: Seconds of training and validation, measured.
        naive_s: The same for a loop that keeps no features, estimated.
        whole_s: The same with nothing frozen and all tasks active, estimated; None without FLOPs.
    """

    train_s: float
    naive_s: float
    whole_s: float | None


def saving_of(span: PhaseSpan, flops: Mapping[str, float] | None) -> Saving | None:
    """The time that a phase saved, in this process; None if the run did not record its times."""
    if span.train_s is None or span.kept is None:
        return None
    kept = span.kept
    is_timed = kept.get("num_computed", 0) > 0
    image_s = kept["compute_s"] / kept["num_computed"] if is_timed else kept.get("image_s", 0.0)
    naive_s = span.train_s + image_s * (kept.get("num_read", 0) - kept.get("num_computed", 0))
    own = (flops["forward"] + flops["backward"]) if flops else 0
    whole = naive_s * (flops["forward_of_all"] + flops["backward_of_all"]) / own if flops and own else None
    return Saving(span.train_s, naive_s, whole)


def dividend_html(run: RunFiles) -> Html:
    plans = {phase["name"]: phase for phase in run.plan.get("phases", ())}
    flops = {name: plan["flops"] for name, plan in plans.items()}
    savings = {span.name: saving_of(span, flops.get(span.name)) for span in run.spans}
    rows: list[list[Piece]] = [
        [span.name, text_cell(_kept_in_words(span.kept)), *_times(savings[span.name]), _share(flops.get(span.name))]
        for span in run.spans
    ]
    known = [each for each in savings.values() if each is not None]
    if not rows:
        return Html()
    total = Saving(
        sum(each.train_s for each in known),
        sum(each.naive_s for each in known),
        None if any(each.whole_s is None for each in known) else sum(each.whole_s or 0 for each in known),
    )
    if len(known) > 1:
        rows.append(["all", text_cell(""), *_times(total), ""])
    header: list[Piece] = ["phase", left_title("computed once"), "measured", "naive loop (estimate)"]
    header += ["nothing frozen (estimate)", "FLOPs saved a step (plan)"]
    if not known:
        missing = "This run did not record what its kept features saved; the plan's FLOPs are all that is known."
        return joined([tag("p", missing), table("Dividend", header, rows)])
    return joined([tag("p", _headline(total)), table("Dividend", header, rows), tag("p", _NOTE, class_="note")])


def _headline(total: Saving) -> Html:
    saved = total.naive_s - total.train_s
    share = saved / total.naive_s if total.naive_s > 0 else 0.0
    if saved <= 0:
        return joined(["Keeping features saved no time in this run (estimate)."])
    words = tag("b", f"{seconds(saved)} saved of {seconds(total.naive_s)} ({share:.0%})")
    return joined(["Estimate: ", words, " against a naive loop with the same freeze."])


def _times(saving: Saving | None) -> list[str]:
    if saving is None:
        return [DASH, DASH, DASH]
    return [seconds(each) for each in (saving.train_s, saving.naive_s, saving.whole_s)]


def _share(flops: Mapping[str, Any] | None) -> str:
    return DASH if flops is None or "saved" not in flops else f"{flops['saved']:.0%}"


def _kept_in_words(kept: Mapping[str, Any] | None) -> str:
    if kept is None:
        return "not recorded"
    if kept.get("kept_in", "off") == "off":
        return "nothing"
    modules = kept["modules"]
    what = f"the first {modules} modules of the trunk" if modules else "the trunk"
    place = "memory" if kept["kept_in"] == "ram" else "disk"
    return f"{what}: {kept['num_computed']:,} images computed, {kept['num_read']:,} read from {place}"
