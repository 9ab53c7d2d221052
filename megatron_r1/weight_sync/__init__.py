"""The trainer's weights into the running engines: one transport a file."""
