"""The mini-Well: eight 2D systems, and three extras, simulated at low resolution, in the Well's HDF5 layout."""
