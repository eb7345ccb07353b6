"""The state itself: memory and drives that hold it, streams that move it, and the update that runs on it."""
