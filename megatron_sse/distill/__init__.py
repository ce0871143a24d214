"""Training beside a teacher: a finished model whose distributions and layers' outputs the trained one comes near to."""
