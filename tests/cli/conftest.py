"""The command line, run in this process; jobs that it starts are processes of their own, as always."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from studio.cli.app import app
from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]
Retune = Callable[..., str]


def run(*words: object, code: int = 0, answer: str = "") -> str:
    """stdout and stderr of `retune WORDS`; the exit code must be `code`, and nothing may leave as an exception."""
    done = CliRunner().invoke(app, [str(word) for word in words], input=answer)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture
def retune() -> Retune:
    return run
