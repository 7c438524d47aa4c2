"""What the lint says: findings by row, and the rules that they come from."""

from collections.abc import Iterable
from dataclasses import dataclass, field

RULES_VERSION = 3
MOST_PER_RULE = 5_000


@dataclass(frozen=True)
class Rule:
    """`reason` is why it matters, `remedy` what to do. `severity` is the usual one, "error" or "warning"."""

    id: str
    severity: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `row` counts from 1; `severity` is "error" or "warning".

    `fix` names a fix of `studio.data.lint.fixes` that is safe here, "" when a person must decide. `others` are the
    first other rows that it is about.
    """

    row: int
    severity: str
    rule: str
    message: str
    fix: str = ""
    others: tuple[int, ...] = ()


@dataclass
class LintResult:
    """Findings by row, at most MOST_PER_RULE of a rule and severity; `counts` (rule -> severity -> number) has all."""

    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def num_errors(self) -> int:
        return sum(numbers.get("error", 0) for numbers in self.counts.values())

    @property
    def num_warnings(self) -> int:
        return sum(numbers.get("warning", 0) for numbers in self.counts.values())

    def add(self, findings: Iterable[Finding], most: int) -> None:
        """Count findings, and keep those within `most`."""
        for finding in findings:
            numbers = self.counts.setdefault(finding.rule, {})
            numbers[finding.severity] = numbers.get(finding.severity, 0) + 1
            if numbers[finding.severity] <= most:
                self.findings.append(finding)

    def sort(self) -> None:
        self.findings.sort(key=lambda finding: (finding.row, finding.severity, finding.rule, finding.message))


def shown_rows(rows: Iterable[int], total: int, most: int = 10) -> str:
    """`3, 5, 8 and 40 more`, of `total` rows."""
    first = list(rows)[:most]
    shown = ", ".join(str(row) for row in first)
    return shown if total <= len(first) else f"{shown} and {total - len(first)} more"


_RULES = (
    Rule("empty_turn", "error", "An empty message teaches the model to say nothing, or to answer nothing.",
         "Write the message, or take the turn out."),
    Rule("role_order", "error", "Templates and training expect an answer after each question.",
         "Put the messages in order, or take the unanswered ones out."),
    Rule("placeholder", "error", "The model would learn to say the placeholder itself.",
         "Put the real value in its place."),
    Rule("rival_name", "error", "The answer teaches the model that it is another assistant.",
         "Write the assistant's own name, or take the row out."),
    Rule("secret", "error", "A trained model can repeat keys and tokens to anyone.",
         "Take the row out, and withdraw the key where it is used."),
    Rule("probe_in_training", "error", "The scorecard would no longer ask what training never showed.",
         "Take the row out of the rows, or the question out of the probes."),
    Rule("template", "error", "The chat template or the tokenizer refuses this row, and the run would stop at it.",
         "Correct the row, or choose another template."),
    Rule("tools", "error",
         "What the template does not write, the model never sees; the call of a tool becomes an empty answer.",
         "Choose a base model whose chat template knows tools, or take these rows out."),
    Rule("image", "error", "The model never sees the image; it would learn to answer as if it had.",
         "Take these rows out; image rows cannot be trained yet."),
    Rule("no_trained_tokens", "warning", "Nothing of the row counts for the loss, so it teaches nothing.",
         "Shorten the question, raise max_length, or look at which turns are trained."),
    Rule("truncated", "warning", "The end of the answer, and the sign that it is over, are cut off.",
         "Raise max_length, or shorten the row."),
    Rule("no_trained_end", "warning", "The model never learns to stop: its answers may go on until they are cut off.",
         "Choose a named template of the model's family, which ends its answers, or another base model."),
    Rule("unfinished_answer", "warning", "The model would learn to stop in the middle of a sentence.",
         "Finish the answer, or cut it back to its last whole sentence."),
    Rule("outer_space", "warning", "Blank characters around an answer are learned as part of it.",
         "Strip them."),
    Rule("mojibake", "warning", "The text was decoded with the wrong encoding; its tokens mean nothing.",
         "Repair the text, or import the file in its true encoding."),
    Rule("control_token", "warning", "A control token stands in the text; it is trained as plain text.",
         "Take it out, unless the row is about such tokens."),
    Rule("other_language", "warning", "The answer is in another language than the question.",
         "See that this is meant."),
    Rule("duplicate", "warning", "A row that is there many times counts as many times in the training.",
         "Keep one of them, and give its source a larger share if it matters."),
    Rule("near_duplicate", "warning", "Rows that say nearly the same add little and are learned by heart.",
         "Keep the best of them."),
    Rule("contradiction", "warning", "The same question has answers that cannot all be right.",
         "Keep the right one."),
)  # fmt: skip
RULES = {rule.id: rule for rule in _RULES}
