"""Tasks on Dask or Ray, where computing travels."""
