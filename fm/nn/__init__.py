"""Layers of WaveLiT. They import torch, ptwt and each other, nothing else."""
