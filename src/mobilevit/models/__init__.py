"""The network, its heads, and weights in every format in use."""
