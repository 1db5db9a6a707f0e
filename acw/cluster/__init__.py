"""The Ray cluster: joining it, room on it, work on it, what happens there and what it costs."""
