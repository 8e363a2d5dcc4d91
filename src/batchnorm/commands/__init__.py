"""One module for each command; importing it costs nothing, running it imports what it needs."""
