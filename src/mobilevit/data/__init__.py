"""From files to batches: sources of images, what is done to them, and in which order they come."""
