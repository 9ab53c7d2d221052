"""What runs inside a box. Standard library only: this code comes through a pipe, and nothing else of the project."""
