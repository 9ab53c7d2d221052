"""Every patch of an upstream package: what, why, when it can go."""
