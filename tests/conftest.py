"""What every test starts from: a home of its own, and models that it cannot spoil."""

import os
import tempfile
from pathlib import Path

import pytest

from studio.paths import models_root
from studio.projects import Project, create_project

REAL_STARTER = models_root() / "starter"
# Set before torch is imported anywhere, here and in the processes that tests start: the machine may be busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
LOCKS = tempfile.TemporaryDirectory(prefix="retune-locks-")  # no test waits for other studios of this machine
os.environ["RETUNE_LOCKS"] = LOCKS.name


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RETUNE_HOME in the test's own folder; base models likewise, with a link to the starter where there is one."""
    home = tmp_path / "home"
    models = tmp_path_factory.mktemp("models")
    if (REAL_STARTER / "retune_model.json").is_file():
        (models / "starter").symlink_to(REAL_STARTER, target_is_directory=True)
    monkeypatch.setenv("RETUNE_HOME", str(home))
    monkeypatch.setenv("RETUNE_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("RETUNE_MODELS", str(models))
    return home


@pytest.fixture
def project() -> Project:
    return create_project("Luna")


@pytest.fixture
def starter() -> Path:
    """The starter model's folder; the test is skipped where it was not fetched."""
    if not (REAL_STARTER / "retune_model.json").is_file():
        pytest.skip("the starter model is not here: `retune models fetch starter`")
    return REAL_STARTER
