"""What calls to any service need: a limit that adapts, retries, an end where all is refused, many iterators as one."""
