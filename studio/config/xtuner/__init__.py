"""XTuner's Python configs: read without running them, and written so that XTuner accepts them."""
