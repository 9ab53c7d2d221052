"""Runs on many nodes: what a run file needs, engines on a node of their own, the health of nodes."""
