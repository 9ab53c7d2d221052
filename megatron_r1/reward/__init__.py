"""Rewards: one a file; the judge that runs them."""
