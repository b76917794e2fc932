"""What runs, in which order: Prefect flows, command lines and configuration."""
