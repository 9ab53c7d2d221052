"""What is installed, what of it fits together, what is missing, and what this machine can run.

It has to work where packages are missing or broken, so it imports none of those that it looks at: versions come from
their metadata, and what a package says itself from a process of its own.
"""
