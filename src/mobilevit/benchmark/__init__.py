"""What the network costs: operations, memory and time."""
