"""Files on a disk or in a bucket, through one set of functions."""
