"""Networks that no library has as published, one file each; dropout and stochastic depth belong to the recipes."""
