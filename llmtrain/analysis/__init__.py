"""What trained weights are like: spectra of the change between two models."""
