"""Config: everything one run needs, as a form or as YAML: two views of one object."""

import streamlit as st

from studio.ui.frame import frame

project = frame("Config", ":material/tune:")

from studio.ui import config_view
from studio.ui.config_draft import current
from studio.ui.widgets import guarded

with guarded():
    config_view.pick(project, current(project))
    editor, side = st.columns([3, 2], gap="large")
    with editor:
        config_view.edit(project, current(project))
    with side:
        config_view.summary(project, current(project))
