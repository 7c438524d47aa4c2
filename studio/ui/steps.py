"""How far a project has come: six steps with their state, and what to do next. Reads files and rows, draws nothing."""

from dataclasses import dataclass

from studio import datasets, runs, scores
from studio.errors import StudioError
from studio.projects import Project
from studio.store import checkpoints, evaluations, open_db
from studio.store.evaluations import Evaluation
from studio.store.runs import Run
from studio.ui.frame import CHECKPOINTS, COMPARE, CONFIG, DATA, SERVE, TRAIN, Page
from studio.ui.i18n import _, ngettext
from studio.ui.told import told
from studio.ui.widgets import plain, state_word

TEACHING = ("identity", "tutorial", "import")


@dataclass(frozen=True)
class Step:
    """A page of the path, whether it is done, and where it stands in words (Markdown)."""

    page: Page
    done: bool
    words: str


@dataclass(frozen=True)
class Overview:
    """A project at a glance. `problem` says why it cannot be read, then the rest is empty."""

    project: Project
    steps: tuple[Step, ...] = ()
    last_run: Run | None = None
    best: Evaluation | None = None
    problem: str = ""

    @property
    def next_step(self) -> Step | None:
        """The first step that is not done."""
        return next((step for step in self.steps if not step.done), None)


def overview(project: Project) -> Overview:
    """Never raises: a damaged project must not hide the others."""
    try:
        return _overview(project)
    except StudioError as error:
        return Overview(project, problem=" ".join(filter(None, [told(error.message), told(error.hint)])))


def best_evaluation(found: list[Evaluation]) -> Evaluation | None:
    """The one with the most identity and the least leakage."""
    standard = [each for each in found if each.is_standard]
    return max(standard, key=lambda each: rate(each, "identity") - rate(each, "leakage"), default=None)


def rate(evaluation: Evaluation, name: str) -> float:
    """A share of the tuned model between 0 and 1 out of a scorecard; 0 when it was not measured."""
    line = next((line for line in scores.lines(evaluation.scores) if line.name == name), None)
    return line.tuned[0] if line and line.tuned else 0.0


def _overview(project: Project) -> Overview:
    found_runs = runs.list_runs(project)
    with open_db(project.folder) as db:
        saved, outputs, scored = checkpoints.listed(db), checkpoints.outputs(db), evaluations.listed(db)
    converted = [output for output in outputs if output.kind in ("hf", "merged")]
    steps = (
        _data_step(project),
        _config_step(project, bool(found_runs)),
        _train_step(found_runs),
        _checkpoint_step(len(saved), len(converted)),
        _compare_step(scored),
        Step(SERVE, False, _("ready to use") if converted else _("after converting")),
    )
    return Overview(project, steps, found_runs[0] if found_runs else None, best_evaluation(scored))


def _data_step(project: Project) -> Step:
    there = datasets.listed(project)
    teaching = [dataset for dataset in there if dataset.kind in TEACHING]
    if not there:
        return Step(DATA, False, _("say who it is"))
    words = ngettext("{number} dataset", "{number} datasets", len(there)).format(number=len(there))
    if not any(dataset.kind == "general" for dataset in there):
        return Step(DATA, False, words + " · " + _("none that keeps what it knows"))
    return Step(DATA, bool(teaching), words)


def _config_step(project: Project, has_runs: bool) -> Step:
    names = runs.list_configs(project)
    words = ngettext("{number} config", "{number} configs", len(names)).format(number=len(names))
    if not names:
        return Step(CONFIG, has_runs, _("a preset was used") if has_runs else _("choose a preset"))
    return Step(CONFIG, True, words)


def _train_step(found: list[Run]) -> Step:
    if not found:
        return Step(TRAIN, False, _("no run yet"))
    return Step(
        TRAIN, any(run.state == "finished" for run in found), f"{plain(found[0].id)}: {state_word(found[0].state)}"
    )


def _checkpoint_step(num_saved: int, num_converted: int) -> Step:
    if not num_saved:
        return Step(CHECKPOINTS, False, _("none yet"))
    words = ngettext("{number} checkpoint", "{number} checkpoints", num_saved).format(number=num_saved)
    return Step(CHECKPOINTS, num_converted > 0, words if num_converted else words + " · " + _("not converted"))


def _compare_step(scored: list[Evaluation]) -> Step:
    words = ngettext("{number} scorecard", "{number} scorecards", len(scored)).format(number=len(scored))
    return Step(COMPARE, bool(scored), words if scored else _("not scored yet"))
