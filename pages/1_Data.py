"""Data: build, distil, upload, browse."""

from studio.ui.frame import frame

project = frame("Data", ":material/dataset:")
