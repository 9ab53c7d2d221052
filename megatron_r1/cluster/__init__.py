"""Runs on many nodes: what a run file needs, engines on nodes of their own or over several, the health of nodes."""
