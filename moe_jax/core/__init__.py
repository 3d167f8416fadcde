"""What every room uses: errors, files, sharding."""
