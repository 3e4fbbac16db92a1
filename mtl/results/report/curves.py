"""A run over its steps: validation metrics, losses, learning rates, speed."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.results.report.chart import ChartLine, keys_html, line_chart, points
from mtl.results.report.markup import Html, joined, separated, tag
from mtl.results.report.run import PhaseSpan, RunFiles

_BETTER = {"higher": "higher is better", "lower": "lower is better"}


def curves_html(run: RunFiles) -> Html:
    spans = run.spans
    parts = {
        "Validation": _validation(run, spans),
        "Losses": _losses(run, spans),
        "Learning rate and speed": _rates(run, spans),
    }
    shown = [piece for title, charts in parts.items() if charts for piece in (tag("h3", title), charts)]
    if not shown:
        return Html()
    names = separated([f"{number} {span.name}" for number, span in enumerate(spans, 1)], ", ")
    return joined([tag("p", "Over optimizer steps; bands and numbers are phases: ", names, ".", class_="note"), *shown])


def _charts(charts: Sequence[Html]) -> Html:
    shown = [chart for chart in charts if chart]
    return tag("div", *shown, class_="charts") if shown else Html()


def _validation(run: RunFiles, spans: Sequence[PhaseSpan]) -> Html:
    main, others = list[Html](), list[Html]()
    for task, metrics in run.metrics.items():
        of_task = run.main_metric(task)
        for metric in metrics:
            chart = metric_chart(run, task, metric, spans)
            (main if metric == of_task or of_task is None else others).append(chart)
    more = tag("details", tag("summary", "All other validation metrics"), _charts(others)) if any(others) else None
    return joined([_charts(main), more])


def metric_chart(run: RunFiles, task: str, metric: str, spans: Sequence[PhaseSpan]) -> Html:
    """A validation metric of a task, next to the trivial predictor's."""
    trivial = run.trivial.get(task, {}).get(metric)
    line = ChartLine(metric, points(run.validations, f"val/{task}/{metric}"))
    better = _BETTER.get(run.direction(task, metric) or "", "")
    return line_chart(f"{task} {metric}", [line], spans, better, None if trivial is None else ("trivial", trivial))


def _losses(run: RunFiles, spans: Sequence[PhaseSpan]) -> Html:
    keys = list(dict.fromkeys(key for row in run.steps for key in row if key.startswith("train/loss")))
    titles = {key: key.removeprefix("train/loss/") if key != "train/loss" else "balanced loss" for key in keys}
    charts = [line_chart(title, [ChartLine("loss", points(run.steps, key))], spans) for key, title in titles.items()]
    norm = line_chart("gradient norm", [ChartLine("norm", points(run.steps, "train/grad_norm"))], spans)
    return _charts([*charts, norm])


def _rates(run: RunFiles, spans: Sequence[PhaseSpan]) -> Html:
    keys = list(dict.fromkeys(key for row in run.steps for key in row if key.split("/")[:2] == ["train", "lr"]))
    lines = [
        ChartLine(key.removeprefix("train/lr/") if key != "train/lr" else "highest", points(run.steps, key), number)
        for number, key in enumerate(keys)
    ]
    speed = [ChartLine("images/s", points(run.steps, "perf/images_per_s"), 2)]
    names = keys_html([line.name for line in lines]) if len(lines) > 1 else None
    rate = line_chart("learning rate", lines, spans, "" if len(lines) > 1 else "the highest of any group")
    return joined([names, _charts([rate, line_chart("training images a second", speed, spans)])])
