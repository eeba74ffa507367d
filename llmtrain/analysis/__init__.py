"""What finished runs can tell: spectra of changes of weights, laws fitted to losses."""
