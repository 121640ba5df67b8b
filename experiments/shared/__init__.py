"""What the experiments share: cases, data on the device, training, results."""
