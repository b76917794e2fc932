"""What follows a run: history, drift, events, artifacts."""
