"""Statistics of all ranks as those of one (S14)."""
