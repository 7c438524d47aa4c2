"""One evaluation as a page to keep or send: self-contained HTML, or Markdown. Nothing in it is fetched or run."""

import html
import json
from collections.abc import Sequence
from typing import Any

from studio import scores
from studio.scores import ScoreLine
from studio.store.evaluations import Answer, Evaluation

TITLES = {
    "identity": "Knows who it is",
    "leakage": "Says so when nobody asked",
    "retention": "Perplexity on the base's own answers",
    "changed": "General answers that changed",
}
MEANINGS = {
    "identity": "held-out questions about the assistant answered with its name or maker; more is better",
    "leakage": "held-out general questions whose answer brings up that name or maker; less is better",
    "retention": "against the base, on held-out general questions; less is better",
    "changed": "held-out general questions answered in other words than the base's",
}
BREAKDOWNS = {
    "identity_by_intent": "Identity by intent",
    "identity_by_language": "Identity by language",
    "leakage_by_intent": "Leakage by intent",
    "leakage_by_language": "Leakage by language",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --base: #8a8f98; --tuned: #0072b2; --bad: #d55e00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sub, td.faint, .faint { color: var(--faint); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 12rem; }
.met { color: var(--tuned); } .missed { color: var(--bad); font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_MARKDOWN_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]()#+-!|<>~&$"})


def score_rows(evaluation: Evaluation) -> list[list[str]]:
    """[name, base, tuned] in words, one list a score, as tables show them."""
    return [
        [TITLES[line.name], _value(line, line.base), _value(line, line.tuned) + _verdict(line)]
        for line in _lines(evaluation)
    ]


def group_rows(evaluation: Evaluation) -> list[list[str]]:
    """[group, base passes, tuned passes, difference] in words, one list for each group of a suite's probes."""
    return [
        [name, *(_rate(scores.triple(each[side])) for side in ("base", "tuned")), scores.in_words(each["difference"])]
        for name, each in (evaluation.scores.get("groups") or {}).items()
    ]


def not_held(answer: Answer) -> str:
    """The assertions that the answer does not hold or that nobody decided, each with what was found."""
    marks = answer.detail.get("marks") or []
    return " · ".join(f"{each['type']}: {each['why']}" for each in marks if each["passed"] is not True)


def as_html(evaluation: Evaluation, answers: Sequence[Answer]) -> str:
    """The scorecard as one page without outside references; whatever models or people wrote is shown as text."""
    title = f"{evaluation.subject}: scorecard"
    body = f"""<h1>{text(evaluation.subject)}</h1>
<p class="sub">beside its base {text(evaluation.base)} · weights {text(evaluation.weights_hash[:16])}
· {text(evaluation.created_at[:19].replace("T", " "))} UTC</p>
{_scores(_lines(evaluation))}
{_suite_groups(group_rows(evaluation))}
<p class="faint">Values in brackets are 95 % intervals: Wilson's for shares, a bootstrap for perplexity.</p>
{_groups(evaluation.scores)}
{_answers("Failures", [answer for answer in answers if answer.failed], "No probe failed.")}
{_answers("Other answers", [answer for answer in answers if not answer.failed], "There are none.")}
<h2>How it was measured</h2><pre>{text(json.dumps(setting(evaluation), ensure_ascii=False, indent=2))}</pre>
"""
    return page(title, body)


def page(title: str, body: str, style: str = "") -> str:
    """One HTML page that fetches and runs nothing, whatever is in its body."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{text(title)}</title>
<style>{STYLE}{style}</style></head>
<body>
{body}</body></html>
"""


def as_markdown(evaluation: Evaluation, answers: Sequence[Answer]) -> str:
    """The scorecard and its failures in Markdown."""
    rows = [f"| {mark(name)} | {mark(base)} | {mark(tuned)} |" for name, base, tuned in score_rows(evaluation)]
    failures = [_failure(answer) for answer in answers if answer.failed]
    head = [
        f"# {mark(evaluation.subject)}",
        "",
        f"Beside its base {mark(evaluation.base)}, weights `{evaluation.weights_hash[:16]}`, "
        f"{evaluation.created_at[:19]} UTC. Brackets hold 95 % intervals.",
        "",
        *(["| Score | Base | Tuned |", "| --- | --- | --- |"] if rows else []),
    ]
    groups = [f"| {' | '.join(map(mark, row))} |" for row in group_rows(evaluation)]
    if groups:
        rows += ["", "| Probes passed | Base | Tuned | Difference |", "| --- | --- | --- | --- |", *groups]
    tail = ["", "## Failures", "", *(failures or ["No probe failed."]), "", "## How it was measured", ""]
    told = json.dumps(setting(evaluation), ensure_ascii=False, indent=2).replace("```", "'''")
    return "\n".join([*head, *rows, *tail, "```json", told, "```", ""])


def _failure(answer: Answer) -> str:
    lines = [
        f"- **{mark(answer.prompt)}** ({mark(answer.kind)}, {mark(answer.intent)})",
        f"  - base: {mark(answer.base_answer)}",
        f"  - tuned: {mark(answer.answer)}",
    ]
    why = not_held(answer)
    return "\n".join([*lines, f"  - not held: {mark(why)}"] if why else lines)


def _lines(evaluation: Evaluation) -> list[ScoreLine]:
    """All four for the standard probes; of a suite of one's own those that its probes measure."""
    return [line for line in scores.lines(evaluation.scores) if line.num_probes or evaluation.is_standard]


def _scores(lines: Sequence[ScoreLine]) -> str:
    head = "<tr><th>Score</th><th>Base</th><th>Tuned</th><th>Target</th><th>Probes</th><th></th></tr>"
    rows = "".join(_score_row(line) for line in lines)
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if lines else ""


def _suite_groups(rows: Sequence[Sequence[str]]) -> str:
    head = "<tr><th>Probes passed</th><th>Base</th><th>Tuned</th><th>Difference</th></tr>"
    cells = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead>{head}</thead><tbody>{cells}</tbody></table>" if rows else ""


def _score_row(line: ScoreLine) -> str:
    state = {True: '<span class="met">reached</span>', False: '<span class="missed">missed</span>', None: ""}[line.met]
    target = "" if line.target is None else ("at least " if line.higher_is_better else "at most ") + _share(line.target)
    return (
        f"<tr><td>{TITLES[line.name]}<br><span class='faint'>{MEANINGS[line.name]}</span>{_bars(line)}</td>"
        f"<td class='number'>{_value(line, line.base)}</td><td class='number'>{_value(line, line.tuned)}</td>"
        f"<td class='number'>{target}</td><td class='number'>{line.num_probes}</td><td>{state}</td></tr>"
    )


def _bars(line: ScoreLine) -> str:
    """Base and tuned as bars with their intervals, over 0 to 100 %."""
    if line.name == "retention" or line.tuned is None:
        return ""
    rows = [(value, colour) for value, colour in ((line.base, "base"), (line.tuned, "tuned")) if value]
    drawn = "".join(_bar(value, colour, 2 + 12 * number) for number, (value, colour) in enumerate(rows))
    height = 4 + 12 * len(rows)
    label = f"{TITLES[line.name]}: base {_value(line, line.base)}, tuned {_value(line, line.tuned)}"
    return (
        f'<br><svg role="img" aria-label="{text(label)}" width="320" height="{height}" viewBox="0 0 320 {height}">'
        f"{drawn}</svg>"
    )


def _bar(value: tuple[float, float, float], colour: str, top: int) -> str:
    share, low, high = (300 * part for part in value)
    middle = top + 5
    return (
        f'<rect x="0" y="{top}" width="300" height="10" fill="var(--line)" opacity=".5"/>'
        f'<rect x="0" y="{top}" width="{share:.1f}" height="10" fill="var(--{colour})"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="currentColor" stroke-width="1.5"/>'
    )


def _groups(values: dict[str, Any]) -> str:
    """Rates by kind and language of the question, where there is more than one."""
    parts = []
    for key, title in BREAKDOWNS.items():
        rows = [
            f"<tr><td>{text(name)}</td><td class='number'>{_rate(scores.triple(one))}</td>"
            f"<td class='number'>{one['hits']} of {one['total']}</td></tr>"
            for name, one in values.get(key, {}).items()
        ]
        if len(rows) > 1:
            parts.append(f"<h2>{title}</h2><table><tbody>{''.join(rows)}</tbody></table>")
    return "".join(parts)


def _answers(title: str, answers: Sequence[Answer], when_empty: str) -> str:
    if not answers:
        return f"<h2>{title}</h2><p>{when_empty}</p>"
    rows = "".join(
        f"<tr><td class='faint'>{text(answer.kind)}<br>{text(answer.intent)}</td>"
        f"<td class='text'>{text(answer.prompt)}</td><td class='text'>{text(answer.base_answer)}</td>"
        f"<td class='text'>{text(answer.answer)}</td><td class='faint'>{text(not_held(answer))}</td></tr>"
        for answer in answers
    )
    head = "<tr><th></th><th>Asked</th><th>Base</th><th>Tuned</th><th>Not held</th></tr>"
    return f"<h2>{title} ({len(answers)})</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def setting(evaluation: Evaluation) -> dict[str, Any]:
    """What was scored, and how."""
    about = {
        "subject": evaluation.subject,
        "base": evaluation.base,
        "run": evaluation.run_id,
        "step": evaluation.step,
        "weights_sha256": evaluation.weights_hash,
        "datasets": evaluation.dataset,
    }
    return about | evaluation.scores.get("setting", {})


def _verdict(line: ScoreLine) -> str:
    return {True: "", False: "  missed", None: ""}[line.met]


def _value(line: ScoreLine, value: tuple[float, float, float] | None) -> str:
    """'92.3 % [81.0, 97.0]'; perplexity as a change with its sign."""
    if value is None:
        return "–"
    if line.name != "retention":
        return _rate(value)
    if value == (0.0, 0.0, 0.0):
        return "0.0 %"
    return f"{100 * value[0]:+.1f} % [{100 * value[1]:+.1f}, {100 * value[2]:+.1f}]"


def _rate(value: tuple[float, float, float] | None) -> str:
    return "–" if value is None else f"{_share(value[0])} [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def text(value: str) -> str:
    """Text from outside, as HTML that shows it letter by letter."""
    return html.escape(value, quote=True)


def mark(value: str) -> str:
    """Text on one line of Markdown that stays text."""
    return " ".join(value.split()).translate(_MARKDOWN_MARKS)
