"""Networks that no library has as published, one file each. Dropout and stochastic depth are part of the recipes."""
