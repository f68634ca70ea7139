"""From files to batches: sources of pictures, what is done to them, and in which order they come."""
