"""What calls to any service need: a limit that adapts, retries, many iterators as one."""
