"""The Ray cluster: joining it, its capacity, work on it, what happens there and what it costs."""
