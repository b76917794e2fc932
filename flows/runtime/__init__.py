"""The process that a run lives in: environment, signals, logs, terminal, hooks of Prefect."""
