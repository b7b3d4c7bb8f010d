"""HDF5 -> tar shards and their manifest; what is wrong with the data."""
