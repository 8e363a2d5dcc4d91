"""How to watch the layers of each framework; a module imports its framework."""
