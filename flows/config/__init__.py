"""What a run is told: models of the settings, where they come from, and what they resolve to."""
