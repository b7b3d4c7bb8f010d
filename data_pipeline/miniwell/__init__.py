"""The mini-Well: eight 2D systems simulated at low resolution, written in the Well's HDF5 layout."""
