"""Used by all other subpackages: errors, configurations, files, sharding."""
