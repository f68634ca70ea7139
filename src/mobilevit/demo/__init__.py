"""The network in the browser: a page, and a server for it."""
