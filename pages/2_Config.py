"""Config: everything one run needs."""

from studio.ui.frame import frame

project = frame("Config", ":material/tune:")
