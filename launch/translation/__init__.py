"""What another trainer was asked, as a config of ours: `loraloom init --from`."""
