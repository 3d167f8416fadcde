"""A run: its flags, configuration, directory and loading."""
