"""What runs, in which order: Prefect flows, command lines and configuration."""

from pathlib import Path

# Prefect puts this folder first on the path of what it runs, so that no module in it may be called as a room beside it.
# The door `python -m flows.backends` has the name that people look for: it stands in a folder that is found this way.
__path__.append(str(Path(__file__).with_name("doors")))
