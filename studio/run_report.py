"""Runs beside each other as a page to keep or send: failures first, plots inside, nothing fetched and nothing run.

Charts are static SVG. Plotly's own bundle would add 4.8 MB and need scripts, which the page's policy forbids, so that a
report with somebody's model output in it is safe to open anywhere.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from studio import charts, recommend, report, svg
from studio.charts import Line
from studio.comparison import Change, Comparison
from studio.probes.paired import Interval
from studio.recommend import Candidate, Recommendation
from studio.report import mark, text
from studio.store.evaluations import Answer
from studio.store.records import now

MOST_ANSWERS = 200
CURVES = {
    "train/loss": "Training loss",
    "valid/loss": "Validation loss",
    "probe/identity": "Identity on the way",
    "probe/leakage": "Leakage on the way",
    "train/learning_rate": "Learning rate",
}
TASK_HEADS = ("", "rows", "checkpoint", "base", "tuned", "change")
STYLE = """
figure { display: inline-block; margin: 0 1rem 1rem 0; } svg { max-width: 100%; height: auto; }
svg .axis { fill: currentColor; font: 11px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
.swatch { display: inline-block; margin-right: 1.2rem; } .bad { color: #d1433f; font-weight: 600; }
td.failed::before { content: "✕ "; color: #d1433f; }
"""


def as_html(found: Comparison, project: str, made_at: str = "") -> str:
    """The comparison as one page without outside references; whatever models or people wrote is shown as text."""
    title = f"{project}: {', '.join(run.id for run in found.runs)}"
    body = "".join(
        [
            f"<h1>{text(title)}</h1><p class='sub'>{text(made_at or _minute())} UTC · brackets hold 95 % intervals</p>",
            _advice(found),
            _failures(found),
            _cards(found),
            _tasks(found),
            _planes(found),
            _curves(found),
            _changes("Settings that differ", found.settings, found),
            _changes("Data that differs", found.data, found),
            _measured(found),
        ]
    )
    return report.page(title, body, STYLE)


def as_markdown(found: Comparison, project: str, made_at: str = "") -> str:
    """The same without the plots."""
    names = [run.id for run in found.runs]
    lines = [
        f"# {mark(project)}: {mark(', '.join(names))}",
        "",
        f"{made_at or _minute()} UTC. Brackets hold 95 % intervals.",
        "",
    ]
    lines += [mark(f"{found.recommendation.reason} {found.recommendation.caveat}"), ""]
    lines += [f"- **{mark(told)}**" for told in overfitted(found.recommendation)]
    lines += [f"- {mark(told)}" for told in on_the_way(found.recommendation)]
    lines += ["", f"## Failures ({len(failures(found))})", ""]
    for (kind, prompt), by_run in failures(found)[:MOST_ANSWERS]:
        lines.append(f"- **{mark(prompt)}** ({mark(kind)})")
        lines += [
            f"  - {'failed' if a.failed else 'passed'}, {mark(run)}: {mark(a.answer)}" for run, a in by_run.items()
        ]
    lines += ["", "## Scorecards", "", *_table(["", *names], score_table(found))]
    if found.tasks:
        lines += ["", "## Tasks of lm-evaluation-harness", "", *_table(TASK_HEADS, task_table(found))]
    for title, changes in (("Settings", found.settings), ("Data", found.data)):
        rows = [[change.name, *change.values] for change in changes]
        lines += ["", f"## {title} that differ", "", *(_table(["", *names], rows) if rows else ["None."])]
    return "\n".join([*lines, ""])


def _minute() -> str:
    """The present minute, as 2026-01-31 12:00."""
    return now()[:16].replace("T", " ")


def failures(found: Comparison) -> list[tuple[tuple[str, str], Mapping[str, Answer]]]:
    """Questions that a run of these failed, those that most failed first: ((kind, question), run -> answer)."""
    asked: dict[tuple[str, str], dict[str, Answer]] = {}
    for run in found.runs:
        for answer in found.cards[run.id][1] if run.id in found.cards else ():
            asked.setdefault((answer.kind, answer.prompt), {})[run.id] = answer
    number = {question: sum(answer.failed for answer in by_run.values()) for question, by_run in asked.items()}
    failed = [(question, by_run) for question, by_run in asked.items() if number[question]]
    return sorted(failed, key=lambda pair: (-number[pair[0]], pair[0][0] != "identity"))


def score_table(found: Comparison) -> list[list[str]]:
    """[what, one value a run], one list a line, of the checkpoint of each run that would be taken."""
    scored = {run_id: dict((n, v) for n, _, v in report.score_rows(card[0])) for run_id, card in found.cards.items()}
    names = list(dict.fromkeys(name for rows in scored.values() for name in rows))
    steps = ["checkpoint", *(str(found.cards[run.id][0].step) if run.id in found.cards else "–" for run in found.runs)]
    return [steps] + [[name, *(scored.get(run.id, {}).get(name, "–") for run in found.runs)] for name in names]


def overfitted(advice: Recommendation) -> list[str]:
    """For each run that ended overfitted: that it did, and what its last checkpoint does."""
    return [run.told for run in advice.runs if run.is_overfitted]


def on_the_way(advice: Recommendation) -> list[str]:
    """A sentence for each run that had overfitted checkpoints and did not end so."""
    return [run.sentence for run in advice.runs if run.spoilt and not run.is_overfitted]


def _advice(found: Comparison) -> str:
    told = "".join(f"<li class='bad'>{text(sentence)}</li>" for sentence in overfitted(found.recommendation))
    said = f"{found.recommendation.reason} {found.recommendation.caveat}".rstrip()
    told += "".join(f"<li>{text(sentence)}</li>" for sentence in on_the_way(found.recommendation))
    return f"<p><strong>{text(said)}</strong></p>" + (f"<ul>{told}</ul>" if told else "")


def _failures(found: Comparison) -> str:
    failed = failures(found)
    if not failed:
        return "<h2>Failures</h2><p>No probe failed.</p>"
    heads = "".join(f"<th>{text(run.id)}</th>" for run in found.runs)
    rows = "".join(_failure_row(question, by_run, found) for question, by_run in failed[:MOST_ANSWERS])
    more = f"<p class='faint'>{len(failed) - MOST_ANSWERS} more.</p>" if len(failed) > MOST_ANSWERS else ""
    head = f"<thead><tr><th></th><th>Asked</th><th>Base</th>{heads}</tr></thead>"
    return f"<h2>Failures ({len(failed)})</h2><table>{head}<tbody>{rows}</tbody></table>{more}"


def _failure_row(question: tuple[str, str], by_run: Mapping[str, Answer], found: Comparison) -> str:
    kind, prompt = question
    cells = "".join(_answer(by_run.get(run.id)) for run in found.runs)
    return (
        f"<tr><td class='faint'>{text(kind)}</td><td class='text'>{text(prompt)}</td>"
        f"<td class='text'>{text(_base_answer(by_run))}</td>{cells}</tr>"
    )


def _base_answer(by_run: Mapping[str, Answer]) -> str:
    """What the base said, of each run where that differs: runs may have different bases."""
    said = {run_id: answer.base_answer for run_id, answer in by_run.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "\n".join(f"{run_id}: {answer}" for run_id, answer in said.items())


def _answer(answer: Answer | None) -> str:
    if answer is None:
        return "<td class='faint'>not asked</td>"
    return f"<td class='text{' failed' if answer.failed else ''}'>{text(answer.answer)}</td>"


def _cards(found: Comparison) -> str:
    if not found.cards:
        return "<h2>Scorecards</h2><p>None of these runs is scored.</p>"
    return f"<h2>Scorecards</h2>{_grid(found, score_table(found))}"


def _grid(found: Comparison, rows: Sequence[Sequence[str]]) -> str:
    """A table with one column a run; the first cell of each row is its name."""
    return _cells(["", *(run.id for run in found.runs)], rows)


def _cells(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{text(each)}</th>" for each in heads)
    lines = ("".join(f"<td class='text'>{text(cell or '–')}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def task_table(found: Comparison) -> list[list[str]]:
    """[task, rows, checkpoint, base, tuned, change] of lm-evaluation-harness, one list a metric."""
    return [
        [f"{each.task}, {each.metric}", str(each.num_rows), f"{each.run_id} step {each.step}", *each.figures]
        for each in found.tasks
    ]


def _tasks(found: Comparison) -> str:
    if not found.tasks:
        return ""
    return f"<h2>Tasks of lm-evaluation-harness</h2>{_cells(TASK_HEADS, task_table(found))}"


def _planes(found: Comparison) -> str:
    planes = [
        _plane(found, lambda each: each.leakage, "Leakage: says it unasked"),
        _plane(found, lambda each: each.growth, "Growth of perplexity on what it knew"),
    ]
    if not any(planes):
        return ""
    told = "Top left is best. Numbers are steps, ★ is recommended, ✕ overfitted; the dotted front joins those that no "
    return f"<h2>What was learnt, and what it cost</h2>{''.join(planes)}<p class='faint'>{told}other beats in both.</p>"


def _plane(found: Comparison, cost: Callable[[Candidate], Interval | None], title: str) -> str:
    advice, colors = found.recommendation, _colors(found)
    shown = [each for each in advice.candidates if each.identity and cost(each)]
    front = recommend.pareto(shown, lambda each: (cost(each) or (None,))[0])
    places = [((cost(each) or (0.0,))[0], (each.identity or (0.0,))[0]) for each in front]
    spots = [
        charts.spot(each, cost(each), each == advice.chosen, colors[each.run_id], f"{each.run_id}, step {each.step}")
        for each in shown
    ]
    drawn = svg.tradeoff_chart(spots, places, title, "Identity")
    return f"<figure>{drawn}</figure>" if drawn else ""


def _curves(found: Comparison) -> str:
    colors = _colors(found)
    drawn = [
        svg.line_chart(
            [Line(run.id, lines[run.id], colors[run.id], markers=not name.startswith("train/")) for run in found.runs],
            "Step",
            CURVES[name],
            (lambda value: f"{100 * value:.0f} %") if name.startswith("probe/") else None,
        )
        for name, lines in found.curves.items()
    ]
    if not any(drawn):
        return ""
    return f"<h2>Curves</h2>{_swatches(found)}{''.join(f'<figure>{each}</figure>' for each in drawn if each)}"


def _swatches(found: Comparison) -> str:
    """Which colour is which run."""
    names = (
        f"<span class='swatch'><svg width='22' height='10'><rect width='16' height='10' fill='{color}'/></svg>"
        f"{text(run_id)}</span>"
        for run_id, color in _colors(found).items()
    )
    return f"<p>{''.join(names)}</p>"


def _changes(title: str, changes: Sequence[Change], found: Comparison) -> str:
    rows = [[change.name, *change.values] for change in changes]
    return f"<h2>{title}</h2>{_grid(found, rows) if rows else '<p>None.</p>'}"


def _measured(found: Comparison) -> str:
    settings: dict[str, Any] = {run_id: report.setting(card[0]) for run_id, card in found.cards.items()}
    about = {
        run.id: {"base": run.base, "method": run.method, "state": run.state, "steps": run.step} for run in found.runs
    }
    told = {run_id: values | settings.get(run_id, {}) for run_id, values in about.items()}
    return f"<h2>How it was measured</h2><pre>{text(json.dumps(told, ensure_ascii=False, indent=2))}</pre>"


def _colors(found: Comparison) -> dict[str, str]:
    return {run.id: color for run, color in zip(found.runs, charts.RUN_COLORS, strict=False)}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(mark(head) for head in heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(mark(cell) or '–' for cell in row)} |"
