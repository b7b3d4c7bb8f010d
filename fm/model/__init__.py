"""The model: wavelets, attention, blocks, WaveLiT-FM and its baselines. It knows tensors, numbers and files."""
