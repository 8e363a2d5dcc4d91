"""Each framework's batch norms, to and from `BatchNormState`; a module imports its framework."""
