"""The pipelines: one Config and one run() each."""
