"""`retune lm-eval`: tasks of lm-evaluation-harness, asked of a checkpoint and of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.lazy import harness
from studio.cli.options import JsonOption, ProjectOption, StepOption, checkpoint_step, chosen


def lm_eval(
    run: Annotated[str, typer.Argument(help="The run whose checkpoint is asked.")],
    tasks: Annotated[Path, typer.Argument(help="A folder with the tasks' YAML files and their rows.")],
    step: StepOption = 0,
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many rows of a task; 0 asks all.")] = 0,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Ask tasks of lm-evaluation-harness from local files. Needs the extra: pip install "retune[lm-eval]".

    Example: retune lm-eval starter_lora-1 ~/tasks
    """
    workspace = chosen(project)
    step = checkpoint_step(workspace, run, step)
    follow(workspace.folder, harness.start(workspace, run, step, tasks, limit), json)
    found = [each for each in harness.results(workspace, [run]) if each.step == step]
    if json:
        return show.as_json(found)
    rows = [(each.task, each.metric, each.num_rows, *each.figures) for each in found]
    return show.table(["task", "metric", "rows", "base", "tuned", "change"], rows)
