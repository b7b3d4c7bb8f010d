"""WaveLiT-FM: model, training, evaluation."""

__version__ = "0.1.0"
