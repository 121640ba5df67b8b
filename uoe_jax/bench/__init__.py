"""Speed of this machine: our operations, layers and steps beside installed peers."""
