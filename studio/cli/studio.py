"""`retune studio`: open the pages."""

import os
import sys
from typing import Annotated

import typer

from studio.paths import REPOSITORY


def studio(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8501,
) -> None:
    """Open the studio in the browser; the same as `streamlit run app.py`. Ctrl-C ends it, runs go on.

    Example: retune studio --port 8502
    """
    os.chdir(REPOSITORY)  # .streamlit/config.toml is read from here: loopback, no statistics
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", "app.py", f"--server.port={port}"])
