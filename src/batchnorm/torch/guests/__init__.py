"""Classes of other packages that are torch's batch norm and something more."""
