"""What frozen networks see of images: the networks, their weights, and the store of their features."""
