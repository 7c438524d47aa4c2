"""`retune bundle` and `retune reproduce`: a run in one file, and the same run once more, held against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.evaluate import score_all
from studio.cli.follow import follow
from studio.cli.lazy import comparing, content, packing, projects, reproducing
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.errors import BundleError, ProjectError
from studio.paths import human_bytes, typed_path

if TYPE_CHECKING:
    from studio.bundles.comparing import Comparison
    from studio.bundles.content import Manifest
    from studio.bundles.reproducing import Plan
    from studio.projects import Project


def bundle(
    run: Annotated[str, typer.Argument(help="The run, as starter_lora-1.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; RUN.bundle.zip here when left out.")] = None,
    without_rows: Annotated[
        bool, typer.Option("--without-rows", help="Leave rows, questions, answers and samples out.")
    ] = False,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Write a run into one zip: config, rows, fingerprints, versions, machine, seed, numbers, scores, commands.

    The same run gives the same bytes. Whoever has the file can run it again: `retune reproduce`.

    Example: retune bundle starter_lora-1 --out luna.bundle.zip
    """
    path = (out or Path(f"{run}.bundle.zip")).resolve()
    packed = packing.pack(chosen(project), run, path, rows=not without_rows)
    if json:
        about = {"path": str(path), "size_bytes": packed.size_bytes, "sha256": packed.sha256}
        return show.as_json(about | packed.manifest.model_dump(mode="json"))
    show.say(f"Wrote {path} ({human_bytes(packed.size_bytes)}, sha256 {packed.sha256[:12]})")
    show.say(_inside(packed.manifest))
    return show.say(f"Run it again: retune reproduce {path.name}")


def reproduce(
    file: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    project: Annotated[
        str, typer.Option("--project", "-p", help="A project to do it in, made when not there; named after the run.")
    ] = "",
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="WHAT=PATH",
            help="Something that is not in the bundle: base=FOLDER, data.NAME=FILE, model.continue_from=PATH.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be used and made.")] = False,
    json: JsonOption = False,
) -> None:
    """Run a bundle's run again: train, score, and compare with what the bundle says.

    Differences of packages and machine are told first. On a CPU in float32, under equal circumstances, losses and
    weights come out equal to the last bit.

    Example: retune reproduce luna.bundle.zip --dry-run
    """  # fmt: skip
    paths = _given(given or [])
    with content.open_bundle(file) as opened:
        plan = reproducing.make_plan(opened, _project(project), paths)
        if not json:
            _tell(opened.manifest, plan)
        if dry_run:
            return show.as_json(plan) if json else None
        workspace, run, job = reproducing.start(opened, plan, paths, name=project)
    if not json:
        show.say(f"\nRun {run.id} of project {workspace.slug}; log: {job.log_path}")
    follow(workspace.folder, job, quiet=json)
    for due in comparing.scorecards_due(workspace, run.id):
        score_all(workspace, run.id, (due.step,), due.limit, due.suite, quiet=json)
    found = comparing.compare(workspace, run.id)
    if json:
        return show.as_json(found)
    return _compared(found) if found else None


def _given(words: list[str]) -> dict[str, Path]:
    """`WHAT=PATH` as a table. Raises BundleError."""
    found = {}
    for word in words:
        what, equals, path = word.partition("=")
        if not equals or not path:
            raise BundleError(f"{word!r} names no path.", "Write --with WHAT=PATH, as --with base=~/models/luna.")
        found[what] = typed_path(path)
    return found


def _project(name: str) -> Project | None:
    """The project of that name; None for one that is to be made."""
    try:
        return projects.open_project(name) if name else None
    except ProjectError:
        return None


def _inside(manifest: Manifest) -> str:
    names = ", ".join(f"{each.name} ({show.amount(each.num_rows, 'row')})" for each in manifest.datasets)
    if manifest.has_rows:
        return f"The rows are inside: {names}, with questions, answers and samples. Leave them out: --without-rows."
    return f"The rows are not inside: whoever runs it again brings {names}."


def _tell(manifest: Manifest, plan: Plan) -> None:
    """What the run is, where its parts come from, and what is different here."""
    run = manifest.run
    show.say(f"{run.id}: {run.method} on {manifest.base}, {run.step} of {run.num_steps} steps, {run.state}")
    show.say(f"Project: {plan.project}{' (new)' if plan.is_new else ''}. Base model: {plan.base or 'not here'}")
    for name, source in plan.rows.items():
        show.say(f"Rows of {name}: {f'from {source}' if source else 'not here'}")
    if plan.differences:
        show.say("\nDifferent here; the numbers may differ too:")
        show.table(["", "in the bundle", "here"], [(each.what, each.there, each.here) for each in plan.differences])
    else:
        show.say("Packages and machine are those of the bundle, as far as it says.")
    for what, sentence in plan.missing.items():
        show.say(f"Missing: {sentence}. Give it: --with {what}=PATH")


def _compared(found: Comparison) -> None:
    show.say("")
    rows = [(line.what, line.there, line.here, line.verdict, line.note) for line in found.lines]
    show.table(["", "bundle", "here", "", ""], rows)
    show.say("\n" + " ".join(found.sentences))
