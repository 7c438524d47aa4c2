"""Each page starts in a fresh process, shows itself without an exception, and does not load torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio.paths import REPOSITORY
from studio.projects import Project

PAGES = ["app.py", *sorted(f"pages/{path.name}" for path in (REPOSITORY / "pages").glob("*.py"))]
HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets")
OPEN = """
import sys
from streamlit.testing.v1 import AppTest
at = AppTest.from_file("app.py", default_timeout=100)
at.run()
if sys.argv[1] != "app.py":
    at.switch_page(sys.argv[1]).run()
assert not at.exception, at.exception
assert at.title or at.header or at.markdown or at.caption, "the page is blank"
print(sorted(set({heavy!r}) & set(sys.modules)))
"""


def test_all_pages_are_there() -> None:
    expected = ["1_Data", "2_Config", "3_Train", "4_Checkpoints", "5_Compare", "6_Serve"]
    assert PAGES[1:] == [f"pages/{name}.py" for name in expected]


@pytest.mark.parametrize("has_project", [False, True], ids=["no project", "a project"])
@pytest.mark.parametrize("script", PAGES)
def test_page_starts_without_torch(
    script: str, has_project: bool, request: pytest.FixtureRequest, own_home: Path
) -> None:
    if has_project:
        assert isinstance(request.getfixturevalue("project"), Project)
    done = subprocess.run(
        [sys.executable, "-c", OPEN.format(heavy=HEAVY), script],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=200, env={**os.environ, "RETUNE_HOME": str(own_home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]", "these libraries cost seconds at every start"
