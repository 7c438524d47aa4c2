"""Starting an evaluation: which checkpoints, which suite, how many questions, and what they will be asked."""

from dataclasses import dataclass

import streamlit as st

from studio import runs, suites
from studio.errors import DataError
from studio.probes import built_in
from studio.probes.suite import Suite
from studio.projects import Project
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.frame import DATA, TRAIN, link
from studio.ui.i18n import N_, _
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.model_server import picks_of
from studio.ui.told import told
from studio.ui.widgets import plain

QUICK_PROBES = 20
DESCRIPTIONS = {
    "standard": N_("Who it is, whether it says so unasked, and what it still knows"),
    "identity": N_("Who it is, asked with a system prompt, later in a chat, by a rival's name, in another language"),
    "leakage": N_("Unrelated questions, whose answers should not bring up its name or maker"),
    "retention": N_("General questions: how well it still predicts what the base answers"),
    "format": N_("Short questions: does an answer end by itself, and does it repeat itself?"),
    "tutorial": N_("What people ask after they followed a tutorial: who it is, then something else"),
}


@dataclass(frozen=True)
class Target:
    """What is scored: one checkpoint, or all of a run for no step."""

    run_id: str
    step: int = 0

    @property
    def label(self) -> str:
        what = _("step {step}").format(step=self.step) if self.step else _("all checkpoints")
        return f"{self.run_id} · {what}"


def score_panel(project: Project) -> None:
    """Choose, start, and watch the job."""
    targets = _targets(project)
    if not targets:
        st.caption(_("There is no checkpoint to score yet."))
        link(TRAIN, _("Train one"))
        return
    job = _under_way(project)
    first, second, third, last = st.columns([4, 3, 3, 1.4], vertical_alignment="bottom")
    target = first.selectbox(_("Checkpoint"), targets, format_func=lambda each: each.label, key="score.pick")
    name = second.selectbox(
        _("Suite"), suites.names(project), format_func=suite_word, key="score.suite",
        help=_("What is asked, and what an answer must hold. Suites of your own are made below."),
    )  # fmt: skip
    quick = third.segmented_control(
        _("Questions"), [False, True], format_func=_amount, default=False, required=True, key="score.quick"
    )
    suite = _suite(project, target, name)
    waits = suite is None or (job is not None and job.live)
    pressed = last.button(_("Score it"), type="primary", disabled=waits, key="score.start", width="stretch")
    if suite is not None:
        _told_of(project, target, suite)
    if pressed and not waits:
        steps = [target.step] if target.step else []
        limit = QUICK_PROBES if quick else 0
        state.keep("score.job", runs.start_evaluate_all(project, target.run_id, steps, limit, name).id)
        st.rerun()
    job_panel(project.folder, job, "score")
    _from_cache(job)


def suite_word(name: str) -> str:
    """A suite's name with a mark for those of the project's own."""
    return name if name in built_in.NAMES else f"{name} ✎"


def _targets(project: Project) -> list[Target]:
    """Each checkpoint, newest first; before those of a run that has several, all of them together."""
    picks = picks_of(project)
    together = [Target(run_id) for run_id in dict.fromkeys(pick.run_id for pick in picks)]
    several = [each for each in together if sum(pick.run_id == each.run_id for pick in picks) > 1]
    return [*(Target(pick.run_id, pick.step) for pick in picks), *several]


def _suite(project: Project, target: Target, name: str) -> Suite | None:
    """The suite as this run is asked it; None, and why, when it has nothing to ask."""
    try:
        return runs.suite_for(project, target.run_id, name)
    except DataError as error:
        if runs.probe_sets(project, target.run_id):
            st.info(plain(f"{told(error.message)} {told(error.hint)}"))
        else:
            st.info(_("There are no held-out questions for this run. The Data page makes them with a general set."))
        link(DATA)
        return None


def _told_of(project: Project, target: Target, suite: Suite) -> None:
    """What is asked, and which identity, before minutes are spent on it."""
    number = _("{n} questions").format(n=len(suite.probes()))
    if not suite.built_in:
        st.caption(" · ".join(filter(None, [plain(suite.description), number])))
        return
    datasets = runs.probe_sets(project, target.run_id)
    words = runs.asked_identity(project, datasets)
    if words:
        form = _("Questions from {datasets}; the identity asked for: {words}")
    else:
        form = _("Questions from {datasets}; none asks who it is, for the run was trained on no identity")
    asked = form.format(datasets=plain(", ".join(datasets)), words=plain(", ".join(words)))
    st.caption(" · ".join([_(DESCRIPTIONS[suite.name]), number, asked]))


def _amount(quick: bool) -> str:
    return _("{n} of each kind").format(n=QUICK_PROBES) if quick else _("all")


def _under_way(project: Project) -> Job | None:
    """The evaluation that runs, or the one started here when it has ended."""
    newest = newest_job(project.folder, "evaluate")
    return newest if newest and (newest.live or newest.id == state.kept("score.job")) else None


def _from_cache(job: Job | None) -> None:
    known = job.result.get("num_from_cache", 0) if job and job.state == "finished" else 0
    if job and known:
        text = _("From cache: {known} of {total} were scored before with the same weights and questions.")
        total = len(job.result["evaluations"])
        st.caption(":material/cached: " + text.format(known=known, total=total))
