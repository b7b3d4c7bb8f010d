"""The Well's HDF5 files: found, downloaded, read, described."""
