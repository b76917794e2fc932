"""The command lines: flags in, exit code out, text for people."""
