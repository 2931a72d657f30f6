"""Transfer evaluation: features, protocols, the matrix of cells, statistics."""
