"""Data: build who it is, keep what it knows, upload, browse and edit."""

from studio.ui.frame import frame

project = frame("Data", ":material/dataset:")

from studio.ui.data_browse import browse_tab
from studio.ui.data_build import build_tab
from studio.ui.data_distill import distill_tab
from studio.ui.data_upload import upload_tab
from studio.ui.i18n import _
from studio.ui.widgets import guarded, tab_picker

TABS = {
    "build": (_("Build identity"), build_tab),
    "keep": (_("Keep what it knows"), distill_tab),
    "upload": (_("Upload"), upload_tab),
    "browse": (_("Browse and edit"), browse_tab),
}
chosen = tab_picker(TABS, "data.tab")
with guarded():
    TABS[chosen][1](project)
