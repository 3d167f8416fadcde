"""What every room uses: errors, configurations, files, sharding."""
