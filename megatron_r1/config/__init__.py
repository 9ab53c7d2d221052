"""TOML and overrides to typed, frozen config."""
