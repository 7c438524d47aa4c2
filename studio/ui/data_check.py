"""What is wrong with a dataset's rows: by rule, why it matters, where, and a fix where one is safe."""

from collections.abc import Callable, Sequence

import streamlit as st

from studio import dataset_checks, models
from studio.data.lint.findings import RULES, Finding, LintResult
from studio.datasets import Dataset
from studio.projects import Project
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.i18n import N_, _, ngettext
from studio.ui.job_panel import job_panel
from studio.ui.told import told
from studio.ui.widgets import guarded, plain

SHOWN_FINDINGS = 500
RULE_WORDS = {
    "empty_turn": N_("Empty message"),
    "role_order": N_("Turns out of order"),
    "placeholder": N_("Placeholder left"),
    "rival_name": N_("Another assistant's name"),
    "secret": N_("Secret"),
    "probe_in_training": N_("Held-out question in the rows"),
    "template": N_("Refused by the chat template"),
    "no_trained_tokens": N_("Nothing is trained"),
    "image": N_("Image rows, which cannot be trained yet"),
    "tools": N_("Tools that the template leaves out"),
    "no_trained_end": N_("Answers have no end"),
    "truncated": N_("Cut at the longest length"),
    "unfinished_answer": N_("Unfinished answer"),
    "outer_space": N_("Blank characters around an answer"),
    "mojibake": N_("Garbled text"),
    "control_token": N_("Control token in the text"),
    "other_language": N_("Answer in another language"),
    "duplicate": N_("Same row again"),
    "near_duplicate": N_("Nearly the same row again"),
    "contradiction": N_("Answers that contradict each other"),
}


def check_view(project: Project, dataset: Dataset) -> None:
    """The findings, worst first. A large dataset is checked in a job, when it is asked for."""
    _whom_it_teaches(project, dataset)
    result = _checked(project, dataset)
    if result is None:
        return
    if not result.counts:
        st.success(_("Checked: nothing is wrong with these rows."), icon=":material/check_circle:")
        return
    errors = ngettext("{number} error", "{number} errors", result.num_errors).format(number=result.num_errors)
    warnings = ngettext("{number} warning", "{number} warnings", result.num_warnings)
    words = f"{errors} · {warnings.format(number=result.num_warnings)}"
    icon = ":material/error:" if result.num_errors else ":material/warning:"
    (st.error if result.num_errors else st.warning)(words, icon=icon)
    _fix_all(project, dataset, result)
    for rule in _by_weight(result):
        _rule(project, dataset, rule, result)


def _whom_it_teaches(project: Project, dataset: Dataset) -> None:
    """For rows from elsewhere: with the name they should teach, other assistants' names are looked for."""
    if dataset.kind != "import":
        return
    told = dataset.origin.get("teaches") or {}
    label = _("Teaches {name}").format(name=plain(told["name"])) if told else _("Whose name do these rows teach?")
    with st.popover(label, icon=":material/badge:", key="data.check.teaches"):
        st.caption(_("When these rows say who the assistant is, the check looks for other assistants' names in them."))
        with st.form("data.check.teaches.form", border=False):
            name = st.text_input(_("The assistant's name"), told.get("name", ""), key=f"data.check.name.{dataset.name}")
            maker = st.text_input(_("Its maker"), told.get("maker", ""), key=f"data.check.maker.{dataset.name}")
            if st.form_submit_button(_("Remember and check"), type="primary"):
                dataset_checks.teach(project, dataset.name, name, maker)
                st.rerun()


def _checked(project: Project, dataset: Dataset) -> LintResult | None:
    """The stored result when nothing changed, else a check: at once, or for many rows in a job (None until then)."""
    tokens = tokens_here(project)
    known = dataset_checks.known_lint(project, dataset.name, tokens)
    if known or not dataset_checks.is_large(dataset):
        with st.spinner(_("Checking the rows…")):
            return known or dataset_checks.lint_dataset(project, dataset.name, tokens)
    words = _("{number} rows: checking them takes a while.")
    offer_job(project, dataset, "check", words, _("Check now"), dataset_checks.start_check)
    return None


def tokens_here(project: Project) -> dataset_checks.Tokens | None:
    """As the project's base model makes them; None while it is not on this machine."""
    return dataset_checks.Tokens(project.base) if models.resolve(project.base).present else None


def offer_job(project: Project, dataset: Dataset, kind: str, words: str, label: str, start: Callable[..., Job]) -> None:
    """The job that goes through all rows, or a button that starts it; `words` say that {number} rows take a while."""
    job = dataset_checks.newest_job(project, kind, dataset.name, tokens_here(project))
    if job is not None and job.state != "finished":
        job_panel(project.folder, job, f"data.{kind}")
    if job is None or not job.live:
        st.info(words.format(number=f"{dataset.num_rows:,}"))
        if st.button(label, type="primary", icon=":material/play_arrow:", key=f"data.{kind}.start"):
            start(project, dataset.name, tokens_here(project))
            st.rerun()


def _by_weight(result: LintResult) -> list[str]:
    """Rules with errors first, then those with the most findings."""

    def weight(rule: str) -> tuple[bool, int]:
        return ("error" not in result.counts[rule], -sum(result.counts[rule].values()))

    return sorted(result.counts, key=weight)


def _fix_all(project: Project, dataset: Dataset, result: LintResult) -> None:
    fixable = [finding for finding in result.findings if finding.fix]
    if fixable:
        label = ngettext("Make {number} safe fix", "Make all {number} safe fixes", len(fixable))
        st.button(
            label.format(number=len(fixable)), icon=":material/auto_fix_high:", key="data.check.fix.all",
            on_click=_fix, args=(project, dataset, fixable),
            help=_("As one new version of the dataset, which can be undone."),
        )  # fmt: skip


def _rule(project: Project, dataset: Dataset, rule: str, result: LintResult) -> None:
    found = [finding for finding in result.findings if finding.rule == rule]
    number = sum(result.counts[rule].values())
    is_error = "error" in result.counts[rule]
    color, icon = ("red", ":material/error:") if is_error else ("orange", ":material/warning:")
    label = f"{_(RULE_WORDS.get(rule, rule))} · :{color}-badge[{number}]"
    with st.expander(label, icon=icon, expanded=is_error):
        known = RULES.get(rule)
        if known:
            st.caption(f"{told(known.reason)} {told(known.remedy)}")
        fixable = [finding for finding in found if finding.fix]
        if fixable:
            st.button(
                ngettext("Fix {number} row", "Fix {number} rows", len(fixable)).format(number=len(fixable)),
                icon=":material/auto_fix_high:", key=f"data.check.fix.{rule}",
                on_click=_fix, args=(project, dataset, fixable),
            )  # fmt: skip
        _findings(found, rule)


def _findings(found: Sequence[Finding], rule: str) -> None:
    st.dataframe(
        [{"row": one.row, "message": told(one.message), "fix": bool(one.fix)} for one in found[:SHOWN_FINDINGS]],
        hide_index=True, height="content" if len(found) < 9 else 320, key=f"data.check.table.{rule}",
        column_config={
            "row": st.column_config.NumberColumn(_("Row"), width=70),
            "message": st.column_config.TextColumn(_("What is wrong"), width="large"),
            "fix": st.column_config.CheckboxColumn(_("Safe fix"), width=80),
        },
    )  # fmt: skip


def _fix(project: Project, dataset: Dataset, findings: Sequence[Finding]) -> None:
    with guarded():
        dataset_checks.fix(project, dataset.name, findings, dataset.version)
        state.flash(_("Fixed, as a new version."))
