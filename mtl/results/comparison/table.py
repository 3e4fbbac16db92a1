"""The tables of a comparison: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterator, Sequence

from mtl.results.comparison.collect import Comparison, Measured, Method, mean_values
from mtl.results.comparison.design import SINGLE_TASK
from mtl.results.comparison.statistics import LEAST_FOR_P, Metric, paired, spread
from mtl.runtime.layout import table, wrap_text

_NONE = "-"
# The seeds from which on a bootstrap's interval is taken without a word.
_FEW_SEEDS = 8
_PLUS_MINUS = "\u00b1"


def columns(found: Comparison) -> list[Metric]:
    """The main metrics, which tables show; the CSV file has all."""
    return [metric for metric in found.metrics if metric.is_main]


def head(found: Comparison) -> list[str]:
    """The titles of the table's columns, with the direction of each."""
    own = [f"{metric.task} {metric.name} {_arrow(metric.is_higher)}" for metric in columns(found)]
    deltas = ["Δm per task % ↑", "Δm flat % ↓", "Δp % ↑"]
    rest = ["mean rank ↓", "steps", "train s", "images/s"]
    return ["method", "tuned over", "seeds", *own, "val/score ↑", *deltas, *rest]


def rows(found: Comparison) -> list[list[str]]:
    """A row for each method: means over seeds and standard deviations."""
    return [_row(found, method) for method in found.methods]


def _row(found: Comparison, method: Method) -> list[str]:
    def over(values: Sequence[float], digits: int) -> str:
        mean, deviation = spread(values)
        if not math.isfinite(mean):
            return _NONE
        return f"{mean:.{digits}f}" + (f" {_PLUS_MINUS} {deviation:.{digits}f}" if math.isfinite(deviation) else "")

    runs = method.runs
    own = [over([run.values.get((m.task, m.name), math.nan) for run in runs], 4) for m in columns(found)]
    is_base = method.name == found.baseline
    deltas = [method.delta.per_task, method.delta.flat, method.delta.by_task]
    shown = [_NONE if is_base or not math.isfinite(delta) else f"{delta:+.2f}" for delta in deltas]
    name = f"{method.name} ({', '.join(method.setting)})" if method.setting else method.name
    return [
        name + ("" if all(run.is_clean for run in runs) else " (audit: violations)"),
        str(method.num_settings),
        str(len(runs)),
        *own,
        over([run.score for run in runs], 4),
        *shown,
        f"{method.mean_rank:.2f}",
        over([run.steps for run in runs], 0),
        over([run.train_s for run in runs], 1),
        over([run.images_per_s for run in runs], 0),
    ]


def paired_rows(found: Comparison) -> list[list[str]]:
    """The differences of each method to the first configuration, seed by seed."""
    by_name = {method.name: method for method in found.methods}
    reference = by_name[found.reference]
    rows = []
    for method in found.methods:
        if method.name in (found.reference, SINGLE_TASK):
            continue
        seeds = [(_of_seed(method, run.job.seed), run) for run in reference.runs]
        for metric in [*columns(found), None]:
            pairs = [(_value(one, metric), _value(other, metric)) for one, other in seeds]
            result = paired([one for one, _ in pairs], [other for _, other in pairs])
            interval = f"[{result.low:+.4f}, {result.high:+.4f}]" if math.isfinite(result.low) else _NONE
            if result.p_value is not None:
                p_value = f"{result.p_value:.3f}"
            else:
                p_value = f"needs {LEAST_FOR_P} seeds" if len(pairs) < LEAST_FOR_P else _NONE
            mean = f"{result.mean:+.4f}" if math.isfinite(result.mean) else _NONE
            title = "val/score ↑" if metric is None else f"{metric.task} {metric.name} {_arrow(metric.is_higher)}"
            rows.append([method.name, title, mean, interval, p_value])
    return rows


PAIRED_HEAD = ["method", "metric", "mean difference", "95 % interval", "p"]


def notes(found: Comparison) -> list[str]:
    """What the table's columns are, and how its numbers were chosen."""
    chosen = "the last validation of each run"
    if found.equal is not None:
        limit = f"{found.limit:.0f} s of training" if found.equal == "time" else f"{found.limit:,.0f} steps"
        chosen = f"the last validation within {limit}, in which all runs of the shortest configuration ended"
    own = [
        f"Numbers are of {chosen}: mean {_PLUS_MINUS} standard deviation (n - 1) over seeds.",
        f"Δm and Δp are relative to {found.baseline}: Δm per task, the mean gain in the tasks' main metrics (Maninis et"
        " al.); Δm flat, the mean loss over all metrics (Nash-MTL, FAMO); Δp, gains averaged within tasks, then over"
        " tasks (LibMTL).",
        "Mean rank: over all metrics of all tasks.",
        f"Paired differences are to {found.reference}, seed by seed, with a percentile bootstrap over seeds (10,000"
        f" resamples); p of a sign-flip test, of {LEAST_FOR_P} seeds or more.",
        "Train s: seconds of training, validation and checkpoints included. Images/s: of the steps alone.",
    ]
    num_seeds = len(found.methods[0].runs)
    if 1 < num_seeds < _FEW_SEEDS:
        own.append(
            f"A bootstrap over {num_seeds} seeds cannot leave the range of their differences: the interval is narrower"
            " than 95 % would be."
        )
    own += [*_notes_on_cost(found), *_notes_on_choice(found)]
    if num_seeds < 3:
        own.append("Fewer than three seeds say little about spread.")
    return own


def _notes_on_cost(found: Comparison) -> Iterator[str]:
    runs = [run for method in found.methods if method.name != SINGLE_TASK for run in method.runs]
    if found.equal is None and len({run.steps for run in runs}) > 1:
        yield "The configurations do not have the same number of steps: what they reach is not at equal cost."
    if found.equal is not None:
        yield "A run that is cut was not at the end of its learning-rate schedule, unless the rate is constant."
    if early := [run.job.name for run in runs if not run.steps]:
        yield f"No validation within that limit: {', '.join(early)}."
    if found.baseline == SINGLE_TASK:
        whole = "" if found.equal is None else ", whole"
        yield f"single-task: a run for each task{whole}, steps and time added up; val/score is the mean of theirs."


def _notes_on_choice(found: Comparison) -> Iterator[str]:
    numbers = {method.num_settings for method in found.methods}
    if max(numbers) > 1:
        yield "Tuned over: settings of the same grid, chosen by the mean val/score on the data that the table reports."
    if len(numbers) > 1:
        yield "Not all are tuned over the same number: a setting that failed, or that changes nothing, does not count."
    if found.failed:
        yield f"Failed, and left out with the other seeds of their settings: {', '.join(found.failed)}."


def markdown(found: Comparison) -> str:
    """The tables and notes as Markdown."""
    parts = [_grid(head(found), rows(found))]
    if differences := paired_rows(found):
        parts.append(_grid(PAIRED_HEAD, differences))
    parts.append("\n".join(f"- {note}" for note in notes(found)))
    return "\n\n".join(parts) + "\n"


def _grid(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    shown = [[cell.replace("|", "\\|") for cell in line] for line in [titles, *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [shown[0], ["---"] * len(titles), *shown[1:]])


def in_words(found: Comparison, width: int | None) -> str:
    """The tables and notes for a terminal.

    Args:
        found: The numbers.
        width: Its columns; None for any.
    """
    lines, differences = rows(found), paired_rows(found)
    parts = [table(head(found), lines, range(1, len(lines[0])), width)]
    if differences:
        parts.append(table(PAIRED_HEAD, differences, range(2, len(PAIRED_HEAD)), width, keys=2))
    parts.append("\n".join(f"- {wrap_text(note, width, 2)}" for note in notes(found)))
    return "\n\n".join(parts)


def latex(found: Comparison) -> str:
    """The tables as `tabular`, of plain LaTeX: no package is needed."""
    differences = paired_rows(found)
    parts = [_tabular(head(found), rows(found)), *([_tabular(PAIRED_HEAD, differences)] if differences else [])]
    return "\n".join(parts)


def _tabular(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [" & ".join(map(_in_latex, line)) + r" \\" for line in lines]
    return "\n".join(
        [
            f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
            r"\hline",
            " & ".join(map(_in_latex, titles)) + r" \\",
            r"\hline",
            *body,
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "Δ": r"$\Delta$",
    "|": r"$|$",
    "<": r"$<$",
    ">": r"$>$",
    '"': r"\textquotedblright{}",
    _PLUS_MINUS: r"$\pm$",
    **{each: f"\\{each}" for each in "&%$#_"},
}


# Greek capitals that look like Latin ones have no command.
_GREEK = {"GREEK SMALL": str.lower, "GREEK CAPITAL": str.capitalize}
_GREEK_COMMANDS = {"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "mu", "nu"}
_GREEK_COMMANDS |= {"xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"}


def _in_latex(text: str) -> str:
    return "".join(letter if letter.isascii() and letter not in _LATEX else _letter_in_latex(letter) for letter in text)


def _letter_in_latex(letter: str) -> str:
    if letter in _LATEX:
        return _LATEX[letter]
    kind, _, name = unicodedata.name(letter, "").rpartition(" LETTER ")
    if kind in _GREEK and name.lower() in _GREEK_COMMANDS:
        return f"$\\{_GREEK[kind](name)}$"
    # Of letters with accents, the letters; of all others, their numbers.
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or f"U+{ord(letter):04X}"


def as_csv(found: Comparison) -> str:
    """A row for each run, those of settings that were not chosen too, with all metrics."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = list(dict.fromkeys(key for run in found.every for key in run.values))
    fixed = ["run", "method", "setting", "task", "seed", "val/score", "val/best_score", "steps", "train_s"]
    writer.writerow([*fixed, "images_per_s", "audit_ok", *(f"val/{task}/{name}" for task, name in keys)])
    for run in found.every:
        job = run.job
        known = [job.name, job.method, " ".join(job.setting), job.task or "", job.seed, run.score, run.best_score]
        known += [run.steps, run.train_s, run.images_per_s, run.is_clean]
        writer.writerow([*known, *(run.values.get(key, "") for key in keys)])
    return out.getvalue()


def points(found: Comparison) -> Iterator[tuple[str, str, list[float], float]]:
    """What the figure shows: panel, method, values by seed, their mean."""
    for metric in [*columns(found), None]:
        title = "val/score ↑" if metric is None else f"{metric.task} {metric.name} {_arrow(metric.is_higher)}"
        for method in found.methods:
            values = [_value(run, metric) for run in method.runs]
            means = mean_values(method.runs, found.metrics)
            mean = sum(values) / len(values) if metric is None else means[metric.task, metric.name]
            yield title, method.name, values, mean


def _of_seed(method: Method, seed: int) -> Measured:
    return next(run for run in method.runs if run.job.seed == seed)


def _value(run: Measured, metric: Metric | None) -> float:
    return run.score if metric is None else run.values.get((metric.task, metric.name), math.nan)


def _arrow(is_higher: bool) -> str:
    return "↑" if is_higher else "↓"
