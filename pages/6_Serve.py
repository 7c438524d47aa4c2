"""Serve: an OpenAI-compatible endpoint on this machine for a base and its adapters."""

from studio.ui.frame import frame
from studio.ui.serve_view import serve_view
from studio.ui.widgets import guarded

project = frame("Serve", ":material/dns:")
with guarded():
    serve_view(project)
