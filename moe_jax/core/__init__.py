"""Used by all other subpackages: errors, files, sharding."""
