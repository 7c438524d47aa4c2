"""Home: continue where you left, your projects, a new one, the starter model."""

import streamlit as st

from studio.ui import home
from studio.ui.frame import frame
from studio.ui.widgets import guarded

project = frame("Home", ":material/home:", needs_project=False)

with guarded():
    home.starter_model()
with guarded():
    if project:
        home.continue_here(project)
    else:
        home.welcome()
with guarded():
    st.divider()
    home.projects_and_new(project)
