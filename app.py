"""Home: projects, running jobs, and what to do next."""

from studio.ui.frame import frame

frame("Home", ":material/home:", needs_project=False)
