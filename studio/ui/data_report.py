"""What is in a dataset, in numbers and plots: lengths in tokens, share that is trained, turns, languages, sources."""

from collections.abc import Mapping

import streamlit as st

from studio import caches, charts, dataset_checks, models
from studio.data.report import DatasetReport
from studio.datasets import Dataset
from studio.paths import human_bytes
from studio.projects import Project
from studio.ui import state
from studio.ui.data_check import offer_job, tokens_here
from studio.ui.i18n import N_, _, ngettext
from studio.ui.widgets import ago, guarded, plain

LANGUAGE_WORDS = {"en": N_("English"), "zh": N_("Chinese"), "other": N_("others")}


def report_view(project: Project, dataset: Dataset) -> None:
    """A large dataset is counted in a job, when it is asked for."""
    _caches(project)
    base = project.base if models.resolve(project.base).present else ""
    if dataset_checks.is_large(dataset):
        known = dataset_checks.known_report(project, dataset.name, tokens_here(project))
        if known is None:
            words = _("{number} rows: counting them takes a while.")
            offer_job(project, dataset, "report", words, _("Count now"), dataset_checks.start_report)
            return
        report = known
    else:
        report = _report(dataset.fingerprint, base, project, dataset)
    _tiles(report)
    left, right = st.columns([3, 2], gap="large")
    with left:
        _lengths(report, base)
    with right:
        _shares(
            _("Languages"), {_(LANGUAGE_WORDS.get(name, name)): number for name, number in report.languages.items()}
        )
        _shares(_("Questions in a row"), {str(turns): number for turns, number in report.turns.items()})
        if len(report.sources) > 1:
            _shares(_("Sources"), {plain(name) or "–": number for name, number in report.sources.items()})


def _caches(project: Project) -> None:
    """The tokens that runs left for those after them: how much room they take, and deleting them."""
    known = caches.listed(project)
    if not known:
        return
    size = human_bytes(sum(info.num_bytes for info in known))
    with st.popover(_("Stored tokens: {size}").format(size=size), icon=":material/database:", key="data.caches"):
        st.markdown(
            _("Rows are tokenised once and found again by later runs. What is deleted is made again when needed.")
        )
        for info in known:
            rows = ngettext("{number} row", "{number} rows", info.num_rows).format(number=f"{info.num_rows:,}")
            st.caption(f"{plain(info.dataset)} · {rows} · {human_bytes(info.num_bytes)} · {ago(info.created_at)}")
        st.button(
            _("Delete them all"), icon=":material/delete:", key="data.caches.delete", on_click=_drop, args=(project,)
        )


def _drop(project: Project) -> None:
    with guarded():
        freed = caches.delete_all(project)
        state.flash(_("{size} are free again.").format(size=human_bytes(freed)))


@st.cache_data(max_entries=8, show_spinner=False)
def _report(fingerprint: str, base: str, _project: Project, _dataset: Dataset) -> DatasetReport:
    with st.spinner(_("Counting…")):
        return dataset_checks.report(_project, _dataset.name, dataset_checks.Tokens(base) if base else None)


def _tiles(report: DatasetReport) -> None:
    tiles = [
        (_("Rows"), f"{report.num_rows:,}", ""),
        (_("Tokens"), f"{report.num_tokens:,}", ""),
        (_("Trained"), f"{report.trained_share:.0%}", _("Tokens that the loss counts, of all tokens.")),
        (_("Same row again"), f"{report.num_duplicates:,}", ""),
        (_("Cut"), f"{report.num_truncated:,}", _("Rows longer than the longest length, 512 tokens.")),
        (_("Left out"), f"{report.num_untrained + report.num_refused:,}", _("Rows in which nothing is trained.")),
    ]
    for column, (label, value, help) in zip(st.columns(len(tiles)), tiles, strict=True):
        with column.container(border=True):
            st.metric(label, value, help=help or None)


def _lengths(report: DatasetReport, base: str) -> None:
    st.markdown(f"**{_('Length of rows, in tokens')}**")
    if not report.histogram:
        missing = _("The tokens appear when the base model {base} is on this machine.")
        st.caption(missing.format(base=plain(base or "")))
        return
    figure = charts.histogram_chart(report.histogram, x_title=_("Tokens"), y_title=_("Rows"))
    st.plotly_chart(
        figure, key="data.report.lengths", theme="streamlit", config={"displayModeBar": False},
        alt=_("Length of rows, in tokens"),
    )  # fmt: skip
    words = _(
        "Half of the rows have at most {median} tokens, 99 of 100 at most {p99}; row {row} has the most, {longest}"
    )
    st.caption(
        words.format(
            median=report.lengths["median"], p99=report.lengths["p99"], row=report.longest_row,
            longest=report.lengths["longest"],
        )
    )  # fmt: skip


def _shares(title: str, numbers: Mapping[str, int]) -> None:
    st.markdown(f"**{title}**")
    total = sum(numbers.values()) or 1
    st.dataframe(
        [{"name": name, "rows": number, "share": number / total} for name, number in numbers.items()],
        hide_index=True, height="content" if len(numbers) < 9 else 320,
        column_config={
            "name": st.column_config.TextColumn(""),
            "rows": st.column_config.NumberColumn(_("Rows"), width=80),
            "share": st.column_config.ProgressColumn(_("Share"), format="percent", min_value=0, max_value=1),
        },
    )  # fmt: skip
