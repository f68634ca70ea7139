"""Cost and speed: parameters, multiply-accumulates, memory and time."""
