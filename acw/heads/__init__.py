"""From features to densities: readouts, finalizer, centre bias, ensembles of heads."""
