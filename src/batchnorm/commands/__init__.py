"""One module for each command; it imports its tools when it runs."""
