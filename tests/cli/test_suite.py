"""`retune suite`: list, import (ours and promptfoo's), check with lines, show, delete."""

import json
from pathlib import Path

from studio.projects import Project
from tests.cli.conftest import Retune

OURS = "# shop\ngroups:\n  - name: hours\n    probes:\n      - ask: When do you open?\n"
PROMPTFOO = "prompts: ['What is {{x}}?']\ntests:\n  - vars: {x: [1, 2]}\n    assert: [{type: javascript, value: y}]\n"


def test_suites_come_and_go(project: Project, retune: Retune, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "shop.yaml", tmp_path / "promptfooconfig.yaml"
    ours.write_text(OURS)
    theirs.write_text(PROMPTFOO)
    assert "1 probe in 1 group" in retune("suite", "import", ours)
    said = retune("suite", "import", theirs, "--name", "foo")
    assert "Imported foo: 2 probes" in said and "line 4: the assertion 'javascript'" in said
    listed = {row["suite"]: row for row in json.loads(retune("suite", "list", "--json"))}
    assert listed["foo"]["probes"] == 2 and listed["identity"]["kind"] == "built in"
    assert retune("suite", "show", "shop").startswith("# shop")
    assert "already" in retune("suite", "import", ours, code=1)
    retune("suite", "delete", "shop")
    assert "no suite 'shop'" in retune("suite", "show", "shop", code=1)
    assert "no run yet" in retune("suite", "show", "identity", code=1)


def test_a_suite_is_checked_with_its_lines(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(OURS)
    assert "shop.yaml is a suite: 1 probe in 1 group." in retune("suite", "check", file)
    file.write_text(OURS.replace("ask:", "question:"))
    assert "line 5" in retune("suite", "check", file, code=1)
