"""Serve: an OpenAI-compatible endpoint on this machine for a base and its adapters."""

from studio.ui.frame import frame

project = frame("Serve", ":material/dns:")

from studio.ui.serve_view import serve_view
from studio.ui.widgets import guarded

with guarded():
    serve_view(project)
