"""Home: continue where you left, your projects, a new one, the starter model."""

import streamlit as st

from studio.ui.frame import frame

project = frame("Home", ":material/home:", needs_project=False)

from studio.ui import home
from studio.ui.queue_view import queue_view
from studio.ui.widgets import guarded

with guarded():
    home.base_model(project)
with guarded():
    if project:
        home.continue_here(project)
    else:
        home.welcome()
with guarded():
    queue_view("home.queue")
with guarded():
    st.divider()
    home.projects_and_new(project)
