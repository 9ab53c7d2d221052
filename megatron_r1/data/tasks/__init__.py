"""Where questions come from: one task a file."""
